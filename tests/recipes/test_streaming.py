"""recipes/_streaming.py: images that are read from parquet files on the Hub when they are needed, and kept nowhere."""
import dataclasses
import io
import json
import os
import types
from pathlib import Path

import _data
import _dataset
import _loaders
import _streaming
import datasets
import evaluate
import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import train
from _recipe_checks import check_recipe
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from hub_server import Commit, Repo
from test_dataset import make_rows, write_files
from test_distributed import PATH
from timm.data import resolve_data_config
from tiny import make_recipe, run

CONFIG = dict(resolve_data_config(dict(img_size=8)), input_size=(3, 8, 8))
NUMBERS = datasets.ClassLabel(names=[str(number) for number in range(123)])


def parquet(rows, rows_per_group=4):
    file = io.BytesIO()
    table = datasets.table.embed_table_storage(rows.data.table)
    pq.write_table(table.replace_schema_metadata(rows.features.arrow_schema.metadata), file, rows_per_group)
    return file.getvalue()


def numbered(numbers):
    """Images of noise, whose labels are their numbers."""
    noise = [np.random.default_rng(number).integers(256, size=(12, 12, 3), dtype=np.uint8) for number in numbers]
    features = datasets.Features(image=datasets.Image(), label=NUMBERS)
    return datasets.Dataset.from_dict(dict(image=noise, label=numbers), features=features)


def upload(hub, files, key='acme/numbers'):
    hub.repos[f'datasets/{key}'] = Repo()
    hub.repos[f'datasets/{key}'].commits.append(Commit(files, 'data'))
    return key


@pytest.fixture
def numbers(hub):
    """61 images to train on in 3 files and 16 row groups, 23 to validate on."""
    parts = [range(20), range(20, 47), range(47, 61)]
    files = {f'data/train-0000{i}-of-00003.parquet': parquet(numbered(part)) for i, part in enumerate(parts)}
    return upload(hub, {**files, 'data/test-00000-of-00001.parquet': parquet(numbered(range(100, 123)))})


def loaders_of(recipe, images, process, count):
    """Those that one of several processes gets."""
    Accelerator(cpu=True)
    all_of_them = types.SimpleNamespace(num_processes=count, device=torch.device('cpu'))
    return [prepare_data_loader(
        loader, num_processes=count, process_index=process, split_batches=True, use_seedable_sampler=True,
        data_seed=recipe.seed, put_on_device=False, rng_types=['generator'],
    ) for loader in _loaders.make_loaders(all_of_them, recipe, images, CONFIG)]


@pytest.mark.parametrize('count, num_workers', [
    (1, 0), (3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 2), (2, 0), (2, 2), (3, 0))),
])
def test_processes_and_workers_share_out_the_images_of_files_that_they_do_not_divide(
        count, num_workers, numbers, fresh_accelerator):
    """Each comes once an epoch, as it would from the disk, and in an evaluation each is counted once."""
    recipe = make_recipe(numbers, streaming=True, batch_size=12, hflip=0.5, aa='rand-m5', num_workers=num_workers)
    images, copied = _data.open_images(recipe), _data.open_images(make_recipe(numbers, batch_size=12))['train']
    train, validation = zip(*(loaders_of(recipe, images, process, count) for process in range(count)))
    copied.transform = images['train'].transform
    orders = []
    for epoch in 0, 1:
        parts = [list(_loaders.batches_of(loader, epoch)) for loader in train]
        assert [len(labels) for part in parts for _, labels in part] == [12 // count] * 5 * count
        read = {label: pixels for part in parts for batch in part for pixels, label in zip(batch[0], batch[1].tolist())}
        copied.set_epoch(epoch)
        assert len(read) == 60  # the last one doesn't fill a batch
        assert all(torch.equal(pixels, copied[number][0]) for number, pixels in read.items())
        orders.append(list(read))
    assert orders[0] != orders[1]
    rows = [label for labels in zip(*validation) for _, part in labels for label in part.tolist()]
    assert sorted(rows[:23]) == list(range(100, 123)) and len(rows) <= 24  # gather_for_metrics leaves out the rest


@pytest.mark.parametrize('count', [1, 2, 3])
def test_each_row_group_is_read_by_one_process(count, numbers, fresh_accelerator):
    recipe = make_recipe(numbers, streaming=True, batch_size=12, crop='rrc')
    images, reads = _data.open_images(recipe), []
    for process in range(count):
        for loader in loaders_of(recipe, images, process, count):
            _streaming.read_group.cache_clear()
            list(loader)
            reads.append(_streaming.read_group.cache_info().misses)
    assert sum(reads[::2]) <= 16 + count - 1  # where the parts of two meet, it is in both
    assert sum(reads[1::2]) <= 6 + 2 * count  # and some fill the last batch


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('count', [1, 2])
def test_an_epoch_goes_on_at_any_batch_with_the_same_images(count, num_workers, numbers, fresh_accelerator):
    recipe = make_recipe(numbers, streaming=True, batch_size=12, aa='rand-m5', num_workers=num_workers)
    loader = loaders_of(recipe, _data.open_images(recipe), count - 1, count)[0]
    expected = list(_loaders.batches_of(loader, 3))
    rest = list(_loaders.batches_of(loader, 3, first=2))
    assert len(rest) == 3
    for batch, other in zip(expected[2:], rest):
        assert all(map(torch.equal, batch, other))


def test_two_processes_train_and_evaluate_without_a_copy_on_the_disk(numbers, tmp_path, hub):
    env = dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)
    command = [
        tiny.__file__, 'digits', '--model', tiny.NAME, '--dataset', numbers, '--streaming', '--epochs', 2,
        '--batch-size', 12, '--num-workers', 0, '--crop', 'rrc', '--tracker', 'none', '--output', tmp_path]
    for done in processes.launch(2, *command, env=env):
        assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / 'result.json').read_text())
    assert (record['train_images'], record['validation_images'], record['device_count']) == (61, 23, 2)
    assert record['unread_images'] == dict(train=None, validation=None) and record['num_classes'] == 123
    copies = [path for path in Path(os.environ['HF_HOME']).rglob('*') if path.suffix in ('.arrow', '.parquet')]
    assert not copies


