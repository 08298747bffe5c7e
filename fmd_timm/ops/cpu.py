"""Dynamic convolution on the CPU: the rules that choose its algorithm.

Measured with `recipes/bench.py --layers`; the results are beside it.
"""
from types import ModuleType

from torch import Tensor

from . import dense, gemm, per_image, reference

__all__ = ['choose', 'forward', 'backward']


def choose(
        batch: int,
        num_kernels: int,
        out_pixels: int,
        groups: int,
        depthwise: bool,
        has_taps: bool,
        backward: bool,
) -> ModuleType:
    """The implementation for images with `out_pixels` = H' * W' results per channel."""
    if num_kernels == 1 and not has_taps:
        return dense  # one kernel for all images: an ordinary convolution
    if depthwise:
        return reference  # a depthwise convolution of B * C channels
    if groups > 1 or out_pixels >= (400 if backward else 100):
        return per_image
    if batch >= 32 * out_pixels:
        return dense
    return gemm


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0."""
    chosen = _chosen(x, weight, kernel_attn, tap_attn, stride, padding, dilation, groups, False)
    return chosen.forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups)


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None."""
    chosen = _chosen(x, weight, kernel_attn, tap_attn, stride, padding, dilation, groups, True)
    return chosen.backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups)


def _chosen(x, weight, kernel_attn, tap_attn, stride, padding, dilation, groups, backward) -> ModuleType:
    num_kernels = 1 if kernel_attn is None else kernel_attn.shape[1]
    out_pixels = 1
    for size, taps, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation):
        out_pixels *= (size + 2 * p - d * (taps - 1) - 1) // s + 1
    return choose(
        batch=len(x), num_kernels=num_kernels, out_pixels=out_pixels, groups=groups,
        depthwise=groups > 1 and weight.shape[1] == 1, has_taps=tap_attn is not None, backward=backward)
