"""c_library: a library that is right and private, or none and one warning. Each try is a process of its own."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fmd_timm.ops import c_library, reference
from fmd_timm.ops.case import Attention, case_of

COMPILER = shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')

pytestmark = pytest.mark.skipif(sys.platform != 'linux' or not COMPILER, reason='needs Linux and a C compiler')

LOAD = """
import importlib.util, sys, threading
spec = importlib.util.spec_from_file_location('c_library', sys.argv[1])
c_library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(c_library)
threads = [threading.Thread(target=c_library.library) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print('slow' if c_library.library() is None else 'fast')
"""
NO_OPENMP = """for word in "$@"; do
if [ "$word" = -fopenmp ]; then echo "ld: cannot find -lomp" >&2; exit 1; fi
done
"""
BAD = {  # libraries that compilers make of other sources
    'no symbols': ('int nothing;', "undefined symbol: fmd_timm_run"),
    'crash': ('__attribute__((constructor)) static void crash(void) { __builtin_trap(); }', 'died with <Signals.SIG'),
    'wrong': ('void fmd_timm_run(const void *c) { (void)c; } void fmd_timm_backward(const void *c) { (void)c; }',
              'it computes something else than it should'),
    'wrong gradients': (
        f'#define fmd_timm_backward another\n{c_library.SOURCE.read_text()}\n#undef fmd_timm_backward\n'
        'void fmd_timm_backward(const void *call) { (void)call; }', 'its gradients are others than they should be'),
}


def compile_source(source: str, folder: Path) -> Path:
    (folder / 'source.c').write_text(source)
    subprocess.run([COMPILER, '-shared', '-fPIC', folder / 'source.c', '-o', folder / 'made.so'], check=True)
    return folder / 'made.so'


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
    return c_library._compiled(tmp_path_factory.mktemp('built'))


class Machine:
    """A home, and compilers that note their calls and copy a file that was compiled before."""

    def __init__(self, path: Path, built: Path):
        self.path, self.built, self.calls = path, built, path / 'calls'
        self.cache, self.bin = path / 'home/.cache/fmd_timm', path / 'bin'
        for folder in self.bin, path / 'home', path / 'tmp':
            folder.mkdir()
        self.calls.touch()
        self.add_compiler('cc')

    def add_compiler(self, name: str, before: str = '', library: Path | None = None) -> str:
        script = self.bin / name
        script.write_text(
            f'#!/bin/sh\n{before}echo {name} >> {self.calls}\nwhile [ "$1" != -o ]; do shift; done\n'
            f'/bin/cp {library or self.built} "$2"\n')
        script.chmod(0o755)
        return str(script)

    def start(self, before: tuple[str, ...] = (), first: str = '', **changes: str) -> subprocess.Popen:
        env = dict(HOME=str(self.path / 'home'), PATH=str(self.bin), TMPDIR=str(self.path / 'tmp')) | changes
        return subprocess.Popen(
            [*before, sys.executable, '-I', '-c', f'{first}\n{LOAD}', c_library.__file__], cwd=self.path / 'home',
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def load(self, *args, **kwargs) -> tuple[str, str]:
        """'fast' or 'slow', and the warnings"""
        process = self.start(*args, **kwargs)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert stderr.count('Warning: ') == bool(stderr), stderr  # one or none
        return stdout.strip(), stderr

    def compiled(self) -> int:
        return len(self.calls.read_text().splitlines())

    def kept(self) -> list[Path]:
        return list(self.cache.iterdir())


@pytest.fixture
def machine(tmp_path, built) -> Machine:
    return Machine(tmp_path, built)


def test_it_is_compiled_once_and_needs_no_compiler_afterwards(machine):
    assert machine.load() == machine.load() == ('fast', '')
    assert machine.compiled() == len(machine.kept()) == 1
    shutil.rmtree(machine.bin)
    assert machine.load() == ('fast', '')
    assert machine.cache.stat().st_mode & 0o777 == 0o700


def cut(file: Path) -> None:
    os.truncate(file, 8192)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    'cut': cut, 'empty': lambda file: file.write_bytes(b''), 'bit': flip_a_bit,
    'junk': lambda file: file.write_text('junk' * 1000),
    'other library': lambda file: shutil.copy(compile_source(BAD['no symbols'][0], file.parents[3]), file),
    'writable to others': lambda file: file.chmod(0o702),
    'writable to the group': lambda file: file.chmod(0o720),
}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_compiled_anew(damage, machine):
    machine.load()
    [file] = machine.kept()
    content = file.read_bytes()
    damage(file)
    assert machine.load() == machine.load() == ('fast', '')
    assert machine.compiled() == 2
    assert machine.kept() == [file] and file.read_bytes() == content and file.stat().st_mode & 0o777 == 0o700


def test_a_file_that_can_not_be_loaded_here_is_compiled_anew(machine, tmp_path):
    machine.load()
    [file] = machine.kept()
    junk = b'of a machine with the same home'
    other = file.with_name(f'{file.stem.rpartition("-")[0]}-{c_library._hash(junk)}.so')
    file.rename(other)
    other.write_bytes(junk)
    assert machine.load() == machine.load() == ('fast', '')
    assert machine.compiled() == 2


def test_a_folder_that_others_may_write_to_is_not_used(machine):
    machine.load()
    machine.cache.chmod(0o777)
    for _ in range(2):
        way, warning = machine.load()
        assert way == 'fast' and f'{machine.cache} must belong to the user' in warning
    assert machine.compiled() == 3 and not list((machine.path / 'tmp').iterdir())


@pytest.mark.skipif(os.getuid() != 0, reason='only root can give files away')
def test_files_of_others_are_not_used(machine):
    machine.load()
    [file] = machine.kept()
    os.chown(file, 12345, -1)
    assert machine.load() == ('fast', '')
    assert machine.compiled() == 2 and file.stat().st_uid == 0
    os.chown(machine.cache, 12345, -1)
    way, warning = machine.load()
    assert way == 'fast' and f'{machine.cache} must belong to the user' in warning and machine.compiled() == 3


def test_the_cache_folder_is_the_one_of_the_xdg_specification(machine):
    assert machine.load(XDG_CACHE_HOME='relative') == ('fast', '')
    assert len(machine.kept()) == 1 and not (machine.path / 'home/relative').exists()
    assert machine.load(XDG_CACHE_HOME=str(machine.path / 'elsewhere')) == ('fast', '')
    assert len(list((machine.path / 'elsewhere/fmd_timm').iterdir())) == 1


@pytest.mark.parametrize('home', ['/proc/nowhere', 'relative'])
def test_without_a_usable_home_every_process_compiles(home, machine):
    for count in 1, 2:
        way, warning = machine.load(HOME=home)
        assert way == 'fast' and 'c_conv.c is compiled by every process, since it can not be kept' in warning
        assert machine.compiled() == count
    assert not list((machine.path / 'tmp').iterdir())


def test_without_any_home_every_process_compiles(machine):
    no_home = 'import pathlib\ndef home(): raise RuntimeError("no home")\npathlib.Path.home = home'
    way, warning = machine.load(first=no_home)
    assert way == 'fast' and warning.count('can not be kept: no home') == 1


MOUNTS = {  # as the cache or as all folders: how it is mounted, what the compiler or the loader say
    'read-only cache': (['cache'], 'ro', 'Read-only file system'),
    'noexec cache': (['cache'], 'noexec', 'failed to map segment from shared object'),
    'full cache': (['cache'], 'size=16k', 'No space left on device'),
    'noexec': (['cache', 'tmp'], 'noexec', 'failed to map segment from shared object'),
    'full': (['cache', 'tmp'], 'size=16k', 'No space left on device'),
}


@pytest.mark.parametrize('names, options, words', MOUNTS.values(), ids=MOUNTS)
def test_where_the_cache_can_not_take_it_every_process_compiles_and_where_nothing_can_there_is_none(
        names, options, words, machine):
    in_namespace = shutil.which('unshare') or 'unshare', '--user', '--map-root-user', '--mount', '/bin/sh', '-c'
    try:
        subprocess.run([*in_namespace, '/bin/mount -t tmpfs none /mnt'], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('this system does not let its users mount')
    machine.cache.mkdir(parents=True, mode=0o700)
    folders = dict(cache=machine.cache, tmp=machine.path / 'tmp')
    mounts = ' && '.join(f'/bin/mount -t tmpfs -o mode=700,{options} none {folders[name]}' for name in names)
    way, warning = machine.load(before=(*in_namespace, f'{mounts} && exec "$@"', 'sh'))
    assert words in warning
    if names == ['cache']:
        assert way == 'fast' and 'is compiled by every process' in warning
    else:
        assert way == 'slow' and 'dynamic convolutions take longer here' in warning


def test_processes_and_threads_may_compile_at_once(machine):
    processes = [machine.start() for _ in range(4)]
    assert [process.communicate(timeout=60) for process in processes] == [('fast\n', '')] * 4
    assert 1 <= machine.compiled() <= 4  # once per process, which has four threads
    assert len(machine.kept()) == 1
    assert machine.load() == ('fast', '')


def test_cc_may_have_arguments(machine):
    wrapper = machine.add_compiler('ccache', 'shift\n')
    assert machine.load(CC=f'{wrapper} cc') == machine.load(CC='cc -pthread "-DNAME=two words"') == ('fast', '')
    assert machine.calls.read_text() == 'ccache\ncc\n'


@pytest.mark.parametrize('cc', ['/no/compiler', 'false', 'cc "', ' '])
def test_instead_of_a_cc_that_fails_the_usual_compilers_are_tried(cc, machine):
    machine.add_compiler('false', 'exit 1\n')
    assert machine.load(CC=cc) == ('fast', '')
    assert machine.compiled() == 1


def test_other_compilers_are_tried_in_turn(machine):
    machine.add_compiler('cc', 'exit 1\n')
    machine.add_compiler('clang')
    assert machine.load() == ('fast', '')
    assert machine.calls.read_text() == 'clang\n'


def test_a_compiler_without_openmp_is_the_last_choice(machine):
    machine.add_compiler('cc', NO_OPENMP)
    assert machine.load() == ('fast', '')
    assert machine.calls.read_text() == 'cc\n'
    machine.add_compiler('gcc')
    assert machine.load(CC='cc') == ('fast', '')
    assert machine.calls.read_text() == 'cc\ngcc\n'


def test_without_a_compiler_there_is_none_and_a_warning(machine):
    (machine.bin / 'cc').unlink()
    for _ in range(2):
        way, warning = machine.load()
        assert way == 'slow' and 'take longer here, without c_conv.c: there is no C compiler' in warning
        assert not machine.kept()


def test_the_warning_has_the_last_words_of_every_compiler(machine):
    words = ''.join(f'echo "{line}" >&2\n' for line in ('first line', 'c_conv.c:1: no such thing', 'compilation ended'))
    machine.add_compiler('cc', f'{words}exit 1\n')
    way, warning = machine.load(CC='/no/compiler -m64')
    assert way == 'slow' and "/no/compiler -m64: [Errno 2] No such file or directory: '/no/compiler'" in warning
    assert 'cc: ' in warning and 'exit status 1. first line c_conv.c:1: no such thing compilation ended' in warning


@pytest.mark.parametrize('source, words', BAD.values(), ids=BAD)
def test_a_library_that_fails_its_test_is_not_used(source, words, machine, tmp_path):
    machine.add_compiler('cc', library=compile_source(source, tmp_path))
    way, warning = machine.load()
    assert way == 'slow' and words in warning and not machine.kept()
    machine.add_compiler('gcc')
    assert machine.load() == machine.load() == ('fast', '')


def test_what_the_test_of_a_library_expects_is_of_the_definition():
    tensors, linear = c_library._test_inputs()
    x, weight, shift, grad_y = (torch.tensor(list(t)).double() for t in tensors)
    x, grad_y = (t.view(2, 3, 4, 32).permute(0, 3, 1, 2) for t in (x, grad_y))
    weight = weight.view(96, 3, 3, 32).permute(0, 3, 1, 2)
    weights, biases = ([torch.tensor(list(t)).double() for t in each] for each in (linear[::2], linear[1::2]))
    maps = [(weight.view(len(bias), -1), bias) for weight, bias in zip(weights, biases)]
    features = F.linear(x.mean((2, 3)), *maps[0]).relu()
    gates = (F.linear(features, *pair).sigmoid() for pair in maps[1:4])
    attention = Attention(F.linear(features, *maps[4]).softmax(1), *gates)
    y = reference.forward(x, weight, attention, case_of(x, weight, attention, (1, 1), (1, 1), (1, 1), 1))
    mixed = torch.einsum('bk,koihw->boihw', attention.kernel_attn, weight.unflatten(0, (3, 32)))
    mixed *= attention.out_attn[:, :, None, None, None] * attention.in_attn[:, None, :, None, None]
    mixed *= attention.tap_attn.view(2, 1, 1, 3, 3)
    expected = [(result * grad_y).sum().item() for result in (y, y + shift[:, None, None])]
    expected.append((mixed * weight.unflatten(0, (3, 32))[:2]).sum().item())
    kernels = weight.permute(0, 2, 3, 1).flatten()[:3 * 9 * 32].view(3, 3, 3, 32).permute(0, 3, 1, 2)
    kernels = kernels.reshape(96, 1, 3, 3)
    attention = attention._replace(out_attn=None)
    y = reference.forward(x, kernels, attention, case_of(x, kernels, attention, (1, 1), (1, 1), (1, 1), 32))
    expected.append(((y + shift[:, None, None]) * grad_y).sum().item())
    assert c_library.EXPECTED == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('compiler', ['cc', 'gcc', 'clang'])
def test_every_compiler_of_this_machine_makes_a_library_that_passes(compiler, tmp_path, monkeypatch):
    if not shutil.which(compiler):
        pytest.skip(f'there is no {compiler}')
    monkeypatch.setenv('CC', compiler)
    monkeypatch.setattr(shutil, 'which', lambda name: None)  # no other one
    assert c_library._compiled(tmp_path).is_file()


OTHER_SYSTEMS = {
    'macOS': lambda patch: patch.setattr(sys, 'platform', 'darwin'),
    'RISC-V': lambda patch: patch.setattr(c_library.platform, 'machine', lambda: 'riscv64'),
    'frozen': lambda patch: patch.setattr(sys, 'frozen', True, raising=False),
}


@pytest.mark.parametrize('other', OTHER_SYSTEMS.values(), ids=OTHER_SYSTEMS)
def test_where_it_is_not_expected_there_is_none_and_no_warning(other, monkeypatch, recwarn):
    monkeypatch.setattr(c_library, '_library', None)
    other(monkeypatch)
    assert c_library.library.__wrapped__() is None and not recwarn
