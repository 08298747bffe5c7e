"""Labelled images for the recipes: the rows of a split with their classes, and reading an image of them."""
import copy
import hashlib
import random
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
import torch
from _dataset import Parts, Rows, choose_parts, find_image_column, open_dataset, overlap, shortened, take_parts
from _images import BadImage, decode_pixels
from _labels import are_numbers, declared_names, find_label_column, new_numbers, read_labels
from _recipe import VALIDATION_SPLITS, Recipe
from _streaming import ParquetRows
from datasets.utils.file_utils import xopen
from torch import Tensor
from torch.utils.data import get_worker_info


class LabelledImages(torch.utils.data.Dataset):
    """One split of a dataset as (image (3, H, W) uint8, label) pairs.

    Random augmentation is seeded by seed, epoch and row, so it is the same for any number of processes and workers.

    Args:
        rows: The images of the split.
        split: Its name.
        name: What to call it in errors.
        transform: (3, H, W) uint8 -> the same, of the size that all have.
        image_column: Column of images; None where the only one is meant.
        label_column: Column of labels; None where the only one is meant.
        seed: Of the augmentation, and of what is held out.

    Raises:
        SystemExit: No image or label column, a label outside the classes, or splits in place of classes.
    """

    def __init__(
            self,
            rows: Rows,
            split: str,
            name: str,
            transform: Callable[[Tensor], Tensor] | None = None,
            image_column: str | None = None,
            label_column: str | None = None,
            seed: int = 0,
    ):
        self.split, self.name = split, name
        self.image_column = find_image_column(rows, name, image_column)
        self.label_column = find_label_column(rows, name, label_column)
        self.keep(rows)
        self.indices = np.arange(len(rows))  # of the rows that are used
        self.transform = transform
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def keep(self, rows: datasets.Dataset) -> None:
        """Keep the images, and read all labels."""
        self.kind = rows.info.builder_name  # 'imagefolder', 'parquet', ...
        self.targets, self.label_names, self.is_declared = read_labels(rows, self.name, self.label_column)
        self.rows = rows.select_columns([self.image_column]).cast_column(
            self.image_column, datasets.Image(decode=False))

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def labels(self) -> list[int]:
        return self.targets.tolist()

    def files(self) -> pyarrow.ChunkedArray:
        """The path of each image, which is a file of its own in a folder, and elsewhere no more than a name."""
        images = self.rows.with_format('arrow')[:][self.image_column]
        return pyarrow.compute.struct_field(images, 'path')

    def use_classes(self, label_names: list[str], of: str) -> None:
        """Number the classes as another dataset or a checkpoint does, by their names.

        Args:
            label_names: Its classes in their order.
            of: What it is, for errors.

        Raises:
            SystemExit: There are images of classes that it does not have.
        """
        if label_names == self.label_names:
            return
        numbers = new_numbers(self.label_names, label_names)
        unknown = [self.label_names[i] for i in np.unique(self.targets) if numbers[i] < 0]
        if unknown:
            raise SystemExit(f'{self.name} has images of classes that {of} does not have: {shortened(unknown)}')
        self.targets, self.label_names = numbers[self.targets], list(label_names)

    def select(self, places: Sequence[int], split: str | None = None) -> 'LabelledImages':
        """Some of the images, by their places among these; rows keep their numbers."""
        chosen = copy.copy(self)
        chosen.indices, chosen.targets = self.indices[places], self.targets[places]
        chosen.split = split or self.split
        chosen.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        return chosen

    def hold_out(self, share: float) -> tuple['LabelledImages', 'LabelledImages']:
        """The images to train on, and a share of each class to validate on, chosen by the seed.

        Raises:
            SystemExit: A class has too few images.
        """
        features = datasets.Features(
            place=datasets.Value('int64'), label=datasets.ClassLabel(num_classes=len(self.label_names)))
        places = datasets.Dataset.from_dict(dict(place=range(len(self)), label=self.targets), features=features)
        try:
            parts = places.train_test_split(share, stratify_by_column='label', seed=self.seed)
        except ValueError as error:
            raise SystemExit(f'--validation-share {share}: {self.name} cannot be divided: {error}') from error
        kept, held_out = (sorted(parts[part]['place'][:]) for part in ('train', 'test'))
        return (
            self.select(kept, f'{self.split} without {share:g} of it by seed {self.seed}'),
            self.select(held_out, f'{share:g} of {self.split} by seed {self.seed}'))

    def read(self, place: int) -> tuple[Tensor, int]:
        """The image (3, H, W) uint8 in colour and upright, before its transform, and its label.

        Raises:
            BadImage: It can't be read; names its row, and its file where it has one.
        """
        row = int(self.indices[place])
        image, label = self.find(place)
        try:
            return decode_pixels(read_bytes(image)), label
        except Exception as error:  # Pillow's plugins raise what they like
            file = f' ({image["path"]})' if image.get('path') else ''
            raise BadImage(f'{self.name}: the image in row {row}{file} cannot be decoded: {error}') from error

    def find(self, place: int) -> tuple[dict[str, Any], int]:
        """The image as `datasets.Image(decode=False)` has it, and its label."""
        return self.rows[int(self.indices[place])][self.image_column] or {}, int(self.targets[place])

    def sample(self, count: int) -> Sequence[int]:
        """The places of some images, evenly spread."""
        return np.linspace(0, len(self) - 1, min(count, len(self)), dtype=int).tolist()

    def labels_sha256(self) -> str:
        """By which a run that goes on knows the images again."""
        return hashlib.sha256(np.asarray(self.targets, np.int64).tobytes()).hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image `index`; beyond their number once more, with another augmentation."""
        image, label = self.read(index % len(self))
        with _seeded(self.seed, int(self.epoch), index):
            return self.transform(image), label


class StreamedImages(LabelledImages):
    """The same of rows that are read when they are needed. Their labels are read with them.

    `targets` has the number of each class that the dataset declares, and not of each image.
    """

    def keep(self, rows: ParquetRows) -> None:
        self.kind, self.is_declared = 'parquet', True
        self.label_names = declared_names(rows, self.name, self.label_column)
        self.targets = np.arange(len(self.label_names))
        self.rows = rows.select_columns([self.image_column, self.label_column])

    def find(self, place: int) -> tuple[dict[str, Any], int]:
        try:
            row = self.rows[place]
        except Exception as error:  # of the network, the disk or the file
            reason = ' '.join(str(error).split())  # of several lines
            raise BadImage(f'{self.name}: row {place} cannot be read: {reason}') from error
        label = row[self.label_column]
        if label is None or not 0 <= label < len(self.targets):
            raise BadImage(
                f'{self.name}: label {label!r} in row {place} is outside the {len(self.targets)} classes, expected 0 '
                f'to {len(self.targets) - 1}')
        return row[self.image_column] or {}, int(self.targets[label])

    def sample(self, count: int) -> Sequence[int]:
        """Of one row group, because others are far away."""
        return range(min(count, len(self.rows.pieces[0])))

    def labels_sha256(self) -> str:
        return hashlib.sha256(repr(self.rows.sizes()).encode()).hexdigest()


def read_bytes(image: dict[str, Any]) -> bytes:
    """The file of an image: its `bytes`, or what is at its `path`, as `datasets.Image(decode=False)` has them."""
    if image.get('bytes') is not None:
        return image['bytes']
    if image.get('path') is None:
        raise ValueError('there is none')
    with xopen(image['path'], 'rb') as file:  # also within an archive, or on the Hub
        return file.read()


@contextmanager
def refuse_bad_images():
    """An image that can't be read ends the command with a sentence, from whichever process it was loaded in."""
    try:
        yield
    except BadImage as error:
        raise SystemExit(str(error)) from error


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


