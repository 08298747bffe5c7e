"""Dynamic convolution on the CPU in C; in a prepared network together with its attention.

A single image pays for reading K kernels where a static convolution reads one, and matrix products by PyTorch can't do
anything else meanwhile. `c_conv.c` fetches the next kernels while it multiplies by the last ones. Images of a batch pay
for mixing: here it goes from cache to cache, and nothing but the result is written to memory. So do the gradients of
each image's kernel, which are added to those of the K kernels and of the attention at once. `c_library.py` compiles it;
where that is not possible, other algorithms do the same.
"""
import contextlib
import math
import mmap
from ctypes import addressof
from functools import lru_cache

import torch
from torch import Tensor

from .c_library import Backward, Call, Conv, Linear, Maps, library
from .cache import cache_bytes
from .case import Attention, Case, Gradients, output_size
from .layout import attention_gradients

__all__ = ['Layer', 'backward', 'differentiates', 'forward', 'is_available', 'supports', 'takes']

O_BLOCK, WIDTH = 32, 16  # output channels of a block and floats of the widest vector in c_conv.c
SQUARE, MAX_KERNELS = 16, 32  # input channels at a time and most kernels of a backward pass there
DTYPES = torch.float32, torch.int16, torch.int8  # of kernels
SMALL = 2**20  # numbers of a padded image that any machine has room for

Map = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)


def is_available() -> bool:
    """Whether this machine has the library; takes a second or two when it is compiled, once per machine."""
    return library() is not None


def supports(case: Case) -> bool:
    """Whether C computes it, from images and kernels as they lie in memory; integers as kernels in a `Layer` alone."""
    return (
        case.device.type == 'cpu' and case.dtype == torch.float32 and case.weight_dtype in DTYPES and case.groups == 1
        and _fits(case.num_kernels, case.in_channels, case.out_channels)
        and (case.channels_last or case.image_size == (1, 1))
        and (case.weight_channels_last or case.kernel_size == (1, 1))
        and _conv_of(case) is not None and is_available()
    )


def differentiates(case: Case) -> bool:
    """Whether C computes the gradients, too: input channels are the output channels of the images' gradient."""
    return case.in_channels % O_BLOCK == 0 and case.num_kernels <= MAX_KERNELS and supports(case)


