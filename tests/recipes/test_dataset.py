"""Datasets as people have them: folders, text labels, configurations, slices, held-out images, classes by name."""
import json
import os
import shutil

import _data
import _dataset
import _labels
import _matching
import datasets
import evaluate
import numpy as np
import pytest
import timm
import tiny
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import make_recipe, run

from fmd_timm.hub import save_for_hub
from fmd_timm.model_card import make_card

IMAGE = Image.fromarray(np.zeros((8, 8), np.uint8))
LETTERS = datasets.ClassLabel(names=['a', 'b', 'c'])
TEXT, NUMBER = datasets.Value('string'), datasets.Value('int64')


def make_rows(labels, feature=LETTERS, **columns):
    features = dict(image=datasets.Image(), label=feature, **{name: kind for name, (kind, _) in columns.items()})
    values = dict(image=[IMAGE] * len(labels), label=labels, **{name: list for name, (_, list) in columns.items()})
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def open_parts(folder, parts, **changes):
    for split, rows in parts.items():
        rows.to_parquet(folder / f'{split}.parquet')
    return _data.open_images(make_recipe(folder, batch_size=1, **changes))


def read(rows, **kwargs):
    return _data.LabelledImages(rows, 'train', "set split 'train'", **kwargs)


def write_files(folder, *names, shade=0):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), shade, np.uint8)).save(folder / name)


# Labels


def test_labels_of_text_are_classes_in_the_order_of_text_of_both_splits(tmp_path):
    images = open_parts(tmp_path, dict(
        train=make_rows(['dog', 'ant', 'dog'], TEXT, image_id=(NUMBER, [7, 8, 9])),
        test=make_rows(['cat', 'dog'], TEXT, image_id=(NUMBER, [1, 2]))))
    for part in images.values():
        assert part.label_column == 'label' and part.label_names == ['ant', 'cat', 'dog']
    assert images['train'].labels() == [2, 0, 2] and images['validation'].labels() == [1, 2]
    assert images['train'].read(1)[1] == 0


def test_a_table_of_metadata_has_labels(tmp_path):
    for split in 'train', 'test':
        write_files(tmp_path, f'{split}/1.png', f'{split}/2.png')
        (tmp_path / split / 'metadata.csv').write_text('file_name,label,age\n1.png,cat,3\n2.png,dog,5\n')
    images = _data.open_images(make_recipe(tmp_path, batch_size=1))
    assert images['train'].label_names == ['cat', 'dog'] and sorted(images['train'].labels()) == [0, 1]


def test_a_text_that_is_missing_is_named_with_its_row():
    for missing in None, '':
        with pytest.raises(SystemExit, match=f'label {missing!r} in row 1 is outside the 1 classes, expected a text'):
            read(make_rows(['a', missing], TEXT))


@pytest.mark.parametrize('feature, values', [(NUMBER, [3, 1]), (TEXT, ['x', 'y'])])
def test_a_column_is_labels_only_if_its_name_or_somebody_says_so(feature, values):
    rows = make_rows(values, feature).rename_column('label', 'age')
    with pytest.raises(SystemExit, match='found no column of labels; .*name one with --label-column .*: age'):
        read(rows)
    assert read(rows, label_column='age').label_column == 'age'
    assert read(rows.rename_column('age', 'Target')).label_column == 'Target'


def test_integers_that_number_images_are_no_classes():
    with pytest.raises(SystemExit, match="column 'label' has integers up to 100000, expected labels from 0 on"):
        read(make_rows([5, 100_000], NUMBER))


def test_classes_of_splits_in_different_orders_are_matched_by_name(monkeypatch):
    other = datasets.ClassLabel(names=['c', 'a'])
    parts = datasets.DatasetDict(train=make_rows([0, 1, 2]), test=make_rows([0, 1, 1], other))
    monkeypatch.setattr(_data, 'open_dataset', lambda *args: parts)
    images = _data.open_images(make_recipe('set', batch_size=1))
    assert images['validation'].labels() == [2, 0, 0] and images['validation'].label_names == ['a', 'b', 'c']


