"""recipes/_loaders.py: every image once an epoch, which can begin at any batch; timm's own pixels."""
import io

import _loaders
import datasets
import numpy as np
import pytest
import timm
import torch
from _bench_data import plain_transform
from _data import LabelledImages, _seeded, open_images
from _images import decode, decode_pixels
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from test_train import make_recipe
from timm.data import resolve_data_config

CONFIG = dict(resolve_data_config(dict(img_size=8)), input_size=(3, 8, 8))


@pytest.fixture(scope='module')
def numbered():
    """Noise, whose labels are its rows."""
    pixels = np.random.default_rng(0).integers(256, size=(50, 12, 12, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict(
        dict(image=list(pixels), label=range(50)),
        features=datasets.Features(image=datasets.Image(), label=datasets.Value('int64')))
    return dict(train=rows, validation=rows.select(range(23)))


def loaders_of(recipe, images, process, processes):
    """Those that one of several processes gets."""
    return [prepare_data_loader(
        loader, num_processes=processes, process_index=process, split_batches=True, use_seedable_sampler=True,
        data_seed=recipe.seed, put_on_device=False, rng_types=['generator'],
    ) for loader in _loaders.make_loaders(Accelerator(cpu=True), recipe, images, CONFIG)]


@pytest.mark.parametrize('processes, num_workers', [
    (1, 0), (3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2), (2, 0), (2, 2), (3, 0))),
])
def test_processes_and_workers_share_out_the_images(processes, num_workers, numbered, fresh_accelerator):
    """Each is read once an epoch, with an augmentation that depends on epoch and row alone."""
    recipe = make_recipe('noise', batch_size=12, crop='rrc', hflip=0.5, aa='rand-m5', num_workers=num_workers, seed=3)
    images = {split: LabelledImages(rows, split, split, seed=recipe.seed) for split, rows in numbered.items()}
    train, validation = zip(*(loaders_of(recipe, images, process, processes) for process in range(processes)))
    orders = []
    for epoch in 0, 1:
        parts = [list(_loaders.batches_of(loader, epoch)) for loader in train]
        assert {len(labels) for part in parts for _, labels in part} == {12 // processes}
        rows = [row for batches in zip(*parts) for _, labels in batches for row in labels.tolist()]
        assert len(set(rows)) == len(rows) == 48  # the last 2 images don't fill a batch
        orders.append(rows)
        read = {row: pixels for part in parts for batch in part for pixels, row in zip(batch[0], batch[1].tolist())}
        images['train'].set_epoch(epoch)
        wrong = [row for row, pixels in read.items() if not torch.equal(pixels, images['train'][row][0])]
        assert not wrong, epoch
    assert orders[0] != orders[1]
    batches = zip(*map(list, validation))
    rows = [row for parts in batches for _, labels in parts for row in labels.tolist()]
    assert rows[:23] == list(range(23)) and len(rows) <= 24  # gather_for_metrics leaves out what is too much


@pytest.fixture(scope='module')
def photo():
    """A JPEG of 200 x 150 pixels, smooth with edges."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(256, size=(8, 10, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((200, 150), Image.Resampling.BICUBIC)).copy()
    pixels[40:90, 60:150] = 255 - pixels[40:90, 60:150]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG')
    return file.getvalue()


@pytest.mark.parametrize('crop, interpolation', [
    ('rrc', 'bilinear'), ('rrc', 'bicubic'), ('rrc', 'random'), ('pad', 'bilinear')])
@pytest.mark.parametrize('aa', [None, 'rand-m9-mstd0.5-inc1', '3a'])
def test_training_pixels_are_timms(aa, crop, interpolation, photo):
    """From the same random numbers, within a rounding."""
    recipe = make_recipe('photo', crop=crop, hflip=0.5, aa=aa)
    config = dict(interpolation=interpolation, mean=(0.5, 0.4, 0.3))
    transform = _loaders.train_transform(recipe, 96, config)
    timms = plain_transform(recipe, 96, config)
    plain = decode(photo)
    for seed in range(20):
        with _seeded(seed):
            pixels = transform(decode_pixels(photo))
        with _seeded(seed):
            expected = timms(plain)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 96, 96)
        wrong = (pixels.int() - expected.int()).abs()
        if aa is None:
            assert wrong.max() <= (1 if interpolation == 'bilinear' else 2)
        assert wrong.float().mean() < 0.1  # posterize and equalize make much of a little


@pytest.mark.parametrize('small', [dict(scale=[1e-9, 1e-9]), dict(ratio=[1e-9, 1e-9]), dict(ratio=[1e9, 1e9])])
def test_a_crop_has_one_pixel_at_least(small):
    transform = _loaders.train_transform(
        make_recipe('photo', crop='rrc', **small), 8, dict(interpolation='bilinear', mean=(0.5, 0.4, 0.3)))
    assert transform(torch.zeros(3, 8, 8, dtype=torch.uint8)).shape == (3, 8, 8)


@pytest.mark.parametrize('crop_mode', ['center', 'squash', 'border'])
@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_validation_pixels_are_timms(interpolation, crop_mode, photo):
    config = dict(
        input_size=(3, 96, 96), interpolation=interpolation, crop_pct=0.875, crop_mode=crop_mode, mean=(0.5, 0.4, 0.3))
    timms = timm.data.create_transform(**config, is_training=False, use_prefetcher=True)
    expected = timms(decode(photo))
    pixels = _loaders.eval_transform(config)(decode_pixels(photo))
    assert pixels.dtype == torch.uint8 and (pixels.int() - expected.int()).abs().max() <= 1


@pytest.mark.slow
def test_loading_processes_can_be_spawned(numbered, fresh_accelerator):
    """As on Windows and macOS: what they are given can be pickled, and the epoch reaches them."""
    recipe = make_recipe('noise', batch_size=12, crop='rrc', aa='rand-m5', num_workers=1, seed=3)
    images = {split: LabelledImages(rows, split, split, seed=recipe.seed) for split, rows in numbered.items()}
    loader = loaders_of(recipe, images, 0, 1)[0]
    loader.base_dataloader.multiprocessing_context = 'spawn'
    for epoch in 0, 1:
        for pixels, rows in _loaders.batches_of(loader, epoch):
            assert all(torch.equal(image, images['train'][row][0]) for image, row in zip(pixels, rows.tolist()))


@pytest.mark.parametrize('processes', [1, 2, 3])
def test_repeated_augmentation_shows_fewer_images_more_often(processes, numbered, fresh_accelerator):
    recipe = make_recipe('noise', batch_size=12, crop='rrc', aug_repeats=3, seed=3)
    images = {split: LabelledImages(rows, split, split, seed=recipe.seed) for split, rows in numbered.items()}
    loaders = [loaders_of(recipe, images, process, processes)[0] for process in range(processes)]
    orders = []
    for epoch in 0, 1:
        parts = [list(_loaders.batches_of(loader, epoch)) for loader in loaders]
        order = [row for batches in zip(*parts) for _, labels in batches for row in labels.tolist()]
        rows, counts = np.unique(order, return_counts=True)
        assert len(order) == 48 and len(rows) == 16 and set(counts) == {3}
        assert all(order[i] != order[i + 1] for i in range(0, 48, 2))  # or mixup would mix a row with itself
        pixels = {image.numpy().tobytes() for part in parts for images_, _ in part for image in images_}
        assert len(pixels) > 40  # each time in another way, though crops of so small images can be equal
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.mark.parametrize('processes, num_workers, aug_repeats', [
    (1, 0, 1), (2, 2, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (1, 0, 3), (1, 2, 1), (1, 2, 3), (2, 0, 1), (2, 0, 3), (2, 2, 1))),
])
def test_an_epoch_goes_on_at_any_batch_with_the_same_images(
        processes, num_workers, aug_repeats, digits_folder, fresh_accelerator):
    recipe = make_recipe(digits_folder, aa='rand-m5', num_workers=num_workers, aug_repeats=aug_repeats)
    images = open_images(recipe)
    data_config = dict(resolve_data_config(dict(img_size=8)), input_size=(3, 8, 8))
    loader = _loaders.make_loaders(Accelerator(cpu=True), recipe, images, data_config)[0]
    for process in range(processes):
        prepared = prepare_data_loader(
            loader, num_processes=processes, process_index=process, split_batches=True, use_seedable_sampler=True,
            data_seed=recipe.seed, put_on_device=False, rng_types=['generator'])
        states = torch.get_rng_state(), np.random.get_state()[1].copy()
        epochs = [list(_loaders.batches_of(prepared, epoch)) for epoch in range(3)]
        rest = list(_loaders.batches_of(prepared, 1, first=2))
        assert [len(epoch) for epoch in epochs] == [4, 4, 4] and len(rest) == 2
        for (pixels, labels), (expected, expected_labels) in zip(rest, epochs[1][2:]):
            assert torch.equal(labels, expected_labels) and torch.equal(pixels, expected)
        assert not torch.equal(epochs[1][2][0], epochs[2][2][0])
        assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
