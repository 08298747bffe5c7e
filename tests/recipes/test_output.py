"""recipes/_output.py: one run at a time writes to a folder, which has space and is one for all processes."""
import errno
import re
import time
from types import SimpleNamespace

import _checkpoints
import _output
import processes
import pytest
import train


def hold(folder, locked):
    file = _output.lock(folder)
    _output.read_holder(folder)  # which must not give the lock up
    locked.set()
    time.sleep(600)
    file.close()


def test_two_runs_into_one_folder_are_refused_until_the_first_has_died(tmp_path):
    locked = processes.FORKS.Event()
    holder = processes.FORKS.Process(target=hold, args=(tmp_path, locked), daemon=True)
    holder.start()
    assert locked.wait(60)
    with pytest.raises(SystemExit, match=rf'--output {tmp_path} is in use by process {holder.pid} on \S+: name'):
        _output.lock(tmp_path)
    holder.kill()
    holder.join()
    _output.lock(tmp_path).close()


@pytest.mark.skipif(_output.fcntl is None, reason='of fcntl')
def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(_output.fcntl, 'lockf', unsupported)
    _output.lock(tmp_path).close()
    assert 'cannot be locked' in capsys.readouterr().out


def test_a_folder_that_processes_do_not_share_is_refused(tmp_path, monkeypatch):
    accelerator = SimpleNamespace(is_main_process=True)
    monkeypatch.setattr(_output, 'on_main', lambda accelerator, decide: ('process 7 on node0', None, None))
    monkeypatch.setattr('_accelerator.gather_object', lambda found: found)
    with pytest.raises(SystemExit, match=r'one folder on all machines: .* does not see what process 7 on node0'):
        _output.open_output(accelerator, tmp_path, None, 0, {})


def test_the_space_of_its_own_checkpoints_is_not_asked_for_again(tmp_path, monkeypatch):
    model_bytes = 2**20
    monkeypatch.setattr(_output.shutil, 'disk_usage', lambda path: SimpleNamespace(free=9 * 2**20))
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(SystemExit, match='has 9 MiB free, checkpoints need 12 MiB'):
        _output.check_space(tmp_path, model_bytes)
    (tmp_path / 'checkpoints' / 'epoch_0001').mkdir()
    (tmp_path / 'checkpoints' / 'epoch_0001' / 'optimizer.bin').write_bytes(bytes(4 * 2**20))
    _output.check_space(tmp_path, model_bytes)


@pytest.mark.parametrize('option', ['--output', '--resume', '--dataset'])
def test_an_empty_name_is_refused(option, capsys):
    with pytest.raises(SystemExit) as refusal:
        train.parse_train(['digits', option, ''])
    assert re.search(f"{option}:? must be .*, got ''", f'{refusal.value} {capsys.readouterr().err}')


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    for name in _checkpoints.UNFINISHED, _checkpoints.REPLACED:
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
        (tmp_path / 'checkpoints' / name / 'optimizer.bin').write_bytes(b'half')
    assert _output.choose(tmp_path, 'auto') is None
    assert not list((tmp_path / 'checkpoints').iterdir())
