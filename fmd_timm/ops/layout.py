"""Images as patches and kernels as rows, so that a convolution is a matrix product; both as they lie in memory.

A patch is what one output pixel sees: R = I * kh * kw numbers, in the order which a row of the kernels has, that of
channels_last where the weight is laid out so.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Attention, Case, is_channels_last

CONVERTED = 2**16  # integers of each kernel that are floats at a time: they stay in the cache


def gated(x: Tensor, attn: Tensor | None) -> Tensor:
    """Images (B, C, H, W) times a factor (B, C) of each channel."""
    return x if attn is None else x * attn.to(x.dtype)[:, :, None, None]


def bank_of(weight: Tensor, attention: Attention, case: Case) -> tuple[Tensor, Tensor]:
    """kernel_attn (B, K), ones where a single kernel has none, and the kernels as `kernel_rows`."""
    kernel_attn = weight.new_ones(case.batch, 1) if attention.kernel_attn is None else attention.kernel_attn
    return kernel_attn, kernel_rows(weight, case.num_kernels)


def kernel_rows(weight: Tensor, num_kernels: int) -> Tensor:
    """The K kernels (K, O, R) with the R = I * taps weights of an output channel in the order they have in memory."""
    rows = weight.permute(0, 2, 3, 1) if is_channels_last(weight) else weight
    return rows.reshape(num_kernels, weight.shape[0] // num_kernels, -1)


def mix(kernel_attn: Tensor, rows: Tensor, memory: Tensor) -> Tensor:
    """kernel_attn (b, K), rows of the kernels (K, o, R) -> mixed kernels (b, o, R) in `memory`

    To allocate memory each time would cost more than the mixing, as would a float copy of all kernels that are
    integers.
    """
    kernels = part_of(memory, len(kernel_attn), *rows.shape[1:])
    mixed, rows = kernels.flatten(1), rows.flatten(1)
    if rows.is_floating_point():
        torch.mm(kernel_attn, rows, out=mixed)
    else:
        for part in slices(rows.shape[1], CONVERTED):
            torch.mm(kernel_attn, rows[:, part].to(kernel_attn.dtype), out=mixed[:, part])
    return kernels


def attention_gradients(products: Tensor, attention: Attention) -> Attention:
    """Gradients of the attention but in_attn, None for what is None.

    Args:
        products: (taps, B, K, O): the gradient of each image's kernel, before its factors, times each of the K kernels,
            summed by output channel and tap; by channel alone (1, B, K, O) without tap_attn.
        attention: The attention.
    """
    kernel_attn, _, out_attn, tap_attn = attention
    _, B, K, O = products.shape
    out = products.new_ones(B, O) if out_attn is None else out_attn
    by_channel = products[0] if tap_attn is None else torch.einsum('tbko,bt->bko', products, tap_attn)
    share = products.new_ones(B, K) if kernel_attn is None else kernel_attn
    return Attention(
        None if kernel_attn is None else torch.einsum('bko,bo->bk', by_channel, out),
        None,
        None if out_attn is None else torch.einsum('bko,bk->bo', by_channel, share),
        None if tap_attn is None else torch.einsum('tbko,bk,bo->bt', products, share, out),
    )


def part_of(memory: Tensor, *shape: int) -> Tensor:
    return memory[:math.prod(shape)].view(shape)


def slices(count: int, step: int) -> list[slice]:
    """Ranges of `step` numbers below `count`, the last one maybe shorter."""
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def per_element(tap_attn: Tensor, weight: Tensor) -> Tensor:
    """tap_attn (B, taps) -> (B, 1, R), the factor of each element of a row of the kernels"""
    I = weight.shape[1]
    return (tap_attn.repeat_interleave(I, 1) if is_channels_last(weight) else tap_attn.repeat(1, I))[:, None]


def patches_of(x: Tensor, case: Case) -> Tensor:
    """x (B, I, H, W) -> what each output pixel sees (B, P, R), R in the order of the kernels"""
    windows = _windows(_padded(x, case), case)  # (B, I, kh, kw, H', W')
    if rows_are_pixels(case):
        return windows.permute(0, 4, 5, 2, 3, 1).reshape(len(x), case.out_pixels, -1)
    return windows.reshape(len(x), -1, case.out_pixels).mT


def sum_patches(grad_patches: Tensor, x: Tensor, case: Case) -> Tensor:
    """Adjoint of `patches_of`: (B, P, R) -> (B, I, H, W)"""
    height, width = case.output_size
    kh, kw = case.kernel_size
    if rows_are_pixels(case):
        parts = grad_patches.reshape(len(x), height, width, kh, kw, -1).permute(0, 5, 3, 4, 1, 2)
    else:
        parts = grad_patches.mT.reshape(len(x), -1, kh, kw, height, width)
    if case.is_pointwise:
        return parts[:, :, 0, 0]
    grad_padded = torch.zeros_like(_padded(x, case))
    windows = _windows(grad_padded, case)
    for i in range(kh):
        for j in range(kw):
            windows[:, :, i, j] += parts[:, :, i, j]
    top, left = case.padding
    return grad_padded[:, :, top:top + x.shape[2], left:left + x.shape[3]]


def rows_are_pixels(case: Case) -> bool:
    """Whether the patches are laid out pixel by pixel, as in channels_last. 1x1 kernels have one layout for both."""
    return case.channels_last if case.kernel_size == (1, 1) else case.weight_channels_last


def _padded(x: Tensor, case: Case) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last if rows_are_pixels(case) else torch.contiguous_format)
    top, left = case.padding
    return F.pad(x, (left, left, top, top)) if top or left else x


def _windows(padded: Tensor, case: Case) -> Tensor:
    """A view (B, I, kh, kw, H', W') of the padded images (B, I, H, W)."""
    b, c, h, w = padded.stride()
    return padded.as_strided(
        (*padded.shape[:2], *case.kernel_size, *case.output_size),
        (b, c, case.dilation[0] * h, case.dilation[1] * w, case.stride[0] * h, case.stride[1] * w),
        padded.storage_offset(),
    )
