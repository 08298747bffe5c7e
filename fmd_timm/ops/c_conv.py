"""Dynamic convolution on the CPU in C; of a single image in a prepared network together with its attention.

A single image pays for reading K kernels where a static convolution reads one, and matrix products by PyTorch can't do
anything else meanwhile. `c_conv.c` fetches the next kernels while it multiplies by the last ones. Images of a batch pay
for mixing: here it goes from cache to cache, and nothing but the result is written to memory. It is compiled for this
machine, by its own C compiler, when it is first needed, and kept in the user's cache folder ($XDG_CACHE_HOME/fmd_timm,
by default ~/.cache/fmd_timm); where that is not possible, PyTorch does the same.
"""
import contextlib
import ctypes
import hashlib
import logging
import math
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['Layer', 'forward', 'is_available', 'takes']

_logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix('.c')
FLAGS = '-O3', '-march=native', '-std=gnu11', '-fPIC', '-shared', '-fopenmp'  # PyTorch's own libgomp, loaded already
LIBRARIES = '-lm',
O_BLOCK, WIDTH = 32, 16  # output channels of a block and the widest vector of c_conv.c
GROUP_BYTES = 2**20  # of padded images for which kernels are read once: as many as stay in the L2 cache

_Pair = ctypes.c_long * 2


class _Linear(ctypes.Structure):
    _fields_ = [
        ('weight', ctypes.c_void_p), ('bias', ctypes.c_void_p), ('outputs', ctypes.c_long), ('inputs', ctypes.c_long)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in ('squeeze', 'gates', 'kernel')),
        *((name, ctypes.c_long) for name in ('has_softmax', 'has_in_attn', 'has_out_attn', 'has_tap_attn')),
        *((name, ctypes.c_void_p) for name in ('bank', 'shift')),
        *((name, ctypes.c_long) for name in ('in_channels', 'out_channels', 'kernels')),
        *((name, _Pair) for name in ('taps', 'stride', 'padding', 'dilation')),
    ]


def takes(weight: Tensor, num_kernels: int) -> bool:
    """Whether kernels (K * O, I, kh, kw) are of a form that `Layer` takes."""
    return (
        num_kernels > 1 and weight.dtype == torch.float32 and weight.device.type == 'cpu'
        and weight.shape[1] % WIDTH == 0 and weight.shape[0] // num_kernels % O_BLOCK == 0
    )


def supports(case) -> bool:
    return (
        case.dtype == case.weight_dtype == torch.float32 and case.groups == 1 and case.num_kernels > 1
        and case.in_channels % WIDTH == 0 and case.out_channels % O_BLOCK == 0
        and (case.channels_last or case.image_size == (1, 1))
        and max(case.stride) <= 8
        and (case.weight_channels_last or case.kernel_size == (1, 1)) and is_available()
    )


def forward(x, weight, attention, case) -> Tensor:
    weight = weight.contiguous(memory_format=torch.channels_last)
    layer = _without_attention(
        case.in_channels, case.out_channels, case.num_kernels, case.kernel_size, case.stride, case.padding,
        case.dilation)
    return _convolve(layer, x, attention, weight, None)


