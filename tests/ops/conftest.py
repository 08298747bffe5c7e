"""c_conv.c by every compiler, with vectors of every width, plain and with sanitizers: for tests of both directions."""
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fmd_timm.ops import c_library

VECTORS = {  # flags of the compiler, and what /proc/cpuinfo must have
    'native': ('-march=native', ''), 'avx2': ('-mavx2 -mfma', ' avx2 '), 'sse2': ('-msse2', ' sse2 ')}
SANITIZERS = {  # flags, and what must be loaded before Python for them
    'gcc': ('-fsanitize=address,undefined -fno-sanitize-recover=all', ['libasan.so', 'libubsan.so']),
    'clang': ('-fsanitize=address,undefined -fno-sanitize-recover=all -shared-libsan', [
        f'libclang_rt.asan-{platform.machine()}.so'])}


@pytest.fixture(params=[False, True], ids=['', 'sanitized'])
def is_sanitized(request):
    return request.param


@pytest.fixture(params=VECTORS)
def vectors(request):
    return request.param


@pytest.fixture(params=SANITIZERS)
def run_built(request, vectors, is_sanitized, tmp_path):
    """Compile it; then a function that runs Python code by that library, in a process of its own in this folder."""
    compiler, (flags, needed) = request.param, VECTORS[vectors]
    if not shutil.which(compiler) or needed not in Path('/proc/cpuinfo').read_text():
        pytest.skip(f'{compiler} {flags} is not for this machine')
    sanitizer, names = SANITIZERS[compiler] if is_sanitized else ('', [])
    others = ' '.join(flag for flag in c_library.FLAGS if not flag.startswith('-march'))
    library = str(tmp_path / 'c_conv.so')
    command = [compiler, *f'{others} {flags} -fopenmp -g {sanitizer}'.split(), str(c_library.SOURCE)]
    subprocess.run([*command, '-o', library, '-lm'], check=True)
    preloaded = [
        subprocess.run([compiler, f'-print-file-name={name}'], capture_output=True, text=True).stdout for name in names]
    env = dict(
        os.environ, PYTHONPATH=os.pathsep.join(sys.path), ASAN_OPTIONS='detect_leaks=0',
        LD_PRELOAD=' '.join(map(str.strip, preloaded)))

    def run(code: str) -> None:
        by_it = (
            'from pathlib import Path; from fmd_timm.ops import c_conv, c_library; '
            f'loaded = c_library._load(Path({library!r})); c_conv.library = lambda: loaded; ')
        subprocess.run([sys.executable, '-c', by_it + code], cwd=Path(__file__).parent, env=env, check=True)

    return run
