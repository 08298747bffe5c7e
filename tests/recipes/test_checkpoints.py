"""recipes/_checkpoints.py: which checkpoints there are and stay, whether one is whole, and that none runs code."""
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import _accelerator
import _checkpoints
import datasets
import pytest
import torch
from _data import open_dataset
from accelerate.state import AcceleratorState
from test_train import make_recipe, run


def save(folder, epoch, step=0):
    """A checkpoint without weights."""
    return _checkpoints.save(make_accelerator(), folder, dict(epochs_done=epoch, step=step), None)


def make_accelerator(device='cpu'):
    return SimpleNamespace(
        is_main_process=True, process_index=0, num_processes=0, device=torch.device(device),
        save_state=lambda path: Path(path).mkdir(parents=True), load_state=lambda path: None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_accelerator, 'gather_object', lambda found: found)
    return tmp_path


def newest(folder):
    return max(_checkpoints.find(folder).items())[1].name


def test_checkpoints_are_in_the_order_of_their_numbers(folder):
    for epoch, step in (9998, 0), (9999, 0), (9999, 20), (9999, 1000000), (10000, 0), (10001, 0), (10001, 3):
        save(folder, epoch, step)
        assert newest(folder) == _checkpoints.name_of(dict(epochs_done=epoch, step=step))
    assert names(folder) == ['epoch_10001', 'epoch_10001_step_000003']


def test_what_was_saved_last_stays_where_later_ones_are(folder):
    """A run was resumed from epoch 1 after it had reached epoch 5."""
    for epoch in 1, 4, 5:
        save(folder, epoch)
    save(folder, 1)
    save(folder, 1, step=7)
    save(folder, 2)
    assert names(folder) == ['epoch_0001_step_000007', 'epoch_0002', 'epoch_0004', 'epoch_0005']


def test_files_that_are_no_checkpoints_are_left_alone(folder):
    theirs = ['epoch_0000.txt', 'epoch_0001_good', 'epoch_0001_step_2_good', 'epoch_0009.bak', 'epoch_best', 'notes']
    for name in theirs[1:]:
        (folder / name).mkdir(parents=True)
    (folder / theirs[0]).touch()
    (folder / 'epoch_0007').touch()  # a file
    assert not _checkpoints.find(folder)
    for epoch in range(1, 5):
        save(folder, epoch)
    assert names(folder) == sorted([*theirs, 'epoch_0003', 'epoch_0004', 'epoch_0007'])
    assert newest(folder) == 'epoch_0004'


def fail(*_):
    raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('step', ['save_state', 'write_json', 'write_manifest', 'sync'])
def test_a_checkpoint_that_cannot_be_written_leaves_the_older_one_whole(step, folder, monkeypatch):
    whole, accelerator = save(folder, 1), make_accelerator()
    monkeypatch.setattr(*(accelerator, step) if step == 'save_state' else (_checkpoints, step), fail)
    with pytest.raises(SystemExit, match='epoch_0002 could not be written, .*No space left on device'):
        _checkpoints.save(accelerator, folder, dict(epochs_done=2, step=0), None)
    assert names(folder) == ['epoch_0001'] and _checkpoints.damage(whole) is None


def test_the_random_numbers_of_mps_go_on(folder, monkeypatch):
    """Dropout and random erasing draw them on the device, and accelerate has them in no checkpoint."""
    device = dict(state=torch.arange(44, dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, 'get_rng_state', lambda: device['state'])
    monkeypatch.setattr(torch.mps, 'set_rng_state', lambda state: device.update(state=state))
    checkpoint = _checkpoints.save(make_accelerator('mps'), folder, dict(epochs_done=1, step=0), None)
    assert _checkpoints.damage(checkpoint) is None
    device.update(state=torch.zeros(44, dtype=torch.uint8))
    _checkpoints.load(make_accelerator('cpu'), checkpoint, None)
    assert not device['state'].any()
    _checkpoints.load(make_accelerator('mps'), checkpoint, None)
    assert device['state'].tolist() == list(range(44))
    _checkpoints.load(make_accelerator('mps'), save(folder, 2), None)  # of another device
    assert device['state'].tolist() == list(range(44))


def manifest(checkpoint, change):
    path = checkpoint / 'manifest.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    'optimizer.bin is missing': lambda folder: (folder / 'optimizer.bin').unlink(),
    r'optimizer.bin has 100 bytes, \d+ were written': lambda folder: (folder / 'optimizer.bin').write_bytes(bytes(100)),
    'model.safetensors has 0 bytes': lambda folder: (folder / 'model.safetensors').write_bytes(b''),
    'model.safetensors has changed since': lambda folder: flip(folder / 'model.safetensors'),
    'random_states_0.pkl has changed since': lambda folder: flip(folder / 'random_states_0.pkl'),
    'progress.json has changed since': lambda folder: flip(folder / 'progress.json'),
    'averaged.safetensors is missing': lambda folder: (folder / 'averaged.safetensors').unlink(),
    'custom_checkpoint_0.pkl does not belong to it': lambda folder: (folder / 'custom_checkpoint_0.pkl').touch(),
    'it has no manifest.json': lambda folder: (folder / 'manifest.json').unlink(),
    r'manifest.json cannot be read \(JSONDecodeError': lambda folder: (folder / 'manifest.json').write_text('{"files'),
    r'manifest.json cannot be read \(KeyError': lambda folder: manifest(folder, lambda content: {}),
    r'manifest.json cannot be read \(TypeError': lambda folder: manifest(folder, lambda content: []),
    r'manifest.json cannot be read \(ValueError': lambda folder: manifest(folder, lambda content: dict(files=[[1]])),
}


