"""Machines that are not Linux: what they lack isn't asked for, as far as that can be told on any machine."""
import json
import os
import sys
from pathlib import Path

import _accelerator
import _interruptions
import _measure
import processes
import pytest
import tiny
import torch
import train
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
    _interruptions.end_with_launcher()
    assert _interruptions._launcher is None


def test_where_the_kernel_does_not_tell_the_end_of_the_launcher_is_seen_at_the_next_step(monkeypatch):
    monkeypatch.setattr(_interruptions.signal, 'signal', lambda *_: None)
    monkeypatch.setattr(_interruptions.sys, 'platform', 'darwin')
    monkeypatch.setattr(_interruptions, '_launcher', None)
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    _interruptions.end_with_launcher()
    interruptions = _interruptions.Interruptions()
    assert interruptions.wishes() == (0, 0, 0)
    monkeypatch.setattr(_interruptions.os, 'getppid', lambda: 1)
    assert interruptions.wishes() == (0, 0, 1)


def test_mps_is_synchronized_and_its_numbers_are_read_without_cuda(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, 'synchronize', waited.append)
    _measure.synchronize(torch.device('mps'))
    assert waited == [torch.device('mps')]
    assert _accelerator.start_reading(torch.tensor([1.0, 2.0]))() == [1, 2]