def test_files_of_a_folder_that_have_different_classes_are_refused(tmp_path):
    """`datasets` reads the numbers of all of them with the names of the first."""
    other = datasets.ClassLabel(names=['c', 'a'])
    with pytest.raises(SystemExit, match=r"column 'label' of .*test.parquet has the classes 'c', 'a', of others 'a', "):
        open_parts(tmp_path, dict(train=make_rows([0, 1]), test=make_rows([0, 1], other)))


def test_plain_integers_have_the_classes_of_both_splits(tmp_path):
    images = open_parts(tmp_path, dict(train=make_rows([0, 1], NUMBER), test=make_rows([12], NUMBER)))
    assert images['train'].label_names == images['validation'].label_names == [str(i) for i in range(13)]


def test_images_of_a_class_that_training_does_not_know_are_refused(monkeypatch):
    other = datasets.ClassLabel(names=['a', 'd'])
    parts = datasets.DatasetDict(train=make_rows([0, 1, 2]), test=make_rows([0, 1], other))
    monkeypatch.setattr(_data, 'open_dataset', lambda *args: parts)
    with pytest.raises(SystemExit, match="split 'test' has images of classes that .*'train' does not have: 'd'$"):
        _data.open_images(make_recipe('set', batch_size=1))


# Splits


def test_parts_of_splits_are_chosen_as_datasets_does_it(tmp_path):
    parts = dict(train=make_rows([0, 1, 2] * 10), test=make_rows([0] * 5))
    images = open_parts(tmp_path, parts, train_split='train[:90%]', validation_split='train[90%:]')
    assert (images['train'].labels(), images['validation'].labels()) == ([0, 1, 2] * 9, [0, 1, 2])
    assert images['validation'].split == 'train[90%:]'
    images = open_parts(tmp_path, parts, train_split='train[:6]+test[2:]', validation_split='test[:2]')
    assert images['train'].labels() == [0, 1, 2, 0, 1, 2, 0, 0, 0]
    for train, validation in ('train', 'train'), ('train[:20]', 'train[19:]'), ('train+test', 'test[4:]'):
        with pytest.raises(SystemExit, match='--validation-split must have no image of --train-split'):
            open_parts(tmp_path, parts, train_split=train, validation_split=validation)
    for split, message in ('dev', "has no split 'dev'; it has train, test"), ('train[', "no split 'train\\['"), (
            'train[5:5]', "has no images in split 'train\\[5:5\\]'"):
        with pytest.raises(SystemExit, match=message):
            open_parts(tmp_path, parts, train_split=split)


def test_a_share_of_each_class_is_held_out_by_the_seed(tmp_path):
    rows = make_rows([0] * 40 + [1] * 20 + [2] * 10, number=(NUMBER, list(range(70))))
    held_out = {}
    for seed in 0, 0, 1:
        images = open_parts(tmp_path, dict(train=rows), validation_share=0.1, seed=seed)
        train, validation = images['train'], images['validation']
        assert np.bincount(validation.targets).tolist() == [4, 2, 1] and len(train) == 63
        assert sorted([*train.indices, *validation.indices]) == list(range(70))
        held_out.setdefault(seed, validation.indices.tolist())
        assert held_out[seed] == validation.indices.tolist()
        assert validation.split == f'0.1 of train by seed {seed}'
    assert held_out[0] != held_out[1]
    with pytest.raises(SystemExit, match="has no split validation or .*it has train: .*--validation-share 0.1"):
        open_parts(tmp_path, dict(train=rows))
    with pytest.raises(SystemExit, match="--validation-share 0.001: .* cannot be divided: "):
        open_parts(tmp_path, dict(train=rows), validation_share=0.001)


def test_of_several_configurations_one_must_be_named(tmp_path):
    for config in 'red', 'blue':
        (tmp_path / config).mkdir()
        make_rows([0, 1]).to_parquet(tmp_path / config / 'train.parquet')
    (tmp_path / 'README.md').write_text('---\nconfigs:\n' + ''.join(
        f'- config_name: {config}\n  data_files: {config}/train.parquet\n' for config in ('red', 'blue')) + '---\n')
    for config in None, 'green':
        with pytest.raises(SystemExit, match='has several configurations: name one with --dataset-config: red, blue'):
            _dataset.open_dataset(str(tmp_path), config)
    assert len(_dataset.open_dataset(str(tmp_path), 'red')['train']) == 2


