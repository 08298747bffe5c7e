"""recipes/_broken.py: images that can't be decoded end a run or are left out; what else is said of images."""
import json
import os
import re
from pathlib import Path

import _broken
import _data
import datasets
import numpy as np
import processes
import pytest
import tiny
import train
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import make_recipe, run

pytestmark = pytest.mark.usefixtures('fresh_accelerator')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """16 images of each of two classes to train, 4 to validate, three of them broken."""
    folder = tmp_path_factory.mktemp('folder')
    for split, count in ('train', 16), ('test', 4):
        for label in 'ab':
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                shade = np.full((8, 8), 8 * i, np.uint8)
                Image.fromarray(shade).save(folder / split / label / f'{i:02}.png')
    for name in 'train/a/03.png', 'train/b/15.png', 'test/a/00.png':
        (folder / name).write_bytes((folder / name).read_bytes()[:40])
    return folder


def options(folder, **changes):
    return make_recipe(folder, **dict(dict(epochs=1, batch_size=8), **changes))


def test_a_broken_image_stops_the_run_before_training_with_its_file(folder, tmp_path):
    with pytest.raises(SystemExit, match=(
            r"split 'train': the image in row 3 \(.*train/a/03.png\) cannot be decoded: .*; so are 1 more; "
            '--on-bad-image skip leaves such images out')):
        run(options(folder), tmp_path)
    assert not (tmp_path / 'result.json').exists()


def test_broken_images_are_left_out_named_and_counted(folder, tmp_path, capsys):
    record = run(options(folder, on_bad_image='skip'), tmp_path)
    assert record['unread_images'] == dict(train=2, validation=1)
    assert (record['train_images'], record['validation_images']) == (30, 7)
    left_out = re.findall(r'left out: .*\((.*)\) cannot be decoded', capsys.readouterr().out)
    assert [Path(path).relative_to(folder).as_posix() for path in left_out] == [
        'train/a/03.png', 'train/b/15.png', 'test/a/00.png']


def test_all_processes_leave_out_the_same_images(folder, tmp_path):
    environment = dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=os.pathsep.join(
        str(Path(module.__file__).parent) for module in (train, tiny)) + os.pathsep + str(
            Path(train.__file__).parents[1]))
    for done in processes.launch(
            2, tiny.__file__, 'digits', '--model', tiny.NAME, '--dataset', folder, '--epochs', 1, '--batch-size', 8,
            '--tracker', 'none', '--on-bad-image', 'skip', '--output', tmp_path, env=environment):
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'result.json').read_text())
    assert (record['unread_images'], record['device_count']) == (dict(train=2, validation=1), 2)
    assert (record['train_images'], record['validation_images']) == (30, 7)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_above_the_bound_a_broken_image_stops_the_run_when_it_comes(folder, num_workers, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', 0.5)  # after which its process ends
    monkeypatch.setattr(_broken, 'CHECKED_IMAGES', 31)
    with pytest.raises(SystemExit, match=r"^.* split 'test': the image in row 0 \(.*a/00.png\)"):
        run(options(folder), tmp_path / 'checked')
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(_broken, 'CHECKED_IMAGES', 7)
    with pytest.raises(SystemExit, match=r"^[^\n]* split 'train': the image in row \d+ \(.*.png\) cannot be "):
        run(options(folder, num_workers=num_workers), tmp_path / 'run')
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(options(folder, on_bad_image='skip'), tmp_path / 'skip')['unread_images'] == dict(train=2, validation=1)


def test_an_image_whose_depth_is_not_known_is_named_before_training(tmp_path):
    for split in 'train', 'test':
        for label in 'ab':
            (tmp_path / split / label).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / split / label / '1.tiff')
    with pytest.raises(SystemExit, match=r'row 0 \(.*1.tiff\) cannot be decoded: its values are floating-point'):
        run(options(tmp_path, batch_size=2), tmp_path / 'run')


def test_too_few_images_that_are_left_are_an_error(folder):
    images = _data.open_images(options(folder, batch_size=32))
    with pytest.raises(SystemExit, match='30 images are left to train on and 7 to validate, expected at least'):
        _broken.check(Accelerator(cpu=True), options(folder, batch_size=32, on_bad_image='skip'), images)


def make_images(size, labels, names):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    image = Image.fromarray(np.zeros((size, 2 * size), np.uint8))
    rows = datasets.Dataset.from_dict(dict(image=[image] * len(labels), label=labels), features=features)
    images = _data.LabelledImages(rows, 'train', "set split 'train'")
    return dict(train=images, validation=images)


@pytest.mark.parametrize('size, image_size, warns', [(64, 8, True), (63, 8, False), (8, 224, True), (32, 224, False)])
def test_images_far_from_the_size_that_the_network_gets_are_worth_a_warning(size, image_size, warns, capsys):
    _broken.warn_of_images(make_images(size, [0, 1], ['a', 'b']), make_recipe('set', image_size=image_size))
    warning = (
        f"warning: the images of set split 'train' have {size} pixels on their shorter side (median of 2), the "
        f'network gets {image_size}: see --image-size\n')
    assert capsys.readouterr().out == (warning if warns else '')


def test_so_are_classes_without_images(capsys):
    images = make_images(8, [0, 2], ['a', '\x1b[31mcat', 'b'])
    _broken.warn_of_images(images, make_recipe('set'))
    assert capsys.readouterr().out == (
        "warning: set split 'train' has no image of 1 of its 3 classes, which can't be learned: '\\x1b[31mcat'\n")
