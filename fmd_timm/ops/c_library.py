"""`c_conv.c` as a library of this machine: compiled when it is first needed, tested, kept and checked.

The library is kept in $XDG_CACHE_HOME/fmd_timm, by default ~/.cache/fmd_timm, which must belong to the user alone. Its
name tells what it was compiled from and the hash of what is in it, so that a cut or foreign file is compiled anew, not
loaded. A new library is tested in a process of its own before it gets its name. Where it can't be kept, each process
compiles its own; where it can't be compiled, there is none. Both are said in a warning.

This file is run as a script for the test: it imports nothing but Python's own modules.
"""
import ctypes
import functools
import hashlib
import itertools
import math
import operator
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

__all__ = ['Backward', 'Call', 'Conv', 'Linear', 'Maps', 'library']

SOURCE = Path(__file__).with_name('c_conv.c')
FLAGS = '-O3', '-march=native', '-std=gnu11', '-fPIC', '-shared'
OPENMP = ('-fopenmp',), ()  # with threads where the compiler has them (GCC: PyTorch's own libgomp, loaded already)
MACHINES = 'x86_64', 'aarch64'
# Of the test, by `reference.py` in float64: the result times its gradient, summed up, without and with a shift; the
# kernel of each image times one of the K, summed up; as the second, of a depthwise convolution.
EXPECTED = 1003.5762, 1023.2305, 132.3362, 11.2201315

_lock = threading.Lock()


def _fields(kind, names: str) -> list:
    return [(name, kind) for name in names.split()]


# The structures of c_conv.c, which says what is in them.
class Linear(ctypes.Structure):
    _fields_ = [*_fields(ctypes.c_void_p, 'weight bias'), *_fields(ctypes.c_long, 'outputs inputs')]


class Maps(ctypes.Structure):
    _fields_ = [('squeeze', Linear), ('gates', Linear * 3), ('kernel', Linear), ('has_softmax', ctypes.c_long)]


class Conv(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_long, 'in_channels out_channels num_kernels'),
        *_fields(ctypes.c_long * 2, 'taps stride padding dilation in_size out_size'),
        *_fields(ctypes.c_long, 'rows columns padded group chunk groups')]


class Call(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, 'maps conv x weight bank scale shift memory padded y kernels'),
        *_fields(ctypes.c_long, 'batch threads'), ('kernel_attn', ctypes.c_void_p), ('gates', ctypes.c_void_p * 3),
        *_fields(ctypes.c_void_p, 'pooled squeezed')]


class Backward(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, 'conv x weight grad_y kernel_attn'), ('gates', ctypes.c_void_p * 3),
        *_fields(ctypes.c_void_p, 'grad_x grad_weight grad_in_attn products of_x of_y'),
        *_fields(ctypes.c_long, 'batch threads chunks')]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None where it is slower without a word (not Linux, another processor) or with a warning."""
    # In a frozen application `sys.executable` is the application, which the test would start again.
    if sys.platform != 'linux' or platform.machine() not in MACHINES or getattr(sys, 'frozen', False):
        return None
    with _lock:
        return _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return _kept(_cache_folder())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = error
    try:
        with tempfile.TemporaryDirectory(prefix='fmd_timm-') as folder:
            loaded = _load(_compiled(Path(folder)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reasons = '; '.join(dict.fromkeys((str(reason), str(error))))
        warnings.warn(f'dynamic convolutions take longer here, without {SOURCE.name}: {reasons}', stacklevel=3)
        return None
    warnings.warn(f'{SOURCE.name} is compiled by every process, since it can not be kept: {reason}', stacklevel=3)
    return loaded


def _cache_folder() -> Path:
    parent = Path(os.environ.get('XDG_CACHE_HOME', ''))
    if not parent.is_absolute():  # to be ignored, says the XDG specification
        parent = Path.home() / '.cache'
    if not parent.is_absolute():
        raise RuntimeError(f'{parent} is not an absolute path')
    folder = parent / 'fmd_timm'
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(folder):
        raise PermissionError(f'{folder} must belong to the user and be writable to nobody else')
    return folder


def _is_private(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _kept(folder: Path) -> ctypes.CDLL:
    """The library in this folder, compiled if it isn't there or damaged."""
    stem = f'c_conv-{_key()}-'
    for file in sorted(folder.glob(f'{stem}*.so')):
        try:
            if file.is_file() and _is_private(file) and file.name == f'{stem}{_hash(file.read_bytes())}.so':
                return _load(file)
        except OSError:  # gone meanwhile, or of another machine that has the same processor and home
            continue
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        made = _compiled(Path(unfinished))
        made.chmod(0o700)
        return _load(made.replace(folder / f'{stem}{_hash(made.read_bytes())}.so'))


def _key() -> str:
    """A hash of what the library is made from: source, compiler and flags, processor."""
    about = 'vendor_id', 'cpu family', 'model', 'stepping', 'flags', 'CPU', 'Features'
    processor = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    processor = [line for line in processor if line.startswith(about)]
    return _hash(repr((SOURCE.read_bytes(), os.environ.get('CC'), FLAGS, processor)).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _load(file: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(file))
    loaded.fmd_timm_run.argtypes, loaded.fmd_timm_run.restype = [ctypes.POINTER(Call)], None
    loaded.fmd_timm_backward.argtypes, loaded.fmd_timm_backward.restype = [ctypes.POINTER(Backward)], None
    return loaded


def _compiled(folder: Path) -> Path:
    """A library in this folder, tested, by the first compiler that can make it: $CC or one of the usual ones."""
    made, words = folder / 'c_conv.so', {}
    compilers = [os.environ.get('CC', ''), *filter(shutil.which, ('cc', 'gcc', 'clang'))]
    for openmp, compiler in itertools.product(OPENMP, filter(str.strip, compilers)):
        try:
            _run([*shlex.split(compiler), *FLAGS, *openmp, str(SOURCE), '-o', str(made), '-lm'], folder)
            _run([sys.executable, '-I', __file__, str(made)], folder)
            return made
        except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:  # ValueError: an open quote
            words[compiler] = f'{compiler}: {error}'
    raise RuntimeError('; '.join(words.values()) or 'there is no C compiler')


def _run(command: list[str], folder: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(folder))
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors='replace', timeout=120,
        env=environment)
    if done.returncode:
        last_lines = ' '.join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f'{subprocess.CalledProcessError(done.returncode, command[0])} {last_lines}')


