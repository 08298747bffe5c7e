"""Labelled images for the recipes: the splits and columns of a Hugging Face dataset, and reading an image of them."""
import random
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from _images import BadImage, decode_pixels
from _recipe import VALIDATION_SPLITS, Recipe
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

CHECKED_BYTES = 2**30  # up to this size every image is decoded once before training starts


def load_digits() -> datasets.DatasetDict:
    """scikit-learn's 1,797 real handwritten digits of 8x8 pixels (UCI), 1,437 to train and 360 to validate."""
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = load_sklearn_digits()
    rows = train_test_split(np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)]))
    return datasets.DatasetDict({
        split: datasets.Dataset.from_dict({
            'image': [Image.fromarray((digits.images[i] * 255 / 16).round().astype(np.uint8)) for i in indices],
            'label': digits.target[indices].tolist(),
        }, features=features)
        for split, indices in zip(('train', 'test'), rows)
    })


def open_dataset(name: str) -> datasets.DatasetDict:
    """`name`: 'digits', a folder of parquet files or images that `datasets` can load, or an id on the Hub."""
    if name == 'digits':
        return load_digits()
    expected = "expected 'digits', a folder of parquet files or images, or a dataset id on the Hub"
    try:
        return datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        if 'gated' in str(error):
            raise SystemExit(
                f'dataset {name!r} is gated: ask for access on its page, https://huggingface.co/datasets/{name}, '
                f'then log in with `hf auth login` or set HF_TOKEN'
            ) from error
        raise SystemExit(f'dataset {name!r} was not found, {expected}: {error}') from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = f'{type(error).__name__}: {error}'
        raise SystemExit(f'dataset {name!r} could not be loaded, {expected}: {reason}') from error