def open_images(recipe: Recipe) -> dict[str, LabelledImages]:
    """The images to train and to validate on, of the same classes, without their transforms."""
    name = recipe.dataset
    dataset = open_dataset(name, recipe.dataset_config, recipe.streaming)

    def open_part(split: str, parts: Parts) -> LabelledImages:
        return (StreamedImages if recipe.streaming else LabelledImages)(
            take_parts(dataset, parts), split, f'{name} split {split!r}', image_column=recipe.image_column,
            label_column=recipe.label_column, seed=recipe.seed)

    split, parts = choose_parts(dataset, name, recipe.train_split)
    train = open_part(split, parts)
    if recipe.validation_share:
        train, validation = train.hold_out(recipe.validation_share)
    else:
        if recipe.validation_split is None and not any(candidate in dataset for candidate in VALIDATION_SPLITS):
            raise SystemExit(
                f'dataset {name!r} has no split {" or ".join(VALIDATION_SPLITS)}, it has {", ".join(dataset)}: hold '
                f'out a share of it with --validation-share 0.1, or name one with --validation-split')
        split, others = choose_parts(dataset, name, recipe.validation_split, VALIDATION_SPLITS)
        if overlap(parts, others):
            raise SystemExit(
                f'--validation-split must have no image of --train-split {recipe.train_split}, got {split}')
        validation = open_part(split, others)
        refuse_common_files(train, validation)
        validation.use_classes(join_classes(train, validation), train.name)
        train.use_classes(validation.label_names, validation.name)
    if recipe.batch_size > len(train):
        raise SystemExit(f'--batch-size must be at most the {len(train)} training images, got {recipe.batch_size}')
    return dict(train=train, validation=validation)


def refuse_common_files(train: LabelledImages, validation: LabelledImages) -> None:
    """Of a folder; `datasets` puts a file into two splits where its path has the names of both, val/train/1.jpg."""
    if train.kind == 'imagefolder':
        files = validation.files()
        both = files.filter(pyarrow.compute.is_in(files, value_set=train.files().combine_chunks())).to_pylist()
        if both:
            raise SystemExit(f'{train.name} and {validation.name} have images in common: {shortened(both)}')


def join_classes(train: LabelledImages, validation: LabelledImages) -> list[str]:
    """The classes to train for: those that are declared, else those that images are found of."""
    if train.is_declared:
        return train.label_names
    if are_numbers(train.label_names) and are_numbers(validation.label_names):
        return max(train.label_names, validation.label_names, key=len)
    return sorted({*train.label_names, *validation.label_names})