def _test_inputs() -> tuple[list[ctypes.Array], list[ctypes.Array]]:
    """Images, kernels, a shift and the gradient of the result; weight and bias of the five maps of the attention."""
    I = O = 32
    count = itertools.count()

    def arrays(*sizes: int) -> list[ctypes.Array]:
        return [(ctypes.c_float * size)(*(math.cos(next(count)) for _ in range(size))) for size in sizes]

    return arrays(24 * I, 27 * O * I, O, 24 * O), arrays(5 * I, 5, 5 * I, I, 5 * O, O, 5 * 9, 9, 5 * 3, 3)


def _self_test(file: str) -> None:
    """Attention, kernels and convolution of two small images, in all layouts of kernels, and their gradients.

    The result is linear in the images and in the kernels: each of them times its gradient is the result times its own.
    """
    B, K, I, O, H, W, hidden, taps = 2, 3, 32, 32, 3, 4, 5, 9
    tested, ((x, weight, shift, grad_y), linear) = _load(Path(file)), _test_inputs()

    def laid_out(channels: Sequence[int]) -> list[float]:
        rows = itertools.product(range(taps), range(I), range(K), channels)
        return [weight[((k * O + o) * taps + t) * I + i] for t, i, k, o in rows]

    bank = type(weight)(*laid_out(range(O)))
    paired = laid_out([o for pair in zip(range(16), range(16, O)) for o in pair])
    integers, scale = (ctypes.c_int16 * len(bank))(*(round(2**14 * w) for w in paired)), type(shift)(*[2**-14] * O)
    squeeze, *gates, kernel = (
        Linear(*map(ctypes.addressof, pair), len(pair[1]), len(pair[0]) // len(pair[1]))
        for pair in zip(linear[::2], linear[1::2]))
    maps = Maps(squeeze, tuple(gates), kernel, True)
    conv = Conv(I, O, K, (3, 3), (1, 1), (1, 1), (1, 1), (H, W), (H, W), H + 2, W + 2, (H + 2) * (W + 2) * I, 1, 1)
    of_all = Conv(I, O, K, (3, 3), in_size=(H, W), group=B, groups=1)
    parts = K, I, O, taps, I, hidden
    y, grad_x, grad_weight, grad_in_attn, padded, products, of_x, of_y, kernels, memory, other_memory = (
        (ctypes.c_float * size)() for size in (
            len(grad_y), len(x), len(weight), B * I, conv.padded, taps * B * K * O, len(x), len(grad_y),
            B * O * taps * I, B * sum(parts), B * sum(parts)))

    def check(values: ctypes.Array, gradient: ctypes.Array, expected: float, message: str) -> None:
        if not math.isclose(math.fsum(map(operator.mul, values, gradient)), expected, rel_tol=1e-4):
            sys.exit(message)

    kernel_attn, *attn = itertools.accumulate((4 * B * n for n in parts[:3]), initial=ctypes.addressof(memory))
    pointers = dict(conv=conv, x=x, padded=padded, memory=other_memory, y=y)
    of_layer = dict(maps=maps, bank=bank, shift=shift), dict(maps=maps, bank=integers, scale=scale, shift=shift)
    mixing = dict(conv=of_all, x=x, maps=maps, weight=weight, memory=memory, kernels=kernels, y=None)
    for more in mixing, *of_layer, dict(weight=weight), dict(weight=weight, shift=shift):
        tested.fmd_timm_run(Call(
            **{name: ctypes.addressof(t) for name, t in {**pointers, **more}.items() if t}, kernel_attn=kernel_attn,
            gates=tuple(attn), batch=B, threads=2))
        found = (kernels, weight, EXPECTED[2]) if more is mixing else (y, grad_y, EXPECTED['shift' in more])
        check(*found, 'it computes something else than it should')
    depthwise = Conv(I, 1, K, (3, 3), (1, 1), (1, 1), (1, 1), (H, W), (H, W), group=B, groups=1)
    maps.gates[1] = Linear()
    pointers.update(maps=maps, conv=depthwise, weight=weight, shift=shift, kernels=kernels)
    tested.fmd_timm_run(Call(**{name: ctypes.addressof(t) for name, t in pointers.items()}, batch=B, threads=2))
    check(y, grad_y, EXPECTED[3], 'it computes something else than it should')
    tensors = map(ctypes.addressof, (conv, x, weight, grad_y))
    gradients = map(ctypes.addressof, (grad_x, grad_weight, grad_in_attn, products, of_x, of_y))
    tested.fmd_timm_backward(Backward(*tensors, kernel_attn, tuple(attn), *gradients, batch=B, threads=2, chunks=1))
    for values, gradient in (x, grad_x), (weight, grad_weight):
        check(values, gradient, EXPECTED[0], 'its gradients are others than they should be')


if __name__ == '__main__':
    _self_test(sys.argv[1])
