"""The operator behind every dynamic convolution, and the rule that picks its implementation.

`reference.py` is the definition; faster implementations get a file each beside it and are chosen here.
"""
import torch
from torch import Tensor

from .dense import dynamic_conv2d_dense
from .reference import dynamic_conv2d_reference

__all__ = ['dynamic_conv2d']

def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def dynamic_conv2d(
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor | None,
        in_attn: Tensor | None = None,
        out_attn: Tensor | None = None,
        tap_attn: Tensor | None = None,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
) -> Tensor:
    """Convolve every image with its own mixture of K kernels.

        y_b = out_attn[b] * (conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k)
                             + sum_k kernel_attn[b, k] bias_k)

    Differentiable in every tensor. An attention that is None is 1 everywhere.

    Args:
        x: Images (B, C_in, H, W); B may be 0. Under autocast it is cast to autocast's dtype, and the kernels are mixed
            in the dtype of `weight`.
        weight: The K kernels, one after the other: (K * C_out, C_in / groups, kh, kw).
        kernel_attn: Share of each kernel (B, K); None for a single kernel.
        in_attn: Factor of each input channel (B, C_in).
        out_attn: Factor of each output channel (B, C_out).
        tap_attn: Factor of each kernel tap (B, kh * kw), the same for all channels and kernels.
        bias: The K biases, one after the other: (K * C_out,). Mixed as the kernels are.
        stride: Pixels, as in `torch.nn.functional.conv2d`.
        padding: Pixels of zeros on each side.
        dilation: Pixels between kernel taps.
        groups: Blocked connections from input to output channels.

    Returns:
        (B, C_out, H', W') in the dtype of `x` (autocast's under autocast), channels_last if `x` is.

    Raises:
        ValueError: The shape of an argument does not fit the others; the message names it.
    """
    if not torch.jit.is_scripting():
        _check_shapes(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, groups)
        if _autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
            # The mixing is a matmul, which autocast would run in half precision before the result is rounded again.
            with torch.autocast(x.device.type, enabled=False):
                return dynamic_conv2d(
                    x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups)

    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    out_pixels = 1
    for i in range(2):
        reach = d[i] * (weight.shape[2 + i] - 1) + 1
        out_pixels *= (x.shape[2 + i] + 2 * p[i] - reach) // s[i] + 1
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if kernel_attn is not None and tap_attn is None and groups == 1 and _prefers_dense(x.shape[0], out_pixels):
        y = dynamic_conv2d_dense(x, weight, kernel_attn, in_attn, out_attn, bias, s, p, d)
    else:
        y = dynamic_conv2d_reference(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, s, p, d, groups)
    return y.contiguous(memory_format=torch.channels_last) if channels_last else y


def _prefers_dense(batch: int, out_pixels: int) -> bool:
    """Whether K convolutions cost less than a mixed kernel for every image, by the number of output pixels H' * W'.

    Measured on CPU (2 cores, torch 2.15), training step of 3x3 convolutions on 64 images: the dense form takes half of
    the reference's time at 8x8 pixels, 1.7 times at 16x16. A single image needs a single mixed kernel.
    """
    return batch > 1 and out_pixels <= 100


def _autocasts(x: Tensor) -> bool:
    device_type = x.device.type
    return (
        torch.amp.is_autocast_available(device_type)  # not on the meta device
        and torch.is_autocast_enabled(device_type)
        and x.dtype != torch.float64
    )


def _check_shapes(
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor | None,
        in_attn: Tensor | None,
        out_attn: Tensor | None,
        tap_attn: Tensor | None,
        bias: Tensor | None,
        groups: int,
) -> None:
    if x.ndim != 4:
        raise ValueError(f'x must have shape (B, C_in, H, W), got {tuple(x.shape)}')
    if weight.ndim != 4:
        raise ValueError(f'weight must have shape (K * C_out, C_in / groups, kh, kw), got {tuple(weight.shape)}')
    B, I = x.shape[:2]
    if weight.shape[1] * groups != I:
        taken = weight.shape[1] * groups
        raise ValueError(f'weight {tuple(weight.shape)} with groups={groups} takes {taken} channels, got {I}')
    if kernel_attn is not None and (kernel_attn.ndim != 2 or kernel_attn.shape[0] != B):
        raise ValueError(f'kernel_attn must have shape ({B}, K), got {tuple(kernel_attn.shape)}')
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    if K < 1 or weight.shape[0] % (K * groups):
        raise ValueError(f'weight must hold {K} kernels of a multiple of {groups} channels, got {weight.shape[0]} rows')
    O, taps = weight.shape[0] // K, weight.shape[2] * weight.shape[3]
    for name, attn, size in ('in_attn', in_attn, I), ('out_attn', out_attn, O), ('tap_attn', tap_attn, taps):
        if attn is not None and tuple(attn.shape) != (B, size):
            raise ValueError(f'{name} must have shape ({B}, {size}), got {tuple(attn.shape)}')
    if bias is not None and tuple(bias.shape) != (K * O,):
        raise ValueError(f'bias must have shape ({K * O},), got {tuple(bias.shape)}')
