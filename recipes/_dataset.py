"""A Hugging Face dataset: where it is, its configuration, its splits, and which of its columns are meant."""
import contextlib
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from _streaming import ParquetRows, open_streamed, read_schema
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS, DataFilesList
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image

SPLIT_FOLDERS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}  # 'val', ...
# Names that `datasets` takes for those of splits, such as train-station, and hidden ones.
SPECIAL = re.compile(rf'(.*[{NON_WORDS_CHARS}])?({"|".join(SPLIT_FOLDERS)})([{NON_WORDS_CHARS}].*)?|(\.|__).*')


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


Rows = datasets.Dataset | ParquetRows  # of a split


def open_dataset(name: str, config: str | None = None, streaming: bool = False) -> dict[str, Rows]:
    """The splits of a dataset.

    Args:
        name: 'digits', a folder of parquet files or images that `datasets` can load, or an id on the Hub.
        config: Of those that it has.
        streaming: Read the rows when they are needed, and copy none to the disk.

    Raises:
        SystemExit: There is none, it can't be loaded, or it has several configurations and none is named.
    """
    if name == 'digits' and config is None:
        if streaming:
            raise SystemExit('--streaming reads parquet files, and digits are a part of scikit-learn: leave it out')
        return load_digits()
    expected = "expected 'digits', a folder of parquet files or images, or a dataset id on the Hub"
    try:
        dataset = open_streamed(name, config) if streaming else load_dataset(name, config)
    except datasets.exceptions.DatasetNotFoundError as error:
        if 'gated' in str(error):
            raise SystemExit(
                f'dataset {name!r} is gated: ask for access on its page, https://huggingface.co/datasets/{name}, '
                f'then log in with `hf auth login` or set HF_TOKEN'
            ) from error
        raise SystemExit(f'dataset {name!r} was not found, {expected}: {error}') from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, pa.ArrowException) as error:
        reason = f'{type(error).__name__}: {error}'
        configs = config_names(name)
        if len(configs) > 1 and config not in configs:
            raise SystemExit(
                f'dataset {name!r} has several configurations: name one with --dataset-config: {", ".join(configs)}'
            ) from error
        raise SystemExit(f'dataset {name!r} could not be loaded, {expected}: {reason}') from error
    features = next(iter(dataset.values())).features
    if streaming:
        urls = {piece.url for rows in dataset.values() for piece in rows.pieces}
        check_files(name, features, ((url, read_schema(url)) for url in urls))
    elif Path(name).is_dir():
        check_files(name, features, ((path, pa.parquet.read_schema(path)) for path in Path(name).rglob('*.parquet')))
    return dataset


def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
    """As `datasets.load_dataset` does, which takes minutes for a folder of several hundred thousand images."""
    files = find_class_files(name) if config is None else None
    if files:
        return datasets.load_dataset('imagefolder', data_files=files)
    with listed_once():
        return datasets.load_dataset(name, config)


def find_class_files(name: str) -> dict[str, DataFilesList] | None:
    """The files of a folder that has nothing but a folder of images for each class, or these in folders of splits.

    They are those that `datasets` finds. None where it must look itself, because there is something else (tables,
    archives, folders in folders) or a name that is special for it.
    """
    root = Path(name).resolve()
    if not root.is_dir():
        return None
    entries = list(os.scandir(root))
    folders = {SPLIT_FOLDERS.get(entry.name): entry.path for entry in entries if entry.is_dir(follow_symlinks=False)}
    in_splits = None not in folders
    if not in_splits:
        folders = {'train': str(root)} if len(folders) == 1 else {}
    elif len(folders) < len(entries):
        return None
    found = {}
    for split in filter(folders.get, map(str, SPLIT_KEYWORDS)):
        classes = list(os.scandir(folders[split]))
        if not all(entry.is_dir(follow_symlinks=False) for entry in classes):
            return None
        files = sorted((file for entry in classes for file in os.scandir(entry)), key=lambda file: file.path)
        names = [entry.name for entry in (classes if in_splits else [*classes, *files])]
        if not files or any(map(SPECIAL.fullmatch, names)) or not all(map(is_image, files)):
            return None
        found[split] = DataFilesList([file.path for file in files], [(str(file.stat().st_mtime),) for file in files])
    return found