@pytest.fixture(scope='module')
def trained(digits_folder, tmp_path_factory):
    """A run of two epochs with a checkpoint of each."""
    folder = tmp_path_factory.mktemp('trained')
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = make_recipe(digits_folder, ema_decay=0.9, checkpoint_every='1epoch')
    run(recipe, folder)
    return recipe, folder


@pytest.mark.parametrize('problem', DAMAGES)
def test_what_is_wrong_with_a_checkpoint_is_said(problem, trained, tmp_path):
    checkpoint = tmp_path / 'epoch_0002'
    shutil.copytree(trained[1] / 'checkpoints' / 'epoch_0002', checkpoint)
    (checkpoint / '.DS_Store').touch()
    assert _checkpoints.damage(checkpoint) is None
    DAMAGES[problem](checkpoint)
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(_checkpoints.damage(checkpoint))


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(trained, tmp_path, capsys, fresh_accelerator):
    recipe, whole = trained
    shutil.copytree(whole, tmp_path / 'run')
    newest, older = (tmp_path / 'run' / 'checkpoints' / name for name in ('epoch_0002', 'epoch_0001'))
    flip(newest / 'model.safetensors')
    with pytest.raises(SystemExit, match='--resume must be .* whole .*epoch_0002: model.safetensors has'):
        run(recipe, tmp_path / 'run', resume=str(newest))
    AcceleratorState._reset_state(reset_partial_state=True)
    run(recipe, tmp_path / 'run', resume='auto')
    assert f'{newest} is damaged and left out: model.safetensors has changed' in capsys.readouterr().out
    assert (tmp_path / 'run' / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()
    assert _checkpoints.damage(newest) is None  # written again

    for checkpoint in newest, older:
        flip(checkpoint / 'progress.json')
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match='none of the checkpoints in .* is whole; remove them to start anew'):
        run(recipe, tmp_path / 'run', resume='auto')


class Intruder:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_resuming_runs_no_code_of_the_checkpoint(trained, tmp_path, fresh_accelerator):
    """Though its manifest says that all is right."""
    recipe, whole = trained
    pickles = [path.name for path in (whole / 'checkpoints' / 'epoch_0002').iterdir()
               if path.suffix not in ('.json', '.safetensors')]
    assert sorted(pickles) == ['optimizer.bin', 'random_states_0.pkl']
    for name in pickles:
        folder, trace = tmp_path / name, tmp_path / f'{name} was run'
        shutil.copytree(whole, folder)
        checkpoint = folder / 'checkpoints' / 'epoch_0002'
        torch.save(Intruder(trace), checkpoint / name)
        (checkpoint / 'manifest.json').unlink()
        _checkpoints.write_manifest(checkpoint)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match='--resume .* could not be loaded: Weights only load failed'):
            run(recipe, folder, resume='auto')
        assert not trace.exists()


def test_a_dataset_that_has_moved_goes_on_and_another_one_does_not(trained, digits_folder, tmp_path, fresh_accelerator):
    recipe, whole = trained
    shutil.copytree(whole, tmp_path / 'run')
    shutil.copytree(digits_folder, tmp_path / 'moved')
    run(dataclasses.replace(recipe, dataset=str(tmp_path / 'moved')), tmp_path / 'run', resume='auto')

    rows = open_dataset(str(digits_folder))
    others = dict(
        fewer=rows['test'].select(range(49)),
        labels=datasets.Dataset.from_list(
            [dict(row, label=9 - row['label']) for row in rows['test']], rows['test'].features))
    for name, message in (
            ('fewer', r'validation images have number 50, these have 49'),
            ('labels', r'validation images have labels_sha256 \w+, these have \w+')):
        shutil.copytree(digits_folder, tmp_path / name)
        others[name].to_parquet(tmp_path / name / 'test.parquet')
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match=f'--resume .*epoch_0002 is of a run on other images: its {message}'):
            run(dataclasses.replace(recipe, dataset=str(tmp_path / name)), tmp_path / 'run', resume='auto')