def _convolve(layer: _Layer, x: Tensor, attention: Iterable[Tensor | None], weight: Tensor | None, shift) -> Tensor:
    """`weight` for a layer without a bank; `shift` (O,) or (B, O)"""
    x = x.contiguous(memory_format=torch.channels_last)
    tensors = [None if t is None else t.to(torch.float32).contiguous() for t in (*attention, shift)]
    B, I, H, W = x.shape
    height, width, padded = _sizes(
        H, W, *(tuple(pair) for pair in (layer.taps, layer.stride, layer.padding, layer.dilation)))
    group = min(max(GROUP_BYTES // (I * padded * x.element_size()), 1), B)
    y, memory = x.new_empty(B, height, width, layer.out_channels), x.new_empty(group * I * padded)
    _library().fmd_timm_convolve(
        layer, x.data_ptr(), H, W, memory.data_ptr(), torch.get_num_threads(), y.data_ptr(), height, width, B, group,
        *(None if t is None else t.data_ptr() for t in (weight, *tensors)),
        0 if shift is None or shift.ndim == 1 else layer.out_channels)
    return y.permute(0, 3, 1, 2)


@lru_cache(maxsize=1024)
def _without_attention(I, O, num_kernels, *pairs) -> _Layer:
    return _Layer(*(_Linear() for _ in range(3)), False, False, False, False, None, None, I, O, num_kernels,
                  *(_Pair(*pair) for pair in pairs))


class Layer:
    """Attention and dynamic convolution of float32 images (B, I, H, W), with groups = 1 and more than one kernel.

    Weights (out, in) and biases of the linear maps, `competes` and `gate_sizes` are those of
    `fmd_timm.layers.attention.FoldedAttention`. All tensors are float32 and must not be changed.

    Args:
        squeeze: Weight and bias, or None.
        gates: Weight and bias of the map of the first of the squeezed features, as far as the weight goes, or None.
        kernel: Weight and bias of the map of the last of them.
        competes: Whether there is a softmax over the kernels.
        gate_sizes: How many of the gates are in_attn, out_attn and tap_attn.
        in_channels: I.
        weight: The kernels (K * O, I, kh, kw), which are copied to be read faster; None for the attention alone.
        shift: Added in the end (O,), or None.
        stride: Vertical and horizontal, as are `padding` and `dilation`.

    Raises:
        ValueError: Images given to it have another number of channels, or are not one where one is expected.
    """

    def __init__(
            self, squeeze, gates, kernel, competes: bool, gate_sizes: list[int],
            in_channels: int, weight: Tensor | None, shift: Tensor | None, stride, padding, dilation,
    ):
        maps = [_Linear() if pair is None else _Linear(*(t.data_ptr() for t in pair), *pair[0].shape)
                for pair in (squeeze, gates, kernel)]
        self.num_kernels, self.gate_sizes = len(kernel[1]), gate_sizes
        self.kernel_size, self.stride, self.padding, self.dilation = (1, 1), stride, padding, dilation
        self.convolves = weight is not None
        bank, self.out_channels = None, 0
        if self.convolves:
            self.kernel_size, self.out_channels = tuple(weight.shape[2:]), len(weight) // self.num_kernels
            bank = _blocked(weight, self.num_kernels)
        self.features = self.num_kernels + maps[1].outputs + in_channels + maps[0].outputs
        self.layer = _Layer(
            *maps, competes, *(size > 0 for size in gate_sizes),
            *(None if t is None else t.data_ptr() for t in (bank, shift)),
            in_channels, self.out_channels, self.num_kernels,
            *(_Pair(*pair) for pair in (self.kernel_size, stride, padding, dilation)))
        self.tensors = squeeze, gates, kernel, bank  # as long as `layer` points into them
        self.shift = shift

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """kernel_attn, in_attn, out_attn and tap_attn of `fmd_timm.ops.dynamic_conv2d` for one image"""
        x = self._checked(x)
        memory = x.new_empty(1, self.features)
        _library().fmd_timm_attend(
            ctypes.byref(self.layer), x.data_ptr(), *x.shape[2:], memory.data_ptr(), torch.get_num_threads())
        kernel_attn, *gates, _ = memory.split(
            [self.num_kernels, *self.gate_sizes, self.features - self.num_kernels - sum(self.gate_sizes)], 1)
        return kernel_attn, *(gate if size else None for gate, size in zip(gates, self.gate_sizes))

    def __call__(self, x: Tensor) -> Tensor:
        """The result of attention and convolution for one image (1, O, H', W'), channels_last."""
        x = self._checked(x)
        _, I, H, W = x.shape
        height, width, padded = _sizes(H, W, self.kernel_size, self.stride, self.padding, self.dilation)
        y = x.new_empty(1, height, width, self.out_channels)
        memory = x.new_empty(self.features + I * padded)
        _library().fmd_timm_forward(
            ctypes.byref(self.layer), x.data_ptr(), H, W, memory.data_ptr(), torch.get_num_threads(),
            y.data_ptr(), height, width)
        return y.permute(0, 3, 1, 2)

    def convolve(self, x: Tensor, *attention: Tensor | None) -> Tensor:
        """The same for more images (B, O, H', W'), whose attention is given as in `attend`."""
        if x.shape[1] != self.layer.in_channels:
            raise ValueError(f'x must have shape (B, {self.layer.in_channels}, H, W), got {tuple(x.shape)}')
        return _convolve(self.layer, x, attention, None, self.shift)

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[:2] != (1, self.layer.in_channels):
            raise ValueError(f'x must have shape (1, {self.layer.in_channels}, H, W), got {tuple(x.shape)}')
        return x.contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=1024)
def _sizes(H, W, kernel_size, stride, padding, dilation) -> tuple[int, int, int]:
    """Height and width of the result; pixels of the padded image, as c_conv.c arranges them."""
    height, width = (
        (size + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i, size in enumerate((H, W)))
    rows = (height - 1) * stride[0] + (kernel_size[0] - 1) * dilation[0] + 1
    return height, width, rows * stride[1] * (width + (kernel_size[1] - 1) * dilation[1] // stride[1])


def _blocked(weight: Tensor, num_kernels: int) -> Tensor:
    """The K kernels (K * O, I, kh, kw) as they are read, a bank (O / O_BLOCK, R, K, O_BLOCK)"""
    rows = weight.permute(0, 2, 3, 1).reshape(num_kernels, -1, O_BLOCK, weight[0].numel()).permute(1, 3, 0, 2)
    memory = mmap.mmap(-1, weight.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a Linux without huge pages, by which ResNet-18 takes 1 to 2 % longer
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=weight.dtype).view(rows.shape).copy_(rows)


@cache
def is_available() -> bool:
    """Whether it can be compiled here and computes what it should; takes some seconds the first time on a machine."""
    if sys.platform != 'linux' or _library() is None:
        return False

    def numbers(*shape: int) -> Tensor:
        return torch.arange(math.prod(shape), dtype=torch.float32, device='cpu').reshape(shape).cos()

    x, weight, kernel = numbers(1, 32, 5, 5), numbers(64, 32, 3, 3), (numbers(2, 32), numbers(2))
    layer = Layer(None, None, kernel, True, [0, 0, 0], 32, weight, None, (1, 1), (1, 1), (1, 1))
    share = F.linear(x.mean((2, 3)), *kernel).softmax(1)
    expected = F.conv2d(x, share[0, 0] * weight[:32] + share[0, 1] * weight[32:], padding=1)
    return all(torch.allclose(y, expected, rtol=1e-4, atol=1e-4) for y in (layer(x),))


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody is at home
        _logger.info(f'single images are convolved without {SOURCE.name}, which could not be compiled: {error}')
        return None
    of_image = ctypes.POINTER(_Layer), ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long
    library.fmd_timm_attend.argtypes = of_image
    library.fmd_timm_forward.argtypes = *of_image, ctypes.c_void_p, ctypes.c_long, ctypes.c_long
    library.fmd_timm_convolve.argtypes = (
        *library.fmd_timm_forward.argtypes, *[ctypes.c_long] * 2, *[ctypes.c_void_p] * 6, ctypes.c_long)
    for function in library.fmd_timm_attend, library.fmd_timm_forward, library.fmd_timm_convolve:
        function.restype = None
    return library


def _compiled() -> Path:
    """The library, compiled if it isn't yet for this source, compiler and processor."""
    compiler = os.environ.get('CC') or shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
    if not compiler:
        raise OSError('there is no C compiler')
    processor = Path('/proc/cpuinfo').read_text().split('\n\n')[0]
    processor = ''.join(line for line in processor.splitlines() if not line.startswith(('cpu MHz', 'bogomips')))
    what = '\n'.join((SOURCE.read_text(), compiler, *FLAGS, *LIBRARIES, processor))
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'fmd_timm'
    library = folder / f'native-{key}.so'
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished, library.name)
            command = [compiler, *FLAGS, SOURCE, '-o', made, *LIBRARIES]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.rename(library)
    return library
