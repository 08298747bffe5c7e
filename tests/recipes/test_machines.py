"""Machines that are not Linux: what they lack isn't asked for, as far as that can be told on any machine."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import _accelerator
import _interruptions
import _measure
import bench
import predict
import processes
import pytest
import tiny
import torch
import train
from test_interruptions import is_running, wait_for
from test_train import PATH

ENV = dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)

# As on Windows, for what is imported from here on: these modules can't be imported, and this function isn't there.
HIDE = '''
import os, sys
for name in 'fcntl', 'resource':
    sys.modules[name] = None
if hasattr(os, 'sched_getaffinity'):
    del os.sched_getaffinity
'''
# A stand-in for Windows' module, which refuses the second lock of a byte.
MSVCRT = '''
import types
locked = []
def locking(descriptor, mode, number):
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0 and (mode, number) == (2, 1)
    if locked:
        raise PermissionError(13, 'Permission denied')
    locked.append(descriptor)
sys.modules['msvcrt'] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
'''


@pytest.mark.parametrize('hidden', ['resource', 'fcntl', 'sched_getaffinity'])
def test_recipes_name_what_a_platform_lacks_only_behind_a_guard(hidden):
    """At the top of a module an import would end every command."""
    for path in Path(train.__file__).parent.glob('*.py'):
        for line in path.read_text().splitlines():
            assert line not in (f'import {hidden}', f'from os import {hidden}'), f'{path.name}: {line}'


def test_a_folder_is_locked_by_msvcrt_where_there_is_no_fcntl(tmp_path):
    script = HIDE + MSVCRT + '''
from pathlib import Path
import _output
file = _output.lock(Path(sys.argv[1]))
try:
    _output.lock(Path(sys.argv[1]))
except SystemExit as refusal:
    print(refusal)
'''
    done = processes.run('-c', script, tmp_path, env=ENV)
    assert f'--output {tmp_path} is in use by process' in done.stdout, done.stderr


def test_a_run_needs_none_of_what_windows_lacks(digits_folder, tmp_path):
    """But peak memory, which psutil tells there."""
    script = HIDE + MSVCRT + '''
import _measure, tiny, train
train.peak_memory_mib = lambda device: 1.0
train.main(**vars(train.parse_train(sys.argv[1:])))
'''
    done = processes.run(
        '-c', script, 'digits', '--model', tiny.NAME, '--dataset', digits_folder, '--epochs', 1, '--batch-size', 16,
        '--output', tmp_path, env=dict(ENV, PATH=''))  # nor git
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / 'result.json').read_text())
    assert record['git_commit'] is None and record['legs'][0]['epoch_seconds']


@pytest.mark.slow  # a process that loads images imports everything anew
def test_processes_that_load_images_may_be_spawned_as_on_windows_and_macos(digits_folder, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('''
import multiprocessing, sys
import tiny, train
if __name__ == '__main__':
    multiprocessing.set_start_method('spawn', force=True)
    train.main(**vars(train.parse_train(sys.argv[1:])))
''')
    for workers in 0, 1:
        done = processes.run(
            script, 'digits', '--model', tiny.NAME, '--dataset', digits_folder, '--epochs', 2, '--batch-size', 16,
            '--aa', 'rand-m5', '--tracker', 'none', '--num-workers', workers, '--output', tmp_path / str(workers),
            env=ENV)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / '0' / 'model.safetensors').read_bytes() == (tmp_path / '1' / 'model.safetensors').read_bytes()


def test_peak_memory_is_in_mib_everywhere(monkeypatch):
    here = _measure.peak_memory_mib(torch.device('cpu'))
    assert 50 < here < 100_000
    if sys.platform == 'linux':
        monkeypatch.setattr(sys, 'platform', 'darwin')  # whose numbers are bytes
        assert _measure.peak_memory_mib(torch.device('cpu')) == pytest.approx(here / 1024, rel=0.01)


def test_a_process_without_a_launcher_does_not_follow_its_parent(monkeypatch):
    monkeypatch.setattr(_interruptions.signal, 'signal', lambda *_: None)
    monkeypatch.delenv('ACCELERATE_MIXED_PRECISION', raising=False)
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    for name in 'ctypes', 'threading':
        monkeypatch.setattr(_interruptions, name, None)
    for platform in 'linux', 'darwin', 'win32':
        monkeypatch.setattr(_interruptions.sys, 'platform', platform)
        _interruptions.end_with_launcher()


FOLLOWER = '''
import os, sys, time
import psutil
sys.platform = sys.argv[1]
import _interruptions
_interruptions.end_with_launcher()
os.write(1, f'{os.getpid()}\\n'.encode())  # at once: another one writes too
if sys.argv[2] == 'trains':
    with _interruptions.Interruptions() as interruptions:
        while not any(interruptions.wishes()):
            time.sleep(0.01)
        with open(sys.argv[3], 'w') as file:
            file.write(str(interruptions.wishes()))
        os._exit(0)
time.sleep(60)
'''
LAUNCHER = '''
import subprocess, sys, time
for what in 'loads', 'trains':
    subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2], what, sys.argv[3]])
time.sleep(60)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('platform', ['linux', 'darwin', 'win32'])
def test_a_process_ends_with_its_launcher_whatever_ends_that(platform, tmp_path):
    """Before training at once, and in training as by SIGTERM; also where the kernel does not tell."""
    with subprocess.Popen(
            [sys.executable, '-c', LAUNCHER, FOLLOWER, platform, tmp_path / 'heard'], stdout=subprocess.PIPE, text=True,
            env=dict(ENV, ACCELERATE_MIXED_PRECISION='no')) as launcher:
        try:
            pids = [int(launcher.stdout.readline()) for _ in range(2)]
            time.sleep(0.2)  # in which they would end if they took it for dead
            assert all(map(is_running, pids))
        finally:
            launcher.kill()
    wait_for(lambda: not any(map(is_running, pids)), 30)
    assert (tmp_path / 'heard').read_text() == '(0.0, 0.0, 1.0)'


def test_what_runs_without_accelerate_takes_the_accelerator_that_there_is(tmp_path, monkeypatch):
    """A network for no tensors says where it was sent."""
    class Network(torch.nn.Module):
        num_classes = 10

        def to(self, device):
            sent.append(device)
            raise SystemExit

    sent, mps = [], torch.device('mps')
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: mps)
    monkeypatch.setattr(predict, 'find_images', lambda images: [])
    monkeypatch.setattr(predict, 'find_source', lambda *_: None)
    monkeypatch.setattr(predict, 'load_network', lambda *_: Network())
    monkeypatch.setattr(predict.Metadata, 'of', lambda *_: None)
    monkeypatch.setattr(bench, 'bench_network', lambda name, device, rounds: Network().to(device))
    for command, arguments in (predict, ['run', 'images']), (bench, ['--models', 'resnet18']):
        parse = getattr(command, f'parse_{command.__name__}')
        with pytest.raises(SystemExit):
            command.main(**vars(parse(arguments)))
    assert sent == [mps, mps]


def test_mps_is_synchronized_and_its_numbers_are_read_without_cuda(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, 'synchronize', waited.append)
    _measure.synchronize(torch.device('mps'))
    assert waited == [torch.device('mps')]
    assert _accelerator.start_reading(torch.tensor([1.0, 2.0]))() == [1, 2]
