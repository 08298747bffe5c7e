"""recipes/_resident.py: each small image has a crop and a flip of its own, the same wherever the images are."""
import signal

import _loaders
import _resident
import _training
import datasets
import numpy as np
import pytest
import torch
from _data import LabelledImages
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from test_interruptions import interrupt, same_weights
from timm.data import resolve_data_config
from tiny import make_recipe, run

SIZE, MARGIN = 16, 2
CONFIG = dict(resolve_data_config(dict(img_size=SIZE)), input_size=(3, SIZE, SIZE))

pytestmark = pytest.mark.usefixtures('fresh_accelerator')


@pytest.fixture(scope='module')
def rows():
    """Noise, whose labels are its rows."""
    pixels = np.random.default_rng(0).integers(256, size=(50, SIZE, SIZE, 3), dtype=np.uint8)
    return datasets.Dataset.from_dict(
        dict(image=list(pixels), label=range(50)),
        features=datasets.Features(image=datasets.Image(), label=datasets.Value('int64')))


def recipe_of(**changes):
    return make_recipe(
        'noise', **dict(dict(image_size=SIZE, test_size=SIZE, batch_size=12, hflip=0.5, seed=3), **changes))


def open_parts(rows):
    return dict(
        train=LabelledImages(rows, 'train', 'train', seed=3),
        validation=LabelledImages(rows.select(range(23)), 'validation', 'validation'))


def loaders_of(rows, recipe, process=0, processes=1):
    """Those that one of several processes gets."""
    return [prepare_data_loader(
        loader, num_processes=processes, process_index=process, split_batches=True, use_seedable_sampler=True,
        data_seed=recipe.seed, put_on_device=False, rng_types=['generator'],
    ) for loader in _loaders.make_loaders(Accelerator(cpu=True), recipe, open_parts(rows), CONFIG)]


def expected_image(image, y, x, flip):
    """By slices of one image."""
    padded = np.zeros((3, SIZE + 2 * MARGIN, SIZE + 2 * MARGIN), np.uint8)
    padded[:, MARGIN:-MARGIN, MARGIN:-MARGIN] = image
    cropped = padded[:, y:y + SIZE, x:x + SIZE]
    return torch.from_numpy((cropped[:, :, ::-1] if flip else cropped).copy())


@pytest.mark.parametrize('processes', [1, 2, 3])
@pytest.mark.parametrize('aug_repeats', [1, 3])
def test_each_image_has_a_crop_and_a_flip_of_its_own(processes, aug_repeats, rows):
    """Of the epoch and its number alone; an image comes once in an epoch, to one of the processes."""
    recipe, images = recipe_of(aug_repeats=aug_repeats), open_parts(rows)['train']
    pairs = [loaders_of(rows, recipe, process, processes) for process in range(processes)]
    assert all(map(_loaders.stay_on_device, pairs))
    loaders = [train for train, _ in pairs]
    seen = []
    for epoch in 0, 1:
        parts = [list(_loaders.batches_of(loader, epoch)) for loader in loaders]
        assert [len(part) for part in parts] == [4] * processes
        for loader in loaders:
            loader.set_epoch(epoch)  # which went on to the next
        numbers = [list(loader.batch_sampler) for loader in loaders]
        drawn = _resident.draw_crops(50 * aug_repeats, MARGIN, 0.5, 3, epoch).tolist()
        of_epoch = {}
        for part, batches in zip(parts, numbers):
            for (pixels, labels), batch in zip(part, batches):
                assert pixels.dtype == torch.uint8 and labels.tolist() == [number % 50 for number in batch]
                of_epoch.update(zip(batch, pixels))
        assert len(of_epoch) == 48  # 2 images don't fill a batch
        for number, pixels in of_epoch.items():
            assert torch.equal(pixels, expected_image(images.read(number % 50)[0], *drawn[number]))
        kinds = {tuple(drawn[number]) for number in of_epoch}
        assert len(kinds) > 20 and {flip for *_, flip in kinds} == {0, 1}
        seen.append(drawn)
    assert seen[0] != seen[1]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_pixels_do_not_depend_on_where_the_images_are(num_workers, rows, monkeypatch, capsys):
    recipe = recipe_of(num_workers=num_workers)
    resident = loaders_of(rows, recipe)
    assert 'images are decoded once and stay on the device: 0.1 of ' in capsys.readouterr().out
    monkeypatch.setattr(_resident, 'free_memory', lambda accelerator: 1000)
    plain = loaders_of(rows, recipe)
    assert 'images are decoded in each epoch: all would take 0.1 of 0 MiB free on cpu, more than 10%' in (
        capsys.readouterr().out)
    assert _loaders.stay_on_device(resident) and not _loaders.stay_on_device(plain)
    batches = [
        [*_loaders.batches_of(train, 0), *_loaders.batches_of(train, 1), *validation]
        for train, validation in (resident, plain)]
    for (pixels, labels), (expected, expected_labels) in zip(*batches, strict=True):
        assert torch.equal(pixels, expected) and torch.equal(labels, expected_labels)