# Folders of images


def test_splits_are_not_taken_for_classes(tmp_path):
    write_files(tmp_path, 'train/1.png', 'train/2.png', 'test/1.png')
    with pytest.raises(SystemExit, match='its classes are test and train, which are splits: .*test/cat/1.jpg'):
        _data.open_images(make_recipe(tmp_path, batch_size=1))
    with pytest.raises(SystemExit, match='its classes are test and train, which are splits'):
        read(_dataset.open_dataset(str(tmp_path))['test'])


def test_files_without_labels_are_refused_with_what_to_do(tmp_path):
    write_files(tmp_path, '1.png', '2.png')
    with pytest.raises(SystemExit, match='found no column of labels; it has image .*a folder for each class.*metadata'):
        _data.open_images(make_recipe(tmp_path, batch_size=1, validation_share=0.5))


def test_a_file_that_comes_in_both_splits_is_noticed(tmp_path):
    """A class that is called like a split, which `datasets` looks for anywhere in a path."""
    write_files(tmp_path, 'train/train/1.png', 'train/bus/2.png', 'val/train/3.png', 'val/bus/4.png')
    with pytest.raises(SystemExit, match="have images in common: '.*/val/train/3.png'"):
        _data.open_images(make_recipe(tmp_path, batch_size=1))


def test_a_folder_is_listed_once_however_many_files_it_has(tmp_path, monkeypatch):
    """`datasets` would list all its files for each of 46 patterns."""
    write_files(tmp_path, *(f'{split}/{label}/1.png' for split in ('train', 'test') for label in 'ab'))
    (tmp_path / 'README.md').write_text('')  # so that it looks itself
    listed, scandir = [], os.scandir

    def counted(path):
        listed.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', counted)
    for _ in range(2):
        assert len(_dataset.open_dataset(str(tmp_path))['train']) == 2
    assert 1 <= listed.count(str(tmp_path / 'train' / 'a')) < 10
    write_files(tmp_path, 'train/b/2.png')
    assert len(_dataset.open_dataset(str(tmp_path))['train']) == 3


CLASSES = 'train/cat/1.png', 'train/cat/train_2.JPG', 'train/dog-2/1.png', 'val/cat/1.png', 'val/dog-2/3.bmp'


@pytest.mark.parametrize('names, is_plain', [
    (CLASSES, True), (('cat/1.png', 'cat-dog/2.png', 'dog/1.png'), True), (('train/a/1.png', 'valid/a/1.png'), True),
    ((*CLASSES, 'val/train-station/1.png'), False), ((*CLASSES, 'val/cat/more/1.png'), False),
    ((*CLASSES, 'valid/cat/1.png'), False), ((*CLASSES, 'new/cat/1.png'), False), ((*CLASSES, '1.png'), False),
    ((*CLASSES, '.hidden/cat/1.png'), False), ((*CLASSES, 'val/cat/.2.png'), False),
    ((*CLASSES, 'val/__cat/2.png'), False), (('cat/1.png', 'dog/test_1.png'), False), (('1.png', '2.png'), False),
    (('train/cat/1.png', 'test/1.png'), False),
])
@pytest.mark.parametrize('other', [None, 'README.md', 'train/metadata.csv', 'train/cat/notes.txt'])
def test_a_folder_of_classes_is_what_datasets_makes_of_it(names, is_plain, other, tmp_path):
    write_files(tmp_path, *names)
    if other:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        table = 'file_name,age\n' + ''.join(f'{name[6:]},3\n' for name in names if name.startswith('train/'))
        (tmp_path / other).write_text(table if other.endswith('csv') else '')
    assert bool(_dataset.find_class_files(str(tmp_path))) == (is_plain and not other)
    try:
        expected = datasets.load_dataset(str(tmp_path))
    except Exception:
        with pytest.raises(SystemExit, match='could not be loaded'):
            _dataset.open_dataset(str(tmp_path))
        return
    found = _dataset.open_dataset(str(tmp_path))
    assert list(found) == list(expected)
    for split, rows in found.items():
        assert rows.features == expected[split].features and rows.info.builder_name == 'imagefolder'
        tables = [dataset.with_format('arrow')[:] for dataset in (rows, expected[split])]
        assert tables[0].equals(tables[1])


