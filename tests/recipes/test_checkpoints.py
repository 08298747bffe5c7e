"""recipes/_checkpoints.py: which checkpoints there are, which stay, and that reading one runs no code from it."""
import pickle
from pathlib import Path
from types import SimpleNamespace

import _checkpoints
import pytest
import torch
from accelerate.state import AcceleratorState
from test_train import make_recipe, run


def save(folder, epoch, best=0):
    """A checkpoint without weights."""
    accelerator = SimpleNamespace(
        is_main_process=True, wait_for_everyone=lambda: None, save_state=lambda path: Path(path).mkdir(parents=True))
    _checkpoints.save(accelerator, folder, dict(epochs_done=epoch, best_epoch=best), None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    for epoch in 9998, 9999, 10000, 10001:
        save(tmp_path / 'checkpoints', epoch)
    assert names(tmp_path / 'checkpoints') == ['epoch_10000', 'epoch_10001']
    save(tmp_path / 'checkpoints', 9999)  # resumed from an earlier one
    assert _checkpoints.check_output(tmp_path, 'auto', 0) == tmp_path / 'checkpoints' / 'epoch_10001'


def test_what_was_saved_last_stays_where_later_ones_are(tmp_path):
    """A run was resumed from epoch 1 after it had reached epoch 5."""
    for epoch in 1, 4, 5:
        save(tmp_path, epoch, best=1)
    save(tmp_path, 2, best=1)
    assert names(tmp_path) == ['epoch_0001', 'epoch_0002', 'epoch_0004', 'epoch_0005']


def test_the_best_stays(tmp_path):
    for epoch in range(1, 6):
        save(tmp_path, epoch, best=min(epoch, 2))
    assert names(tmp_path) == ['epoch_0002', 'epoch_0004', 'epoch_0005']


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path):
    theirs = ['epoch_0000.txt', 'epoch_0001_good', 'epoch_0009.bak', 'epoch_best', 'notes']
    for name in theirs[1:]:
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    (tmp_path / 'checkpoints' / theirs[0]).touch()
    (tmp_path / 'checkpoints' / 'epoch_0007').touch()  # a file
    assert _checkpoints.check_output(tmp_path, None, 0) is None
    for epoch in range(1, 5):
        save(tmp_path / 'checkpoints', epoch)
    assert names(tmp_path / 'checkpoints') == sorted([*theirs, 'epoch_0003', 'epoch_0004', 'epoch_0007'])
    assert _checkpoints.check_output(tmp_path, 'auto', 0) == tmp_path / 'checkpoints' / 'epoch_0004'


def test_the_space_of_its_own_checkpoints_is_not_asked_for_again(tmp_path, monkeypatch):
    model_bytes = 2**20
    monkeypatch.setattr(_checkpoints.shutil, 'disk_usage', lambda path: SimpleNamespace(free=9 * 2**20))
    with pytest.raises(SystemExit, match='has 9 MiB free, checkpoints need 16 MiB'):
        _checkpoints.check_output(tmp_path, None, model_bytes)
    for epoch in 1, 2:
        save(tmp_path / 'checkpoints', epoch)
        (tmp_path / 'checkpoints' / f'epoch_{epoch:04d}' / 'optimizer.bin').write_bytes(bytes(4 * 2**20))
    assert _checkpoints.check_output(tmp_path, 'auto', model_bytes)


class Intruder:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_resuming_runs_no_code_of_the_checkpoint(digits_folder, tmp_path, fresh_accelerator):
    recipe = make_recipe(digits_folder, epochs=1, ema_decay=0.9)
    run(recipe, tmp_path)
    checkpoint = tmp_path / 'checkpoints' / 'epoch_0001'
    pickles = [path for path in checkpoint.iterdir() if path.suffix not in ('.json', '.safetensors')]
    assert pickles
    for path in pickles:
        before, trace = path.read_bytes(), tmp_path / f'{path.name} was run'
        torch.save(Intruder(trace), path)
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            run(recipe, tmp_path, resume='auto')
        except pickle.UnpicklingError:
            pass
        assert not trace.exists()
        path.write_bytes(before)