class LabelledImages(torch.utils.data.Dataset):
    """One split of a dataset as (image (3, H, W) uint8, label) pairs.

    Random augmentation is seeded by seed, epoch and row, so it is the same for any number of processes and workers.

    Args:
        rows: The images of the split.
        split: Its name.
        name: What to call it in errors.
        transform: (3, H, W) uint8 -> the same, of the size that all have.
        image_column: Column of images; None where the only one is meant.
        label_column: Column of class labels; None where the only one is meant.
        seed: Of the augmentation.

    Raises:
        SystemExit: No image or label column, or a label outside the classes.
    """

    def __init__(
            self,
            rows: datasets.Dataset,
            split: str,
            name: str,
            transform: Callable[[Tensor], Tensor] | None = None,
            image_column: str | None = None,
            label_column: str | None = None,
            seed: int = 0,
    ):
        self.split = split
        self.name = name
        self.image_column = _find_column(rows, name, 'image', image_column, _is_image)
        self.label_column = _find_column(rows, name, 'label', label_column, _is_label)
        labels = rows.data.column(self.label_column)
        feature = rows.features[self.label_column]
        if isinstance(feature, datasets.ClassLabel):
            self.label_names = list(feature.names)
        else:
            self.label_names = [str(i) for i in range((pyarrow.compute.max(labels).as_py() or 0) + 1)]
        expected = pyarrow.array(range(len(self.label_names)), type=labels.type)
        outside = pyarrow.compute.invert(pyarrow.compute.is_in(labels, value_set=expected))
        if pyarrow.compute.any(outside).as_py():
            row = pyarrow.compute.index(outside, True).as_py()
            raise SystemExit(
                f'{name}: label {labels[row].as_py()} in row {row} is outside the {len(self.label_names)} classes, '
                f'expected 0 to {len(self.label_names) - 1}'
            )
        self.rows = rows.select_columns([self.image_column, self.label_column]).cast_column(
            self.image_column, datasets.Image(decode=False))
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def labels(self) -> list[int]:
        return self.rows[self.label_column][:]

    def read(self, row: int) -> tuple[Tensor, int]:
        """The image (3, H, W) uint8 in colour and upright, before its transform, and its label.

        Raises:
            BadImage: It can't be read; names its row, and its file where it has one.
        """
        example = self.rows[row]
        image = example[self.image_column] or {}
        try:
            return decode_pixels(read_bytes(image)), example[self.label_column]
        except Exception as error:  # Pillow's plugins raise what they like
            file = f' ({image["path"]})' if image.get('path') else ''
            raise BadImage(f'{self.name}: the image in row {row}{file} cannot be decoded: {error}') from error

    def check_decodable(self) -> None:
        """Decode every image of a dataset of up to 1 GiB once, so that a broken one is found before training."""
        if self.rows.data.nbytes <= CHECKED_BYTES:
            for row in tqdm(range(len(self)), f'checking {self.name}', leave=False, mininterval=1):
                try:
                    self.read(row)
                except BadImage as error:
                    raise SystemExit(str(error)) from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Row `index`; beyond their number once more, with another augmentation."""
        image, label = self.read(index % len(self))
        with _seeded(self.seed, int(self.epoch), index):
            return self.transform(image), label


def read_bytes(image: dict[str, Any]) -> bytes:
    """The file of an image: its `bytes`, or what is at its `path`, as `datasets.Image(decode=False)` has them."""
    if image.get('bytes') is not None:
        return image['bytes']
    if image.get('path') is None:
        raise ValueError('there is none')
    with xopen(image['path'], 'rb') as file:  # also within an archive, or on the Hub
        return file.read()


def _is_image(feature) -> bool:
    return isinstance(feature, datasets.Image)


def _is_label(feature) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.startswith(('int', 'uint')))


def _is_list_of_labels(feature) -> bool:
    return isinstance(feature, datasets.List | datasets.LargeList) and _is_label(feature.feature)


def _find_column(rows, split: str, kind: str, column: str | None, fits: Callable) -> str:
    found = [name for name, feature in rows.features.items() if fits(feature)]
    if kind == 'label':  # a column of class labels is meant before one of plain integers, such as an id
        found = [name for name in found if isinstance(rows.features[name], datasets.ClassLabel)] or found
    if column is None and len(found) == 1:
        return found[0]
    if column is not None and column in rows.features and fits(rows.features[column]):
        return column
    columns = ', '.join(f'{name} ({type(feature).__name__})' for name, feature in rows.features.items())
    several = [name for name, feature in rows.features.items() if _is_list_of_labels(feature)]
    if kind == 'label' and (column in several or several and not found):
        raise SystemExit(
            f'{split}: column {column or several[0]!r} has several labels for an image, expected one: networks are '
            f'trained to choose one class'
        )
    if column is not None:
        raise SystemExit(f'{split}: {kind} column {column!r} is not one of {kind}s; it has {columns}')
    if not found:
        raise SystemExit(f'{split}: found no column of {kind}s; it has {columns}')
    raise SystemExit(f'{split}: name one of its {kind} columns with --{kind}-column: {", ".join(found)}')


@contextmanager
def _seeded(*entropy: int):
    """Seed the global generators that transforms draw from; put the main process's own states back."""
    in_main = get_worker_info() is None
    if in_main:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also prepares that of CUDA, 0.2 ms per image
    try:
        yield
    finally:
        if in_main:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def choose_split(dataset: datasets.DatasetDict, name: str, split: str | None, candidates: tuple[str, ...]) -> str:
    """The split that was asked for, or the first of the candidates that the dataset has."""
    found = [split] if split is not None else [s for s in candidates if s in dataset]
    if not found or found[0] not in dataset:
        wanted = split or ' or '.join(candidates)
        raise SystemExit(f'dataset {name!r} has no split {wanted!r}; it has {", ".join(dataset)}')
    return found[0]


def open_images(recipe: Recipe) -> dict[str, LabelledImages]:
    """The images to train and to validate on, without their transforms."""
    dataset = open_dataset(recipe.dataset)
    splits = dict(
        train=choose_split(dataset, recipe.dataset, recipe.train_split, ()),
        validation=choose_split(dataset, recipe.dataset, recipe.validation_split, VALIDATION_SPLITS),
    )
    images = {
        part: LabelledImages(
            dataset[split], split, f'{recipe.dataset} split {split!r}', image_column=recipe.image_column,
            label_column=recipe.label_column, seed=recipe.seed,
        ) for part, split in splits.items()
    }
    train, validation = images['train'], images['validation']
    # Plain integers have no names beyond the largest label of a split.
    if validation.label_names != train.label_names[:len(validation.label_names)]:
        raise SystemExit(f'{validation.name} has classes {validation.label_names}, {train.name} {train.label_names}')
    if recipe.batch_size > len(train):
        raise SystemExit(f'--batch-size must be at most the {len(train)} training images, got {recipe.batch_size}')
    return images