def is_image(file: os.DirEntry) -> bool:
    is_one = os.path.splitext(file.name)[1].lower() in ImageFolder.EXTENSIONS
    return is_one and file.is_file() and not file.name.startswith('.')


@contextlib.contextmanager
def listed_once():
    """Within it a folder is listed once.

    `datasets` looks for splits and tables in it with 46 patterns, and `fsspec` would list all its files for each.
    """
    local = fsspec.filesystem('file')  # there is one in a thread, which `datasets` gets too
    local.find = functools.cache(local.find)
    try:
        yield
    finally:
        del local.find


def check_files(name: str, features: datasets.Features, schemas: Iterable[tuple[str | Path, pa.Schema]]) -> None:
    """Refuse parquet files that number classes differently: `datasets` takes the names of the first."""
    names = {column: kind.names for column, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    for path, schema in sorted(schemas) if names else ():
        theirs = datasets.Features.from_arrow_schema(schema)
        for column, expected in names.items():
            found = getattr(theirs.get(column), 'names', None)
            if found and found != expected:
                raise SystemExit(
                    f'dataset {name!r}: column {column!r} of {path} has the classes {shortened(found)}, of others '
                    f'{shortened(expected)}: write them with the same ones')


def shortened(names: Sequence[str]) -> str:
    """Names for an error or a warning: the first ones, and how many there are."""
    shown = ', '.join(map(repr, names[:10]))
    return shown if len(names) <= 10 else f'{shown} and {len(names) - 10} more'


def config_names(name: str) -> list[str]:
    try:
        return datasets.get_dataset_config_names(name)
    except Exception:  # it is asked for after an error, which is the one to be told
        return []


def dataset_name(name: str) -> str:
    """What a record and a card call it: the id, or the name of the folder."""
    return Path(name).resolve().name if Path(name).is_dir() else name


Parts = list[tuple[str, int, int]]  # of splits: name, first row, row after the last one


def choose_parts(
        dataset: dict[str, Rows],
        name: str,
        split: str | None,
        candidates: tuple[str, ...] = (),
) -> tuple[str, Parts]:
    """The split that was asked for, or the first of the candidates that the dataset has, and which rows it is.

    Args:
        dataset: All its splits.
        name: What to call it in errors.
        split: As `datasets` has it: 'train', 'train[:90%]', 'train[:100]+test'.
        candidates: Names of splits.

    Raises:
        SystemExit: There is no such split, or nothing in it.
    """
    split = split or next((candidate for candidate in candidates if candidate in dataset), None)
    has = f'it has {", ".join(dataset)}'
    try:
        found = datasets.ReadInstruction.from_spec(split or '').to_absolute(
            {split: len(rows) for split, rows in dataset.items()})
    except (ValueError, AssertionError) as error:
        wanted = split or ' or '.join(candidates)
        raise SystemExit(f'dataset {name!r} has no split {wanted!r}; {has}') from error
    parts = [(part.splitname, part.from_, part.to) for part in found]
    if not any(first < end for _, first, end in parts):
        raise SystemExit(f'dataset {name!r} has no images in split {split!r}; {has}')
    return split, parts


def take_parts(dataset: dict[str, Rows], parts: Parts) -> Rows:
    taken = [dataset[split].select(range(first, end)) for split, first, end in parts]
    if isinstance(taken[0], ParquetRows):
        return ParquetRows(taken[0].features, [piece for rows in taken for piece in rows.pieces])
    return datasets.concatenate_datasets(taken)


def overlap(parts: Parts, others: Parts) -> bool:
    return any(
        split == other and max(first, other_first) < min(end, other_end)
        for split, first, end in parts for other, other_first, other_end in others)


def find_image_column(rows: Rows, name: str, asked: str | None) -> str:
    """The column of images that was asked for, or the only one.

    Raises:
        SystemExit: There is none, or there are several.
    """
    found = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if asked is not None and asked not in found:
        raise SystemExit(f'{name}: image column {asked!r} is not one of images; it has {columns_of(rows)}')
    if not found:
        raise SystemExit(f'{name}: found no column of images; it has {columns_of(rows)}')
    if asked is None and len(found) > 1:
        raise SystemExit(f'{name}: name one of its image columns with --image-column: {", ".join(found)}')
    return asked or found[0]


def columns_of(rows: Rows) -> str:
    return ', '.join(f'{name} ({type(feature).__name__})' for name, feature in rows.features.items())
