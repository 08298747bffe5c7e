"""Images as patches and kernels as rows, so that a convolution is a matrix product; both as they lie in memory.

A patch is what one output pixel sees: R = I * kh * kw numbers, in the order which a row of the kernels has, that of
channels_last where the weight is laid out so.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def kernel_rows(weight: Tensor, kernel_attn: Tensor | None) -> Tensor:
    """The K kernels (K, O, R) with the R = I * taps weights of an output channel in the order they have in memory."""
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    rows = weight.permute(0, 2, 3, 1) if is_channels_last(weight) else weight
    return rows.reshape(K, weight.shape[0] // K, -1)


def per_element(tap_attn: Tensor, weight: Tensor) -> Tensor:
    """tap_attn (B, taps) -> (B, 1, R), the factor of each element of a row of the kernels"""
    I = weight.shape[1]
    return (tap_attn.repeat_interleave(I, 1) if is_channels_last(weight) else tap_attn.repeat(1, I))[:, None]


def by_tap(of_elements: Tensor, weight: Tensor) -> Tensor:
    """Adjoint of `per_element`: (B, R) -> (B, taps)"""
    I = weight.shape[1]
    if is_channels_last(weight):
        return of_elements.unflatten(1, (-1, I)).sum(2)
    return of_elements.unflatten(1, (I, -1)).sum(1)


def patches_of(x, weight, stride, padding, dilation) -> tuple[Tensor, tuple[int, int]]:
    """x (B, I, H, W) -> what each output pixel sees (B, P, R), R in the order of the kernels; height and width of P"""
    windows = _windows(_padded(x, weight, padding), weight, stride, dilation)  # (B, I, kh, kw, H', W')
    size = windows.shape[4], windows.shape[5]
    if rows_are_pixels(x, weight):
        return windows.permute(0, 4, 5, 2, 3, 1).reshape(len(x), size[0] * size[1], -1), size
    return windows.reshape(len(x), -1, size[0] * size[1]).mT, size


def sum_patches(grad_patches, x, weight, stride, padding, dilation) -> Tensor:
    """Adjoint of `patches_of`: (B, P, R) -> (B, I, H, W)"""
    grad_padded = torch.zeros_like(_padded(x, weight, padding))
    windows = _windows(grad_padded, weight, stride, dilation)
    B, I, kh, kw, height, width = windows.shape
    if rows_are_pixels(x, weight):
        parts = grad_patches.reshape(B, height, width, kh, kw, I).permute(0, 5, 3, 4, 1, 2)
    else:
        parts = grad_patches.mT.reshape(windows.shape)
    if kh * kw == 1 and list(stride) == [1, 1] and grad_padded.shape == x.shape:
        return parts[:, :, 0, 0]
    for i in range(kh):
        for j in range(kw):
            windows[:, :, i, j] += parts[:, :, i, j]
    return grad_padded[:, :, padding[0]:padding[0] + x.shape[2], padding[1]:padding[1] + x.shape[3]]


def rows_are_pixels(x: Tensor, weight: Tensor) -> bool:
    """Whether the patches are laid out pixel by pixel, as in channels_last, which 1x1 kernels don't tell."""
    return is_channels_last(x if weight.shape[2:] == (1, 1) else weight)


def _padded(x: Tensor, weight: Tensor, padding) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last if rows_are_pixels(x, weight) else torch.contiguous_format)
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x


def _windows(padded: Tensor, weight: Tensor, stride, dilation) -> Tensor:
    """A view (B, I, kh, kw, H', W') of the padded images (B, I, H, W)."""
    size = [
        (padded.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    b, c, h, w = padded.stride()
    return padded.as_strided(
        (*padded.shape[:2], *weight.shape[2:], *size),
        (b, c, dilation[0] * h, dilation[1] * w, stride[0] * h, stride[1] * w), padded.storage_offset(),
    )