@pytest.mark.parametrize('name', ['my flowers', 'flowers (2024)', 'фото'])
def test_a_folder_of_any_name_can_be_trained_on_and_published(name, tmp_path, fresh_accelerator):
    write_files(tmp_path / name, *(f'{c}/{i}.png' for c in ('rose', 'tulip') for i in range(10)))
    record = run(make_recipe(tmp_path / name, epochs=1, batch_size=4, validation_share=0.2), tmp_path / 'run')
    assert (record['dataset'], record['train_images'], record['validation_images']) == (name, 16, 4)
    card = make_card(record, 'acme/flowers')
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_name) == ('imagefolder', name)


def test_the_current_folder_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _dataset.dataset_name('.') == tmp_path.name and _dataset.dataset_name('acme/digits') == 'acme/digits'


# A checkpoint and a dataset


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A network whose answer is the brightness of the image, in an order of classes that is not that of text."""
    folder = tmp_path_factory.mktemp('checkpoint')
    save_network(folder, ['dark', 'light', 'gray'])
    return folder


def save_network(folder, names):
    torch.manual_seed(0)
    network = timm.create_model(tiny.NAME, num_classes=3)
    save_for_hub(network, folder, dict(label_names=names) if names else None, data_config=dict(input_size=(3, 8, 8)))


def score(monkeypatch, capsys, checkpoint, folder, **options):
    """What evaluate.py prints, with a network that is right about what dark, light and gray are."""
    monkeypatch.setattr(evaluate, 'use_all_cores', lambda accelerator: None)
    monkeypatch.setattr(evaluate, 'time_inference', lambda *args: dict(
        infer_ms_per_image=1.0, infer_images_per_second=1.0, infer_batch=1))
    load = evaluate.load_network

    def load_right(*args):
        network = load(*args)
        shades = torch.tensor([0.0, 255.0, 128.0])
        network.forward = lambda images: -(images.float().mean((1, 2, 3))[:, None] - shades.to(images.device)).abs()
        return network

    monkeypatch.setattr(evaluate, 'load_network', load_right)
    monkeypatch.setattr(evaluate, 'Normalize', lambda *args: torch.nn.Identity())
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = [str(checkpoint), '--dataset', str(folder), '--num-workers', '0']
    evaluate.main(**vars(evaluate.parse_evaluate(arguments)))
    return capsys.readouterr().out


@pytest.mark.parametrize('classes', [('dark', 'light'), ('gray', 'light'), ('dark', 'gray', 'light'), ('light',)])
def test_the_classes_of_a_checkpoint_are_found_by_name(
        classes, checkpoint, tmp_path, monkeypatch, capsys, fresh_accelerator):
    shades = dict(dark=0, light=255, gray=128)
    for name in classes:
        write_files(tmp_path, f'test/{name}/1.png', f'test/{name}/2.png', shade=shades[name])
    if len(classes) == 1:  # a single folder is no class for `datasets`
        write_files(tmp_path, 'train/dark/1.png')
    out = score(monkeypatch, capsys, checkpoint, tmp_path)
    assert 'top-1: 100.00' in out and 'numbers' not in out


def test_a_network_is_scored_on_what_its_run_held_out(
        digits_folder, tmp_path, monkeypatch, capsys, fresh_accelerator):
    shutil.copytree(digits_folder, tmp_path / 'set')
    (tmp_path / 'set' / 'test.parquet').unlink()

    def evaluate_run(*options):
        monkeypatch.setattr(evaluate, 'use_all_cores', lambda accelerator: None)
        AcceleratorState._reset_state(reset_partial_state=True)
        evaluate.main(**vars(evaluate.parse_evaluate([
            str(tmp_path / 'run'), '--dataset', str(tmp_path / 'set'), '--num-workers', '0', *options])))
        return capsys.readouterr().out.splitlines()

    record = run(make_recipe(
        tmp_path / 'set', epochs=1, seed=3, train_split='train[:60]', validation_share=0.4), tmp_path / 'run')
    capsys.readouterr()
    found = evaluate_run('--validation-share', '0.4')
    for line in f'top-1: {record["top1"]:.2f}', f'loss: {record["loss"]:.4f}', 'images: 24':
        assert line in found
    for options, message in (
            (['--validation-share', '0.5'], '--validation-share must be 0.4, as in the run of .*run, got 0.5: it was '),
            (['--validation-share', '0.4', '--seed', '0'], '--seed must be 3, .* got 0: it was trained on some'),
            (['--validation-share', '0.4', '--split', 'train'], r'--split must be train\[:60\], .* got train')):
        with pytest.raises(SystemExit, match=message):
            evaluate_run(*options)
    record['recipe']['validation_share'] = None
    (tmp_path / 'run' / 'result.json').write_text(json.dumps(record))
    with pytest.raises(SystemExit, match='--validation-share must be left out: the run of .*run held out no images'):
        evaluate_run('--validation-share', '0.4')
    (tmp_path / 'run' / 'result.json').unlink()
    with pytest.raises(SystemExit, match='--validation-share needs --seed, that of the training run: .*run has no'):
        evaluate_run('--validation-share', '0.4')
    assert found[:4] == evaluate_run('--validation-share', '0.4', '--seed', '3', '--split', 'train[:60]')[:4]


@pytest.mark.parametrize('options, message', [
    (['--validation-share', '1'], '--validation-share must be above 0 and below 1, got 1.0'),
    (['--validation-share', '0.1', '--streaming'], '--validation-share must be left out with --streaming, which .*'),
    (['--seed', '1'], '--seed has no effect: it needs --validation-share'),
])
def test_what_holds_nothing_out_is_refused(options, message):
    with pytest.raises(SystemExit, match=f'^{message}$'):
        evaluate.parse_evaluate(['run', '--dataset', 'digits', *options])


def test_a_class_that_the_checkpoint_does_not_have_is_named(
        checkpoint, tmp_path, monkeypatch, capsys, fresh_accelerator):
    write_files(tmp_path, 'test/dark/1.png', 'test/cat/1.png')
    with pytest.raises(SystemExit, match="has images of classes that checkpoint .* does not have: 'cat'$"):
        score(monkeypatch, capsys, checkpoint, tmp_path)


def test_classes_without_names_are_matched_by_number_and_it_is_said(
        checkpoint, tmp_path, monkeypatch, capsys, fresh_accelerator):
    dark, light, gray = (Image.fromarray(np.full((8, 8), shade, np.uint8)) for shade in (0, 255, 128))
    rows = datasets.Dataset.from_dict(
        dict(image=[light, dark, gray], label=[1, 0, 2]),
        features=datasets.Features(image=datasets.Image(), label=NUMBER))
    (tmp_path / 'numbers').mkdir()
    rows.to_parquet(tmp_path / 'numbers' / 'test.parquet')
    out = score(monkeypatch, capsys, checkpoint, tmp_path / 'numbers')
    assert 'top-1: 100.00' in out and 'matched by their numbers: the dataset has no names' in out

    save_network(tmp_path / 'nameless', None)
    write_files(tmp_path / 'three', 'test/1/1.png', shade=0)
    write_files(tmp_path / 'three', 'test/2/1.png', shade=255)
    with pytest.raises(SystemExit, match='has 2 classes, checkpoint .* was trained for 3, whose names'):
        score(monkeypatch, capsys, tmp_path / 'nameless', tmp_path / 'three')
    write_files(tmp_path / 'three', 'test/3/1.png', shade=128)
    out = score(monkeypatch, capsys, tmp_path / 'nameless', tmp_path / 'three')
    assert 'top-1: 100.00' in out and 'the checkpoint has no names' in out


def test_imagenets_names_belong_to_its_checkpoints():
    network = timm.create_model('test_resnet')
    images = read(make_rows([0, 1, 2], datasets.ClassLabel(names=['n01443537', 'n01440764', 'n02123045'])))
    _matching.match_classes(images, network, 'checkpoint', pytest.fail)
    assert images.labels() == [1, 0, 281]


def test_a_name_that_two_classes_have_is_no_name():
    assert _labels.new_numbers(['crane', 'cat'], ['cat', 'crane', 'crane']).tolist() == [-1, 0]
