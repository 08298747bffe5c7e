"""The labels of a dataset: which column they are in, and which class each row is of."""
import collections

import datasets
import numpy as np
import pyarrow.compute
from _dataset import SPLIT_FOLDERS, Rows, columns_of

# Columns of text or of plain integers are labels only under these names: others are ages, ids, captions.
LABEL_COLUMNS = ('label', 'labels', 'class', 'class_label', 'class_name', 'fine_label', 'category', 'target', 'y')
MOST_NUMBERS = 100_000  # classes that are plain integers


def is_label(feature) -> bool:
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and feature.dtype.startswith(('int', 'uint', 'string', 'large_string')))


def find_label_column(rows: Rows, name: str, asked: str | None) -> str:
    """The column of labels that was asked for, or the only one: of class labels, else one that is named like labels.

    Raises:
        SystemExit: There is none, there are several, or it has several labels for an image.
    """
    possible = [column for column, feature in rows.features.items() if is_label(feature)]
    lists = [
        column for column, feature in rows.features.items()
        if isinstance(feature, datasets.List | datasets.LargeList) and is_label(feature.feature)]
    declared = [column for column in possible if isinstance(rows.features[column], datasets.ClassLabel)]
    found = declared or [column for column in possible if column.lower() in LABEL_COLUMNS]
    several = [asked] if asked in lists else lists if asked is None and not found else []
    if several:
        raise SystemExit(
            f'{name}: column {several[0]!r} has several labels for an image, expected one: networks are trained to '
            f'choose one class')
    if asked is not None and asked not in possible:
        raise SystemExit(f'{name}: label column {asked!r} is not one of labels; it has {columns_of(rows)}')
    if asked is None and not found:
        hint = (
            f'; name one with --label-column if it is one of them: {", ".join(possible)}' if possible else
            '; a folder of images needs a folder for each class, within those of the splits if there are any, or '
            'metadata.csv with the columns file_name and label')
        raise SystemExit(f'{name}: found no column of labels; it has {columns_of(rows)}{hint}')
    if asked is None and len(found) > 1:
        raise SystemExit(f'{name}: name one of its label columns with --label-column: {", ".join(found)}')
    return asked or found[0]


def read_labels(rows: datasets.Dataset, name: str, column: str) -> tuple[np.ndarray, list[str], bool]:
    """The labels of all rows.

    Args:
        rows: Of a split.
        name: What to call it in errors.
        column: Of class labels, of integers from 0 on, or of text.

    Returns:
        The class of each row, int64; the names of the classes, of text in its order; whether the dataset declares
        which classes there are, so that some may be without images.

    Raises:
        SystemExit: A label is missing or outside the classes, or the classes are splits.
    """
    feature = rows.features[column]
    labels = rows.select_columns([column]).with_format('arrow')[:][column]
    declared = isinstance(feature, datasets.ClassLabel)
    if declared and SPLIT_FOLDERS.keys() >= set(feature.names):
        raise SystemExit(
            f'{name}: its classes are {" and ".join(feature.names)}, which are splits: a folder of images needs a '
            f'folder for each class within those of the splits, as in {feature.names[0]}/cat/1.jpg')
    if not declared and 'string' in feature.dtype:
        texts = labels.to_pylist()
        names = sorted(set(filter(None, texts)))
        numbers = {text: i for i, text in enumerate(names)}
        targets = np.array([numbers.get(text, -1) for text in texts], np.int64)
    else:
        targets = pyarrow.compute.fill_null(labels.cast(pyarrow.int64()), -1).to_numpy()
        largest = int(targets.max(initial=0))
        if not declared and largest >= MOST_NUMBERS:
            raise SystemExit(
                f'{name}: column {column!r} has integers up to {largest}, expected labels from 0 on, below '
                f'{MOST_NUMBERS}: name another column with --label-column')
        names = list(feature.names) if declared else [str(i) for i in range(largest + 1)]
    outside = np.flatnonzero((targets < 0) | (targets >= len(names)))
    if len(outside):
        row = int(outside[0])
        raise SystemExit(
            f'{name}: label {labels[row].as_py()!r} in row {row} is outside the {len(names)} classes, expected '
            + ('a text' if not declared and 'string' in feature.dtype else f'0 to {len(names) - 1}'))
    return targets, names, declared


def declared_names(rows: Rows, name: str, column: str) -> list[str]:
    """The names of the classes, where the dataset says them.

    Raises:
        SystemExit: It does not.
    """
    feature = rows.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        raise SystemExit(
            f'{name}: --streaming needs class labels with their names, column {column!r} has {feature.dtype}: all '
            f'labels would be read before training: leave it out, or write them as datasets.ClassLabel')
    return list(feature.names)


def are_numbers(names: list[str]) -> bool:
    """Whether the names say no more than the order of the classes."""
    return names == [str(i) for i in range(len(names))]


def new_numbers(names: list[str], theirs: list[str]) -> np.ndarray:
    """Where each class stands among those of another dataset or of a checkpoint: -1 where it is not one of them."""
    count = collections.Counter(theirs)
    numbers = {name: i for i, name in enumerate(theirs) if count[name] == 1}
    return np.array([numbers.get(name, -1) for name in names], np.int64)