def test_the_order_depends_on_the_loading_processes_which_must_stay_the_same():
    for streaming in True, False:
        settings = train.run_settings('digits', make_recipe('acme/numbers', streaming=streaming), 2, None, None)
        assert ({'num_workers', 'processes'} <= settings.keys()) == streaming


def test_what_is_evaluated_can_be_streamed_too(digits_folder, tmp_path, monkeypatch, capsys, fresh_accelerator):
    record = run(make_recipe(digits_folder, epochs=1, streaming=True), tmp_path)
    monkeypatch.setattr(evaluate, 'use_all_cores', lambda accelerator: None)
    for options in ['--streaming'], []:
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate.main(**vars(evaluate.parse_evaluate(
            [str(tmp_path), '--dataset', str(digits_folder), '--batch-size', '16', '--num-workers', '0', *options])))
        out = capsys.readouterr().out
        assert 'images: 50\n' in out and f'loss: {record["loss"]:.4f}\n' in out


def test_a_part_of_a_split_is_streamed(numbers):
    recipe = make_recipe(numbers, train_split='train[5:50]+test[:2]', validation_split='train[50:]', batch_size=1)
    streamed, copied = (_data.open_images(dataclasses.replace(recipe, streaming=way)) for way in (True, False))
    for part, images in streamed.items():
        assert [images.read(i)[1] for i in range(len(images))] == copied[part].labels()
        assert images.label_names == NUMBERS.names


def test_each_epoch_has_another_order_in_which_images_leave_their_neighbours(numbers):
    rows = _dataset.open_dataset(numbers, streaming=True)['train']
    order = _streaming.OwnGroups(rows, 12, 1, 1, seed=0)
    first = list(order)
    assert sorted(first) == list(range(61)) and first == list(order)
    order.set_epoch(1)
    assert first != list(order)
    assert first != list(_streaming.OwnGroups(rows, 12, 1, 1, seed=1))
    assert sum(abs(a - b) == 1 for a, b in zip(first, first[1:])) < 20
    assert list(_streaming.OwnGroups(rows, 12, 1, 1)) == list(range(61))
    assert sorted(_streaming.OwnGroups(rows, 62, 2, 3)) == list(range(61))  # fewer than a batch


@pytest.mark.parametrize('options', [
    dict(validation_share=0.1), dict(class_weights=True), dict(on_bad_image='skip'), dict(aug_repeats=3)])
def test_what_needs_all_images_beforehand_is_refused(options):
    name = next(iter(options)).replace('_', '-')
    with pytest.raises(SystemExit, match=f'^--{name} must be left out with --streaming, which reads no image or label'):
        check_recipe(make_recipe('acme/numbers', streaming=True, **options))


def test_what_cannot_be_streamed_is_refused(hub, tmp_path):
    write_files(tmp_path, 'train/a/1.png', 'train/b/1.png')
    text = parquet(make_rows(['cat', 'dog'], datasets.Value('string')))
    other = datasets.ClassLabel(names=['b', 'a'])
    for name, message in [
        (tmp_path, 'reads parquet files, dataset .* is of the kind imagefolder: leave it out, or write .*prepare_data'),
        ('digits', '--streaming reads parquet files, and digits are a part of scikit-learn'),
        (upload(hub, {'train.parquet': text, 'test.parquet': text}, 'acme/text'),
         "split 'train': --streaming needs class labels with their names, column 'label' has string"),
        (upload(hub, {'train.parquet': parquet(make_rows([0, 1])), 'test.parquet': parquet(make_rows([0], other))},
                'acme/two'), "column 'label' of hf://.*.parquet has the classes .*, of others .*: write them with the"),
        (upload(hub, {'train.parquet': b'no such thing'}, 'acme/broken'), "'acme/broken' could not be loaded, "),
        ('acme/nothing', "'acme/nothing' was not found"),
    ]:
        with pytest.raises(SystemExit, match=message):
            _data.open_images(make_recipe(name, streaming=True, batch_size=1))


def test_a_connection_that_breaks_is_tried_again(hub, numbers, monkeypatch):
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # before it is
    images = _data.open_images(make_recipe(numbers, streaming=True))['train']
    for status in None, 503:
        hub.fail('GET .*parquet', status, times=1)
        _streaming.read_group.cache_clear()
        assert images.read(21)[1] == 21


def test_what_cannot_be_read_is_named_with_its_row(hub, numbers):
    images = _data.open_images(make_recipe(numbers, streaming=True))['train']
    hub.gate('datasets/acme/numbers')
    with pytest.raises(SystemExit, match="dataset 'acme/numbers' is gated: ask for access"):
        _dataset.open_dataset(numbers, streaming=True)
    with pytest.raises(_data.BadImage, match="^acme/numbers split 'train': row 21 cannot be read: .*restricted"):
        images[21]
    files = {f'{split}.parquet': parquet(make_rows([0, None, 1])) for split in ('train', 'test')}
    images = _data.open_images(make_recipe(upload(hub, files, 'acme/none'), streaming=True, batch_size=1))['train']
    with pytest.raises(_data.BadImage, match="label None in row 1 is outside the 3 classes, expected 0 to 2$"):
        images[1]
