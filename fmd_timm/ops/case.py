"""What a dynamic convolution is asked to do, as one value.

Algorithms say whether they support it, and timings are kept by it. `output_size` is the only place that knows how many
pixels a convolution has.
"""
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def empty_as(x: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor on the device and in the memory format of `x`, and in its dtype unless one is given."""
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=memory_format(x))


class Attention(NamedTuple):
    """The factors of each image; None is 1 everywhere."""
    kernel_attn: Tensor | None  # (B, K); None for a single kernel
    in_attn: Tensor | None = None  # (B, I)
    out_attn: Tensor | None = None  # (B, O)
    tap_attn: Tensor | None = None  # (B, kh * kw)


Gradients = tuple[Tensor, Tensor, Attention]  # of x, weight and what the attention has


class Case(NamedTuple):
    """Sizes, dtypes and memory formats of one dynamic convolution; pairs are (vertical, horizontal), in pixels."""
    batch: int  # B
    num_kernels: int  # K
    in_channels: int  # I
    out_channels: int  # O
    groups: int
    image_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: torch.dtype  # of the images and the result
    weight_dtype: torch.dtype  # in which the kernels are mixed, as is the attention; integers are mixed in `dtype`
    channels_last: bool  # the images, and the result
    weight_channels_last: bool
    has_in_attn: bool
    has_out_attn: bool
    has_tap_attn: bool
    device: torch.device

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        return tuple(map(output_size, self.image_size, self.kernel_size, self.stride, self.padding, self.dilation))

    @property
    def out_pixels(self) -> int:
        height, width = self.output_size
        return height * width

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a product of two matrices for each image: every pixel is seen once, by a kernel of one tap."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    @property
    def kernel_numel(self) -> int:
        """Weights of one of the K kernels."""
        return self.out_channels * self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]

    @property
    def image_numel(self) -> int:
        """Numbers of one image."""
        return self.in_channels * self.image_size[0] * self.image_size[1]


def output_size(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels of a convolution's result in one dimension."""
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def case_of(x: Tensor, weight: Tensor, attention: Attention, stride, padding, dilation, groups: int) -> Case:
    """The case of images x (B, I, H, W) and kernels (K * O, I / groups, kh, kw), whose shapes were checked."""
    kernel_attn, in_attn, out_attn, tap_attn = attention
    B, I, H, W = x.shape
    rows, _, kh, kw = weight.shape
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    return Case(
        B, K, I, rows // K, groups, (H, W), (kh, kw), tuple(stride), tuple(padding), tuple(dilation), x.dtype,
        weight.dtype, is_channels_last(x), is_channels_last(weight),
        in_attn is not None, out_attn is not None, tap_attn is not None, x.device)


@lru_cache(maxsize=1024)  # a network has few sizes
def used_taps(size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[slice, int, int, int]:
    """In one dimension, the taps that meet the image at all, and stride, padding and dilation to convolve with these.

    Of the 3x3 kernels of the last stage for tiny images, only the middle does: the rest sees zeros. A result of one
    pixel needs no stride, a kernel of one tap no dilation.
    """
    count = output_size(size, taps, stride, padding, dilation)
    under = range(-padding, taps * dilation - padding, dilation)  # the pixel under each tap for the first result
    meeting = [tap for tap, pixel in enumerate(under) if -(count - 1) * stride <= pixel < size]
    first, last = (meeting[0], meeting[-1]) if meeting else (0, taps - 1)
    cropped = padding - first * dilation
    if cropped < 0 or output_size(size, last - first + 1, stride, cropped, dilation) != count:
        first, last, cropped = 0, taps - 1, padding
    # The smallest stride with the same result: algorithms multiply it with sizes.
    is_dense = output_size(size, last - first + 1, 1, cropped, dilation) == count
    stride = 1 if is_dense else min(stride, size + 2 * padding)
    return slice(first, last + 1), stride, cropped, 1 if first == last else dilation
