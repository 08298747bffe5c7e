"""Dynamic convolution on the CPU: the rules that choose its algorithm.

Chosen from timings of single convolutions of ResNets, forward and backward, batch 1 and 16 at 224 px and 2 to 128 below
17 px, and where `hybrid` begins and ends of 1x1 and 3x3 kernels of 128 to 1024 channels, batch 4 and 16 at 8 to 22 px;
channels_last, float32, one thread of an Intel Xeon. `recipes/bench.py --layers` times those at 224 px anew; on two
threads of one, what they choose was within 3 % of the fastest in 74 of 78 cases. In four it was `c_conv` at batch 16
where `per_image` was faster: 64->64, 64->256 and 128->512 1x1 by 37, 13 and 7 %, 128->128 3x3 at 56 px by 10 %.
"""
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import c_conv, hybrid, im2col, per_image, per_kernel, reference
from .layout import memory_format

__all__ = ['choose', 'forward', 'backward']


def choose(
        batch: int,
        num_kernels: int,
        out_pixels: int,
        groups: int,
        depthwise: bool,
        has_taps: bool,
        pointwise: bool,
        image_numbers: int,
        fits_native: bool,
) -> ModuleType:
    """The implementation for images of `image_numbers` = I * H * W, with `out_pixels` = H' * W' results per channel.

    `fits_native`: it is a forward pass, and one that `c_conv.forward` takes as it lies in memory.
    """
    if fits_native and (not pointwise or image_numbers < 250_000):
        return c_conv
    if num_kernels == 1 and not has_taps:
        return per_kernel  # one kernel for all images: an ordinary convolution
    if depthwise:
        return reference  # a depthwise convolution of B * C channels
    if groups > 1 or out_pixels >= 500:
        return per_image
    if out_pixels >= 144:
        return hybrid
    if batch >= 32 * out_pixels:
        return per_kernel
    return im2col


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0."""
    live, padding, out_pixels = _geometry(x, weight, stride, padding, dilation)
    weight, tap_attn = _crop(weight, live), _crop_taps(tap_attn, weight, live)
    chosen = _chosen(
        x, weight, kernel_attn, tap_attn, out_pixels, groups, fits_native=_fits_native(x, weight, kernel_attn, groups))
    return chosen.forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups)


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None."""
    live, padding, out_pixels = _geometry(x, weight, stride, padding, dilation)
    cropped, cropped_taps = _crop(weight, live), _crop_taps(tap_attn, weight, live)
    chosen = _chosen(x, cropped, kernel_attn, cropped_taps, out_pixels, groups, fits_native=False)
    gradients = list(chosen.backward(
        grad_y, x, cropped, kernel_attn, in_attn, out_attn, cropped_taps, bias, stride, padding, dilation, groups))
    if live is not None:
        grad_weight, gradients[1] = gradients[1], torch.zeros_like(weight)
        gradients[1][(..., *live)] = grad_weight
        if tap_attn is not None:
            grad_taps, gradients[5] = gradients[5], torch.zeros_like(tap_attn)
            window = gradients[5].unflatten(1, weight.shape[2:])[(..., *live)]
            window.copy_(grad_taps.unflatten(1, cropped.shape[2:]))
    return tuple(gradients)


def _geometry(x, weight, stride, padding, dilation) -> tuple[tuple[slice, slice] | None, tuple[int, int], int]:
    """The taps of `weight` that meet the images, None for all, the padding that belongs to them, and H' * W'."""
    live, new_padding, out_pixels = [], [], 1
    for dim in range(2):
        taps, padded, count = _live_taps(
            x.shape[2 + dim], weight.shape[2 + dim], stride[dim], padding[dim], dilation[dim])
        live.append(taps)
        new_padding.append(padded)
        out_pixels *= count
    is_all = all(taps.stop - taps.start == size for taps, size in zip(live, weight.shape[2:]))
    return None if is_all else tuple(live), tuple(new_padding), out_pixels


@lru_cache  # a network has few sizes
def _live_taps(size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[slice, int, int]:
    """In one dimension, the taps that meet the image at all, the padding that belongs to them, and the outputs.

    Of the 3x3 kernels of the last stage for tiny images, only the middle does: the rest sees zeros.
    """
    count = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    meeting = [
        tap for tap in range(taps)
        if any(0 <= out * stride - padding + tap * dilation < size for out in range(count))
    ]
    first, last = (meeting[0], meeting[-1]) if meeting else (0, taps - 1)
    cropped = padding - first * dilation
    if cropped < 0 or (size + 2 * cropped - dilation * (last - first) - 1) // stride + 1 != count:
        return slice(0, taps), padding, count
    return slice(first, last + 1), cropped, count


def _crop(weight: Tensor, live: tuple[slice, slice] | None) -> Tensor:
    return weight if live is None else weight[(..., *live)].contiguous(memory_format=memory_format(weight))


def _crop_taps(tap_attn: Tensor | None, weight: Tensor, live: tuple[slice, slice] | None) -> Tensor | None:
    if tap_attn is None or live is None:
        return tap_attn
    return tap_attn.unflatten(1, weight.shape[2:])[(..., *live)].flatten(1)


def _fits_native(x, weight, kernel_attn, groups) -> bool:
    return (
        x.dtype == torch.float32 and groups == 1 and kernel_attn is not None
        and all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
        and c_conv.takes(weight, kernel_attn.shape[1]) and c_conv.is_available()
    )


def _chosen(x, weight, kernel_attn, tap_attn, out_pixels, groups, fits_native) -> ModuleType:
    return choose(
        batch=len(x), num_kernels=1 if kernel_attn is None else kernel_attn.shape[1], out_pixels=out_pixels,
        groups=groups, depthwise=groups > 1 and weight.shape[1] == 1, has_taps=tap_attn is not None,
        pointwise=weight.shape[2:] == (1, 1), image_numbers=x[0].numel(), fits_native=fits_native)
