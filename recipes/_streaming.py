"""Streaming: rows of parquet files, on the Hub or a disk, are read when they are needed and kept nowhere.

A row group of a file is read at once, and each loading process reads row groups of its own. Which row comes when is
known beforehand, as with rows on the disk. So each image comes once, an epoch goes on at any batch, and an evaluation
is exact, for every number of processes, loading processes and files. An `IterableDataset` of `datasets` promises none
of that: it shares out whole files, of any length, and its shuffle buffer is lost when a run stops.
"""
import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets.table import table_cast
from fsspec import url_to_fs
from torch.utils.data import Sampler

SHUFFLED_GROUPS = 8  # row groups whose rows are mixed: about 90 MB of ImageNet
KEPT_GROUPS = SHUFFLED_GROUPS + 4  # in each loading process: those being mixed, and some for groups of other sizes
CONNECTIONS = 16  # to read the ends of the files


@dataclass(frozen=True)
class Piece:
    """Some rows of a row group, from `first` to before `end`."""
    url: str
    group: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


class ParquetRows:
    """What the recipes need of a `datasets.Dataset`, without a copy of it.

    Args:
        features: Of the columns that are read.
        pieces: All rows, in their order.
    """

    def __init__(self, features: datasets.Features, pieces: list[Piece]):
        self.features, self.pieces = features, pieces
        self.schema = features.arrow_schema.remove_metadata()  # once: of 1,000 classes it takes a millisecond
        self.ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)  # the row after each piece

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.pieces else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row as `datasets` has it, images not decoded."""
        index = int(np.searchsorted(self.ends, row, side='right'))
        piece = self.pieces[index]
        table = read_group(piece.url, piece.group, tuple(self.features))
        table = table.slice(piece.end - (self.ends[index] - row), 1)
        return table_cast(table, self.schema).to_pylist()[0]

    def select_columns(self, columns: list[str]) -> 'ParquetRows':
        return ParquetRows(datasets.Features({name: self.features[name] for name in columns}), self.pieces)

    def select(self, rows: range) -> 'ParquetRows':
        """Those that are next to each other."""
        pieces = []
        for piece, end in zip(self.pieces, self.ends.tolist()):
            first = max(rows.start - (end - len(piece)), 0)
            left_out = max(end - rows.stop, 0)
            if first + left_out < len(piece):
                pieces.append(dataclasses.replace(piece, first=piece.first + first, end=piece.end - left_out))
        return ParquetRows(self.features, pieces)

    def sizes(self) -> list[tuple[int, int]]:
        """Rows and bytes of each row group: what can be known of the rows without reading them."""
        groups = [read_metadata(piece.url).row_group(piece.group) for piece in self.pieces]
        return [(len(piece), group.total_byte_size) for piece, group in zip(self.pieces, groups)]


def open_streamed(name: str, config: str | None) -> dict[str, ParquetRows]:
    """The splits of a dataset of parquet files. Only the ends of the files are read, which say what is in them.

    Raises:
        SystemExit: It is not of parquet files.
        Exception: What `datasets.load_dataset` raises.
    """
    builder = datasets.load_dataset_builder(name, config)
    if builder.info.builder_name != 'parquet':
        raise SystemExit(
            f'--streaming reads parquet files, dataset {name!r} is of the kind {builder.info.builder_name}: leave it '
            f'out, or write parquet files with recipes/prepare_data.py')
    files = builder.config.data_files
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(read_metadata, [url for urls in files.values() for url in urls]))
    first = next(url for urls in files.values() for url in urls)
    features = builder.info.features or datasets.Features.from_arrow_schema(read_schema(first))
    return {
        str(split): ParquetRows(features, [
            Piece(url, group, 0, metadata.row_group(group).num_rows)
            for url in urls for metadata in [read_metadata(url)] for group in range(metadata.num_row_groups)
        ]) for split, urls in files.items()}


def open_file(url: str):
    """Only what is asked for is read: there is nothing around a row group that is needed next."""
    files, path = url_to_fs(url)
    return files.open(path, 'rb', cache_type='none')


@functools.cache
def read_metadata(url: str) -> pa.parquet.FileMetaData:
    with open_file(url) as file:
        return pa.parquet.read_metadata(file)


def read_schema(url: str) -> pa.Schema:
    return read_metadata(url).schema.to_arrow_schema()


@functools.lru_cache(KEPT_GROUPS)
def read_group(url: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    with open_file(url) as file:
        parquet = pa.parquet.ParquetFile(file, metadata=read_metadata(url), pre_buffer=True)  # all columns at once
        return parquet.read_row_group(group, list(columns), use_threads=False)


class OwnGroups(Sampler):
    """An order of rows in which each loading process of each process has row groups of its own.

    It knows that of every batch each process gets its part (`split_batches` of accelerate), and that the batches go to
    the loading processes in turn. If that were otherwise, more would be read, but each row would still come once.

    Args:
        rows: All of them.
        batch_size: Over all processes.
        processes: That train or evaluate.
        num_workers: Loading processes of each of them.
        seed: Of another order in each epoch, in which the row groups are shuffled, and the rows of those that are
            next to each other; None is the order of the files as far as possible.
    """

    def __init__(self, rows: ParquetRows, batch_size: int, processes: int, num_workers: int, seed: int | None = None):
        self.rows, self.batch_size, self.processes = rows, batch_size, processes
        self.num_workers, self.seed, self.epoch = max(num_workers, 1), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        count, ends = len(self.rows.pieces), self.rows.ends
        rng = np.random.default_rng((self.seed or 0, self.epoch))
        pieces = range(count) if self.seed is None else rng.permutation(count)
        rows = np.concatenate([np.arange(ends[i] - len(self.rows.pieces[i]), ends[i]) for i in pieces])
        steps, share = len(rows) // self.batch_size, self.batch_size // self.processes
        order, taken = np.empty((steps, self.processes, share), np.int64), 0
        for process in range(self.processes):
            for worker in range(self.num_workers):
                place = order[worker::self.num_workers, process]
                own = rows[taken:taken + place.size]
                if self.seed is not None:  # each row moves by less than so many
                    away = rng.uniform(0, SHUFFLED_GROUPS * len(rows) / count, len(own))
                    own = own[np.argsort(np.arange(len(own)) + away)]
                place[:] = own.reshape(place.shape)
                taken += place.size
        return iter([*order.ravel().tolist(), *rows[taken:].tolist()])