def test_validation_images_are_those_of_timms_transform_and_each_comes_once(rows):
    loader, images = loaders_of(rows, recipe_of())[1], open_parts(rows)['validation']
    pixels, labels = map(torch.cat, zip(*loader))
    transform = _loaders.eval_transform(CONFIG)
    assert labels.tolist() == list(range(23))
    assert torch.equal(pixels, torch.stack([transform(images.read(row)[0]) for row in range(23)]))


def test_without_augmentation_the_pixels_are_those_of_the_files(rows, monkeypatch):
    def draw_none(count, margin, *_):
        return torch.tensor([margin, margin, 0]).expand(count, 3)

    monkeypatch.setattr(_resident, 'draw_crops', draw_none)
    images = open_parts(rows)['train']
    for pixels, labels in loaders_of(rows, recipe_of())[0]:
        assert torch.equal(pixels, torch.stack([images.read(row)[0] for row in labels.tolist()]))


def test_an_epoch_goes_on_at_any_batch_with_the_same_images(rows):
    loader = loaders_of(rows, recipe_of())[0]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    expected, rest = list(_loaders.batches_of(loader, 1)), list(_loaders.batches_of(loader, 1, first=2))
    assert len(expected) == 4 and len(rest) == 2
    for (pixels, labels), (expected_pixels, expected_labels) in zip(rest, expected[2:]):
        assert torch.equal(labels, expected_labels) and torch.equal(pixels, expected_pixels)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize('changes', [
    dict(crop='rrc'), dict(aa='rand-m5'), dict(color_jitter=0.4), dict(image_sizes=['8:0', '16:1'])])
def test_images_that_need_other_augmentation_are_decoded_in_each_epoch(changes, rows, capsys):
    loaders = loaders_of(rows, recipe_of(**changes))
    assert not _loaders.stay_on_device(loaders) and 'images are' not in capsys.readouterr().out
    assert len(list(loaders[0])) == 4


def test_processes_decide_alike_by_the_one_with_the_least_memory(rows, monkeypatch):
    accelerator = Accelerator(cpu=True)
    needed = 3 * SIZE ** 2 * (50 + 23)
    for others, fits in (10 * needed, True), (10 * needed - 1, False):
        monkeypatch.setattr(_resident, 'gather_object', lambda mine, others=others: [*mine, others])
        assert _resident.have_room(accelerator, recipe_of(), open_parts(rows)) == fits


def test_the_free_memory_of_a_container_is_no_more_than_it_may_have(tmp_path, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(_resident, 'CGROUP_LIMIT', tmp_path / 'memory.max')
    for text, limit in ('12345\n', 12345), ('max\n', None):
        (tmp_path / 'memory.max').write_text(text)
        free = _resident.free_memory(accelerator)
        assert free == limit or limit is None and free > 2 ** 20


@pytest.mark.slow
def test_a_run_goes_on_where_there_is_no_room_for_the_images(digits_folder, tmp_path, monkeypatch):
    """To the same weights, bit for bit, from within an epoch."""
    recipe = make_recipe(digits_folder, accumulate=2, reprob=0.25, hflip=0.5)
    expected = run(recipe, tmp_path / 'uninterrupted')
    assert [leg['images_on_device'] for leg in expected['legs']] == [True]
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupt(patch, _training, 'train_step', 10, signal.SIGTERM)
        run(recipe, tmp_path / 'stopped')
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(_resident, 'free_memory', lambda accelerator: 1000)
    resumed = run(recipe, tmp_path / 'stopped', resume='auto')
    assert [leg['images_on_device'] for leg in resumed['legs']] == [True, False]
    assert same_weights(tmp_path / 'stopped', tmp_path / 'uninterrupted')
    assert resumed['loss'] == expected['loss']
