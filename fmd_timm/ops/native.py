"""Attention and dynamic convolution of a single image on the CPU for inference, in C.

A single image pays for reading K kernels where a static convolution reads one, and matrix products by PyTorch can't do
anything else meanwhile. `native.c` fetches the next kernels while it multiplies by the last ones, and has no
intermediate results. It is compiled for this machine, by its own C compiler, when it is first needed, and kept in the
user's cache folder ($XDG_CACHE_HOME/fmd_timm, by default ~/.cache/fmd_timm); where that is not possible, `prepared.py`
and PyTorch do the same.
"""
import contextlib
import ctypes
import hashlib
import logging
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['attend', 'blocked', 'forward', 'is_available', 'takes']

_logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix('.c')
FLAGS = '-O3', '-march=native', '-std=gnu11', '-fPIC', '-shared', '-fopenmp'  # PyTorch's own libgomp, loaded already
LIBRARIES = '-lm',
O_BLOCK, WIDTH = 32, 16  # output channels of a block and the widest vector of native.c

_Pair = ctypes.c_long * 2


class _Linear(ctypes.Structure):
    _fields_ = [
        ('weight', ctypes.c_void_p), ('bias', ctypes.c_void_p), ('outputs', ctypes.c_long), ('inputs', ctypes.c_long)]


class _Attention(ctypes.Structure):
    _fields_ = [
        ('x', ctypes.c_void_p),
        *((name, _Linear) for name in ('squeeze', 'gates', 'kernel')),
        *((name, ctypes.c_void_p) for name in ('pooled', 'squeezed', 'gate', 'share')),
        *((name, ctypes.c_long) for name in ('height', 'width', 'in_channels', 'competes', 'threads')),
    ]


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            'x', 'bank', 'share', 'in_attn', 'out_attn', 'shift', 'padded', 'y')),
        *((name, ctypes.c_long) for name in ('height', 'width', 'in_channels', 'out_channels', 'kernels')),
        *((name, _Pair) for name in ('taps', 'stride', 'padding', 'dilation', 'out_size')),
        *((name, ctypes.c_long) for name in ('rows', 'columns', 'threads')),
    ]


def takes(weight: Tensor, num_kernels: int) -> bool:
    """Whether kernels (K * O, I, kh, kw) are of a form that `forward` takes."""
    return (
        weight.dtype == torch.float32 and weight.device.type == 'cpu' and weight.shape[1] % WIDTH == 0
        and weight.shape[0] // num_kernels % O_BLOCK == 0
    )


def blocked(weight: Tensor, num_kernels: int) -> Tensor:
    """The K kernels (K * O, I, kh, kw) as they are read, a bank (O / O_BLOCK, R, K, O_BLOCK)"""
    rows = weight.permute(0, 2, 3, 1).reshape(num_kernels, -1, O_BLOCK, weight[0].numel()).permute(1, 3, 0, 2)
    # A kernel of 9 MB in pages of 4 KB takes a third longer to read.
    memory = mmap.mmap(-1, weight.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # kernels of Linux without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=weight.dtype).view(rows.shape).copy_(rows)


def attend(
        x: Tensor,
        squeeze: tuple[Tensor, Tensor] | None,
        gates: tuple[Tensor, Tensor] | None,
        kernel: tuple[Tensor, Tensor],
        competes: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shares of the kernels (1, K) and gates (1, G) for one image (1, I, H, W), all float32.

    Weights (out, in) and biases are those of `FoldedAttention`. `gates` are of the first of the squeezed features as
    far as their weight goes, `kernel` of the last; both are of the pooled image where there is no squeeze.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    _, I, H, W = x.shape
    maps = [_Linear() if pair is None else _Linear(*(t.data_ptr() for t in pair), *pair[0].shape)
            for pair in (squeeze, gates, kernel)]
    pooled, squeezed, gate, share = x.new_empty(1, I + sum(m.outputs for m in maps)).split(
        [I, *(m.outputs for m in maps)], 1)
    _library().fmd_timm_attend(ctypes.byref(_Attention(
        x.data_ptr(), *maps, *(t.data_ptr() for t in (pooled, squeezed, gate, share)), H, W, I, competes,
        torch.get_num_threads(),
    )))
    return share, None if gates is None else gate


def forward(x, bank, kernel_size, kernel_attn, in_attn, out_attn, shift, stride, padding, dilation) -> Tensor:
    """`fmd_timm.ops.dynamic_conv2d` of one image with groups = 1, with a shift (O,) added in the end if there is one.

    `bank` is `blocked(weight, K)`; all are float32. The result is channels_last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    blocks, R, K, _ = bank.shape
    (_, I, H, W), O = x.shape, blocks * O_BLOCK
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    rows = (height - 1) * stride[0] + (kernel_size[0] - 1) * dilation[0] + 1
    columns = width + (kernel_size[1] - 1) * dilation[1] // stride[1]
    y = x.new_empty(1, height, width, O)
    padded = x.new_empty(rows * I * stride[1] * columns)
    tensors = x, bank, kernel_attn, in_attn, out_attn, shift, padded, y
    _library().fmd_timm_convolve(ctypes.byref(_Conv(
        *(None if t is None else t.data_ptr() for t in tensors), H, W, I, O, K,
        _Pair(*kernel_size), _Pair(*stride), _Pair(*padding), _Pair(*dilation), _Pair(height, width),
        rows, columns, torch.get_num_threads(),
    )))
    return y.permute(0, 3, 1, 2)


@cache
def is_available() -> bool:
    """Whether it can be compiled here and computes what it should; takes some seconds the first time on a machine."""
    if sys.platform != 'linux' or _library() is None:
        return False
    x = torch.arange(32 * 25.).reshape(1, 32, 5, 5).sin()
    weight = torch.arange(64 * 32 * 9.).reshape(64, 32, 3, 3).cos()
    share = torch.tensor([[0.3, 0.7]])
    y = forward(x, blocked(weight, 2), (3, 3), share, None, None, None, (1, 1), (1, 1), (1, 1))
    return torch.allclose(y, F.conv2d(x, 0.3 * weight[:32] + 0.7 * weight[32:], padding=1), rtol=1e-4, atol=1e-4)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody is at home
        _logger.info(f'single images are convolved without {SOURCE.name}, which could not be compiled: {error}')
        return None


def _compiled() -> Path:
    """The library, compiled if it isn't yet for this source, compiler and processor."""
    compiler = os.environ.get('CC') or shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')
    if not compiler:
        raise OSError('there is no C compiler')
    processor = Path('/proc/cpuinfo').read_text().split('\n\n')[0]
    processor = ''.join(line for line in processor.splitlines() if not line.startswith(('cpu MHz', 'bogomips')))
    key = hashlib.sha256('\n'.join((SOURCE.read_text(), compiler, *FLAGS, *LIBRARIES, processor)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'fmd_timm'
    library = folder / f'native-{key}.so'
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished, library.name)
            subprocess.run([compiler, *FLAGS, SOURCE, '-o', made, *LIBRARIES], check=True, capture_output=True, timeout=120)
            made.rename(library)
    return library