def takes(weight: Tensor, num_kernels: int, groups: int) -> bool:
    """Whether a `Layer` convolves by kernels (K * O, I / groups, kh, kw)."""
    if weight.device.type != 'cpu' or weight.dtype not in DTYPES:
        return False
    if groups > 1:
        return _is_depthwise(weight, num_kernels, groups) and weight.dtype == torch.float32
    return _fits(num_kernels, weight.shape[1], len(weight) // num_kernels)


def _is_depthwise(weight: Tensor, num_kernels: int, groups: int) -> bool:
    return groups > 1 and weight.shape[1] == 1 and len(weight) == num_kernels * groups


def _fits(num_kernels: int, in_channels: int, out_channels: int) -> bool:
    return num_kernels > 1 and in_channels % WIDTH == 0 and out_channels % O_BLOCK == 0


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W'), channels_last, for images x (B, I, H, W) and kernels (K * O, I, kh, kw)."""
    assert weight.dtype == torch.float32
    conv = _conv_of(case)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    y, padded = x.new_empty(case.batch, *conv.out_size, case.out_channels), _padded(x, conv)
    kernel_attn, *gates = map(_start, attention)
    library().fmd_timm_run(Call(
        conv=addressof(conv), x=_start(x), weight=_start(weight), kernel_attn=kernel_attn, gates=tuple(gates),
        padded=_start(padded), y=_start(y), batch=case.batch, threads=torch.get_num_threads()))
    return y.permute(0, 3, 1, 2)


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None."""
    conv, threads = _conv_of(case), torch.get_num_threads()
    B, K, I, O, (height, width) = case.batch, case.num_kernels, case.in_channels, case.out_channels, case.image_size
    grad_y, x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (grad_y, x, weight))
    kernel_attn, in_attn, _, tap_attn = attention
    chunks = min(math.ceil(4 * threads / (O // O_BLOCK)), I // SQUARE)  # four pieces of work for a thread
    products = x.new_zeros(chunks, 1 if tap_attn is None else tap_attn.shape[1], B, K, O)
    grad_x, grad_weight = x.new_empty(B, height, width, I), torch.empty_like(weight)
    grad_in_attn = None if in_attn is None else torch.empty_like(in_attn)
    columns = math.ceil(width / case.stride[1]) * case.stride[1]
    of_x, of_y = x.new_empty(B * height * columns * I), torch.empty_like(grad_y)
    library().fmd_timm_backward(Backward(
        addressof(conv), *map(_start, (x, weight, grad_y, kernel_attn)), tuple(map(_start, attention[1:])),
        *map(_start, (grad_x, grad_weight, grad_in_attn, products, of_x, of_y)), B, threads, chunks))
    gradients = attention_gradients(products.sum(0), attention)
    return grad_x.permute(0, 3, 1, 2), grad_weight, gradients._replace(in_attn=grad_in_attn)


class Layer:
    """Attention and dynamic convolution of float32 images (B, I, H, W), with more than one kernel.

    Its first arguments are those of `fmd_timm.layers.folded.FoldedAttention`: `gates` sees as many of the first of the
    squeezed features as it has inputs, and `kernel` of the last. Tensors must not be changed.

    Args:
        in_channels: I.
        weight: The kernels (K * O, I / groups, kh, kw).
        convolves: Whether it is to convolve, too (see `takes`), for which it may need a copy of the kernels.
        scale: What kernels of int16 or int8 are multiplied with (O,); None for those of float32.
        shift: Added in the end (O,), or None.
        stride: Vertical and horizontal, as are `padding` and `dilation`.

    Raises:
        ValueError: Images given to it are not float32 on the CPU, have another shape, or are of a size that C doesn't
            convolve (see `supports`).
    """

    def __init__(
            self, squeeze: Map | None, gates: Map | None, kernel: Map, competes: bool, gate_sizes: list[int],
            in_channels: int, weight: Tensor, convolves: bool, scale: Tensor | None, shift: Tensor | None,
            stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    ):
        # Aliases: their memory stays even if a parameter is given another.
        squeeze, gates, kernel = (
            None if pair is None else [t.detach().float().contiguous() for t in pair]
            for pair in (squeeze, gates, kernel))
        of_gates = [None] * 3 if gates is None else zip(*(t.split(gate_sizes) for t in gates))
        self.maps = Maps(_linear(squeeze), tuple(map(_linear, of_gates)), _linear(kernel), competes)
        self.tensors = squeeze, gates, kernel  # as long as `maps` points into them
        num_kernels, groups, kernel_size = len(kernel[1]), in_channels // weight.shape[1], tuple(weight.shape[2:])
        weight, self.convolves = weight.detach(), convolves
        self.is_depthwise = _is_depthwise(weight, num_kernels, groups)
        if self.is_depthwise:  # side by side, the weights of all channels under a tap
            assert not gate_sizes[1]
            weight, groups = weight.reshape(num_kernels, in_channels, *kernel_size), 1
        weight = weight.contiguous(memory_format=torch.channels_last)
        self.scale, self.shift = (None if t is None else t.detach().float().contiguous() for t in (scale, shift))
        self.mixes, self.weight = weight.dtype == torch.float32, weight
        self.bank = _bank(weight, num_kernels) if convolves and not self.is_depthwise else None
        self.starts = [*map(_start, (weight, self.bank, self.scale, self.shift))]
        out_channels = len(weight) // num_kernels
        self.sizes = in_channels, out_channels, num_kernels, kernel_size, *map(tuple, (stride, padding, dilation))
        self.groups, self.kernel_shape = groups, (out_channels, *kernel_size, weight.shape[1])
        # Whose kernels should be mixed before they are used: so many that these stay in a cache.
        self.images_at_once = max(10 * cache_bytes() // (4 * math.prod(self.kernel_shape)), 1)
        # Numbers for each image: the attention, the means of the channels, the squeezed features.
        self.parts = [num_kernels, *gate_sizes, in_channels, self.maps.squeeze.outputs]

    def __call__(self, x: Tensor) -> Tensor:
        """The result of attention and convolution (B, O, H', W'), channels_last. Only of a layer that convolves."""
        assert self.convolves
        x = self._checked(x)
        if self.is_depthwise:
            conv = self._conv(x)
            y = x.new_empty(len(x), *conv.out_size, conv.in_channels)
            self._run(conv, x, self._memory(x), y=y, kernels=x.new_empty(len(x), *self.kernel_shape))
            return y.permute(0, 3, 1, 2)
        conv = _conv(*self.sizes, tuple(x.shape[2:]))
        if conv is None:
            *_, kernel_size, stride, padding, dilation = self.sizes
            raise ValueError(
                f'x of {x.shape[2]}x{x.shape[3]} pixels can not be convolved in C by {kernel_size[0]}x{kernel_size[1]} '
                f'taps with stride={stride}, padding={padding}, dilation={dilation}')
        y = x.new_empty(len(x), *conv.out_size, conv.out_channels)
        self._run(conv, x, self._memory(x), _padded(x, conv), y)
        return y.permute(0, 3, 1, 2)

    def mixed(self, x: Tensor) -> Tensor:
        """The kernel of each image with all of its attention (B, O, I / groups, kh, kw), channels_last.

        Not of kernels that are integers.
        """
        assert self.mixes
        x = self._checked(x)
        kernels = x.new_empty(len(x), *self.kernel_shape)
        self._run(self._conv(x), x, self._memory(x), kernels=kernels)
        return kernels.permute(0, 4, 1, 2, 3) if self.is_depthwise else kernels.permute(0, 1, 4, 2, 3)

    def attend(self, x: Tensor) -> Attention:
        """The attention of the images."""
        x = self._checked(x)
        memory, B = self._memory(x), len(x)
        self._run(self._conv(x), x, memory)
        parts = zip(self.parts[:4], memory.split([B * size for size in self.parts]))
        return Attention(*(part.view(B, size) if size else None for size, part in parts))

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.sizes[0] or x.dtype != torch.float32 or x.device.type != 'cpu':
            raise ValueError(f'x must have shape (B, {self.sizes[0]}, H, W) and be float32 on the CPU, got '
                             f'{tuple(x.shape)}, {x.dtype} on {x.device}')
        return x.contiguous(memory_format=torch.channels_last)

    def _conv(self, x: Tensor) -> Conv:
        """The sizes for the attention and the kernels of all images at once."""
        size = tuple(x.shape[2:])
        out_size = tuple(map(output_size, size, *self.sizes[3:]))
        return Conv(*self.sizes, size, out_size, group=len(x), groups=self.groups)

    def _memory(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x) * sum(self.parts))

    def _run(self, conv: Conv, x: Tensor, memory: Tensor, padded=None, y=None, kernels=None) -> None:
        library().fmd_timm_run(Call(
            addressof(self.maps), addressof(conv), _start(x), *self.starts, *map(_start, (memory, padded, y, kernels)),
            len(x), torch.get_num_threads()))


def _start(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _linear(pair: Map | None) -> Linear:
    return Linear() if pair is None else Linear(*(t.data_ptr() for t in pair), *pair[0].shape)


def _padded(x: Tensor, conv: Conv) -> Tensor:
    """Memory for the padded images of a group."""
    return x.new_empty(min(conv.group, len(x)) * conv.padded)


def _conv_of(case: Case) -> Conv | None:
    return _conv(
        case.in_channels, case.out_channels, case.num_kernels, case.kernel_size, case.stride, case.padding,
        case.dilation, case.image_size)


@lru_cache(maxsize=1024)  # a network has few sizes
def _conv(
        in_channels: int, out_channels: int, num_kernels: int, kernel_size: tuple[int, int], stride: tuple[int, int],
        padding: tuple[int, int], dilation: tuple[int, int], image_size: tuple[int, int],
) -> Conv | None:
    """The sizes for c_conv.c; None without a pixel to compute, and where padded images would be out of all proportion.

    Those have every pixel between the first and the last that meet a tap, also where a stride leaves most of them out.
    """
    out_size = tuple(map(output_size, image_size, kernel_size, stride, padding, dilation))
    if min(*out_size, *image_size) < 1:
        return None
    rows = (out_size[0] - 1) * stride[0] + (kernel_size[0] - 1) * dilation[0] + 1
    columns = out_size[1] + (kernel_size[1] - 1) * dilation[1] // stride[1]
    padded = in_channels * rows * stride[1] * columns
    image, result = in_channels * math.prod(image_size), out_channels * math.prod(out_size)
    if padded > max(16 * (image + result), SMALL):
        return None
    cache = cache_bytes() // 4  # numbers
    return Conv(
        in_channels, out_channels, num_kernels, kernel_size, stride, padding, dilation, image_size, out_size,
        rows, columns, padded, group=max(cache // padded, 1), chunk=cache // 2)


def _bank(weight: Tensor, num_kernels: int) -> Tensor:
    """The K kernels (K * O, I, kh, kw) as they are read: a bank (O / O_BLOCK, kh * kw * I, K, O_BLOCK)"""
    rows = weight.permute(0, 2, 3, 1).reshape(num_kernels, -1, O_BLOCK, weight[0].numel()).permute(1, 3, 0, 2)
    dtype = torch.float32 if weight.is_floating_point() else torch.int16
    if dtype == torch.int16:
        rows = rows.unflatten(3, (2, -1)).mT  # the two halves of a block are the two halves of 32 bits
    memory = mmap.mmap(-1, dtype.itemsize * weight.numel(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux without huge pages, by which ResNet-18 takes 1 to 2 % longer
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(rows.shape).copy_(rows)
