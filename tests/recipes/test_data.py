"""recipes/_data.py: datasets of all shapes become the same batches; bad ones are refused with their row or column."""
import io
import random

import _data
import _dataset
import _loaders
import datasets
import numpy as np
import pytest
import timm
import torch
from _recipe import Recipe
from hub_server import Commit, Repo
from PIL import Image
from torch.utils.data import DataLoader


def picture(value=0, mode='RGB'):
    return Image.fromarray(np.full((8, 8) + (() if mode == 'L' else (3,)), value, np.uint8), mode)


def make_rows(columns, **features):
    return datasets.Dataset.from_dict(columns, features=datasets.Features(**features))


def open_images(rows, **kwargs):
    return _data.LabelledImages(rows, 'train', "set split 'train'", **kwargs)


@pytest.fixture(scope='module')
def digits():
    return _dataset.load_digits()


def test_digits_are_all_of_scikit_learns_without_overlap(digits):
    pixels = [np.asarray(image).tobytes() for split in digits.values() for image in split['image']]
    assert (len(digits['train']), len(digits['test']), len(set(pixels))) == (1437, 360, 1797)
    assert digits['test'].features['label'].names == [str(digit) for digit in range(10)]


def test_a_folder_of_images_by_class_is_a_dataset(tmp_path):
    for split in 'train', 'test':
        for name in 'cat', 'dog':
            (tmp_path / split / name).mkdir(parents=True)
            picture().save(tmp_path / split / name / '0.png')
    images = open_images(_dataset.open_dataset(str(tmp_path))['train'])
    assert images.label_names == ['cat', 'dog'] and len(images) == 2
    images.read(1)


def train_transform(**options):
    return _loaders.train_transform(Recipe(**options), 8, dict(mean=(0.5,) * 3, interpolation='bilinear'))


def test_augmentation_depends_on_seed_epoch_and_row_but_not_on_the_workers(digits):
    transform = train_transform(crop='pad', aa='rand-m9-mstd0.5-inc1')
    images = open_images(digits['train'].select(range(32)), transform=transform, seed=3)

    def epoch(number, workers):
        images.set_epoch(number)
        return torch.cat([batch for batch, _ in DataLoader(images, batch_size=8, num_workers=workers)])

    first = epoch(0, 0)
    assert torch.equal(epoch(0, 2), first)
    assert not torch.equal(epoch(1, 0), first)
    loader = DataLoader(images, batch_size=8, num_workers=1, persistent_workers=True)
    images.set_epoch(0)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), first)
    images.set_epoch(1)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), epoch(1, 0))


def test_reading_images_leaves_the_global_random_states_alone(digits):
    transform = train_transform(aa='rand-m9-mstd0.5-inc1')
    images = open_images(digits['train'], transform=transform)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    images[0]
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_evaluation_equals_timms_own_pipeline(digits):
    config = timm.data.resolve_data_config(dict(input_size=(3, 32, 32), mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4)))
    image = digits['test'][0]['image'].convert('RGB')
    expected = timm.data.create_transform(**config)(image)
    images = open_images(digits['test'], transform=_loaders.eval_transform(config))
    batch, _ = next(iter(DataLoader(images, batch_size=1)))
    assert batch.dtype == torch.uint8
    torch.testing.assert_close(_loaders.Normalize(config['mean'], config['std'])(batch)[0], expected)


def test_gray_and_rotated_images_come_out_upright_and_in_colour():
    wide = Image.fromarray(np.zeros((4, 6), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    file = io.BytesIO()
    wide.save(file, 'JPEG', exif=exif)
    rows = make_rows({'image': [{'bytes': file.getvalue(), 'path': None}], 'label': [0]},
                     image=datasets.Image(), label=datasets.ClassLabel(names=['one']))
    image, label = open_images(rows).read(0)
    assert image.shape == (3, 6, 4) and label == 0


def test_columns_are_found_by_type_whatever_their_names():
    rows = make_rows({'id': [7], 'img': [picture()], 'fine': [1]},
                     id=datasets.Value('int64'), img=datasets.Image(), fine=datasets.ClassLabel(names=['a', 'b']))
    images = open_images(rows)
    assert (images.image_column, images.label_column, images.label_names) == ('img', 'fine', ['a', 'b'])


def test_plain_integers_are_labels_too():
    rows = make_rows({'img': [picture()] * 3, 'y': [0, 2, 1]}, img=datasets.Image(), y=datasets.Value('uint8'))
    assert open_images(rows).label_names == ['0', '1', '2']


def test_of_several_label_columns_one_must_be_named():
    label = datasets.ClassLabel(names=['a', 'b'])
    rows = make_rows({'img': [picture()], 'fine': [1], 'coarse': [0]}, img=datasets.Image(), fine=label, coarse=label)
    with pytest.raises(SystemExit, match='name one of its label columns with --label-column: fine, coarse'):
        open_images(rows)
    assert open_images(rows, label_column='coarse').label_column == 'coarse'


@pytest.mark.parametrize('columns, features, message', [
    ({'text': ['a'], 'label': [0]}, dict(text=datasets.Value('string'), label=datasets.ClassLabel(names=['a'])),
     r"set split 'train': found no column of images; it has text \(Value\), label \(ClassLabel\)"),
    ({'img': [picture()]}, dict(img=datasets.Image()), r'found no column of labels; it has img \(Image\)'),
    ({'img': [picture()] * 3, 'label': [0, 1, -1]}, dict(img=datasets.Image(), label=datasets.Value('int64')),
     'label -1 in row 2 is outside the 2 classes, expected 0 to 1'),
    ({'img': [picture()] * 2, 'label': [0, None]},
     dict(img=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b'])), 'label None in row 1 is outside'),
])
def test_a_dataset_that_cannot_be_trained_on_is_refused(columns, features, message):
    with pytest.raises(SystemExit, match=message):
        open_images(make_rows(columns, **features))


def test_an_image_that_cannot_be_decoded_is_named_with_its_row():
    file = io.BytesIO()
    picture().save(file, 'PNG')
    good = {'bytes': file.getvalue(), 'path': None}
    rows = make_rows({'img': [good, good, {'bytes': file.getvalue()[:40], 'path': None}], 'label': [0, 0, 0]},
                     img=datasets.Image(), label=datasets.ClassLabel(names=['a']))
    images = open_images(rows)
    with pytest.raises(ValueError, match="^set split 'train': the image in row 2 cannot be decoded: "):
        images[2]


def test_missing_and_gated_datasets_say_what_to_do(hub):
    hub.repos['datasets/acme/gated'] = Repo()
    hub.repos['datasets/acme/gated'].commits.append(Commit({'data/train-00000-of-00001.parquet': b''}, 'data'))
    hub.gate('datasets/acme/gated')
    for name, message in [
        ('acme/nothing', 'was not found, expected .digits., a folder of parquet files or images, or'),
        ('acme/gated', 'is gated: ask for access on its page'),
    ]:
        with pytest.raises(SystemExit, match=f"dataset '{name}' {message}"):
            _dataset.open_dataset(name)
