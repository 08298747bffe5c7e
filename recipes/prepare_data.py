"""Shrink a dataset once, to load it faster:  python recipes/prepare_data.py <dataset> <folder> [--size 256]

Most of the time to load a photograph goes into decoding more pixels than training looks at. Here each image whose
shorter side is above --size pixels is shrunk to that, antialiased, as JPEG. Crops see the same part of an image as
before, the small ones with less detail. All splits and all columns are written, as shuffled parquet files that
`datasets` and the Hub know: FOLDER/data/train-00000-of-00064.parquet and so on.

Stopped, the same command goes on. FOLDER/data has its name only when all is there, so that nothing trains on a part.
"""
import sys

from _arguments import parse_prepare_data

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_prepare_data(sys.argv[1:], __doc__)

import io
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from _accelerator import usable_cores
from _data import read_bytes, refuse_bad_images
from _dataset import dataset_name, find_image_column, open_dataset
from _images import BadImage, decode
from _record import read_json, write_json
from datasets.table import embed_table_storage
from PIL import Image
from tqdm import tqdm

GROUP = 100  # rows that are read at once: a shuffle buffer fills from small pieces of many files
SAMPLE = 64  # images of each split from which the result's size is estimated
SETTINGS = 'settings.json'  # beside the shards


@dataclass(frozen=True)
class Shard:
    """A file to write, and what it is made of."""
    name: str  # of the split, in errors
    split: datasets.Dataset  # all of it, as arrow
    column: str  # of images
    rows: np.ndarray  # their numbers in the split
    path: Path
    size: int
    quality: int


@refuse_bad_images()
def main(
        dataset: str,
        folder: Path,
        size: int,
        shards: int,
        quality: int,
        image_column: str | None,
        dataset_config: str | None,
) -> None:
    """Write the shrunk dataset, or what is still missing of it.

    Raises:
        SystemExit: The folder has something else in it, the disk is too small, or an image can't be decoded.
    """
    splits = open_dataset(dataset, dataset_config)
    names = {split: f'{dataset} split {split!r}' for split in splits}
    columns = {split: find_image_column(rows, names[split], image_column) for split, rows in splits.items()}
    settings = dict(
        dataset=dataset_name(dataset), dataset_config=dataset_config, size=size, shards=shards, quality=quality,
        columns=columns, images={split: len(rows) for split, rows in splits.items()})
    if not begin(folder, settings):
        print(f'{folder} is complete')
        return
    planned = [
        Shard(names[split], rows.with_format('arrow'), columns[split], part, path, size, quality)
        for split, rows in splits.items() for part, path in share_out(split, len(rows), shards, unfinished(folder))
    ]
    missing = [shard for shard in planned if not shard.path.exists()]
    check_space(folder, missing)
    with tqdm(total=sum(len(shard.rows) for shard in planned), unit='images', mininterval=1) as bar:
        bar.update(bar.total - sum(len(shard.rows) for shard in missing))
        for written in write_all(missing):
            bar.update(written)
    unfinished(folder).replace(folder / 'data')
    print(f'train with --dataset {folder}')


def unfinished(folder: Path) -> Path:
    """Where the shards are until all of them are there: `datasets` doesn't look into it."""
    return folder / '.data'


def begin(folder: Path, settings: dict[str, Any]) -> bool:
    """Make the folder; False if all is there already.

    Raises:
        SystemExit: It holds something else.
    """
    for data in folder / 'data', unfinished(folder):
        if (data / SETTINGS).is_file():
            there = read_json(data / SETTINGS)
            if there != settings:
                differing = [f'{name} {there.get(name)} there and {settings[name]} now'
                             for name in settings if there.get(name) != settings[name]]
                raise SystemExit(f'folder {folder} holds images prepared otherwise ({", ".join(differing)}), '
                                 f'expected the same settings or a new folder')
            return data == unfinished(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f'{folder} must be a new folder, or one that this command began, and it is neither')
    unfinished(folder).mkdir(parents=True)
    write_json(unfinished(folder) / SETTINGS, settings)
    return True


def share_out(split: str, images: int, shards: int, folder: Path) -> Iterator[tuple[np.ndarray, Path]]:
    """Rows and file of each shard: all rows once, in an order that is always the same, as evenly as can be."""
    shards = max(1, min(shards, images))
    parts = np.array_split(np.random.default_rng(0).permutation(images), shards)
    for number, rows in enumerate(parts):
        yield rows, folder / f'{split}-{number:05d}-of-{shards:05d}.parquet'


def check_space(folder: Path, missing: list[Shard]) -> None:
    """Shrink a few images of each split, and refuse a disk that all of them would not fit on."""
    needed = 0.0
    for name in {shard.name for shard in missing}:
        of_split = [shard for shard in missing if shard.name == name]
        sample = of_split[0].rows[:SAMPLE]
        if len(sample):
            per_image = shrunk(of_split[0], sample).nbytes / len(sample)
            needed += 1.1 * per_image * sum(len(shard.rows) for shard in of_split)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(f'{folder} needs about {needed / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB left')


def write_all(shards: list[Shard]) -> Iterator[int]:
    """Write them on all cores; yields how many images each had, as they come.

    Raises:
        BadImage: It can't be decoded. Shards that are finished stay.
        SystemExit: A process was killed.
    """
    pool = ProcessPoolExecutor(usable_cores(), initializer=end_with_parent)
    try:
        for done in as_completed([pool.submit(write, shard) for shard in shards]):
            yield done.result()
    except BrokenProcessPool as error:
        raise SystemExit('a process was killed, perhaps for its memory: the same command goes on') from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process at Ctrl-C, without a traceback, and when the first one is killed: another may write its file."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=follow, daemon=True).start()


def write(shard: Shard) -> int:
    """Write a shard, by another name until it is finished; returns its number of images."""
    begun = shard.path.with_name('.' + shard.path.name)
    # JPEGs don't get smaller, but their headers do, which are half of an image of 32 pixels.
    with pa.parquet.ParquetWriter(begun, shard.split.features.arrow_schema, compression='zstd') as writer:
        for start in range(0, len(shard.rows), GROUP):
            writer.write_table(shrunk(shard, shard.rows[start:start + GROUP]))
    begun.replace(shard.path)
    return len(shard.rows)


def shrunk(shard: Shard, rows: np.ndarray) -> pa.Table:
    """These rows of the split, with all files in them.

    Raises:
        BadImage: Names the row, and the file where it has one.
    """
    table = shard.split[rows]
    images = table[shard.column].to_pylist()
    for i, image in enumerate(images):
        try:
            images[i] = shrink(image or {}, shard.size, shard.quality)
        except Exception as error:  # Pillow's plugins raise what they like
            file = f' ({image["path"]})' if image and image['path'] else ''
            raise BadImage(f'{shard.name}: the image in row {rows[i]}{file} cannot be decoded: {error}') from error
    schema = shard.split.features.arrow_schema
    index = table.schema.get_field_index(shard.column)
    table = table.set_column(index, shard.column, pa.array(images, schema.field(shard.column).type))
    return embed_table_storage(table.cast(schema))


def shrink(image: dict[str, Any], size: int, quality: int) -> dict[str, Any]:
    """An image file as `datasets` has it, `bytes` and `path`, made smaller if its shorter side is above `size` pixels.

    Smaller ones stay as they are, whatever their format: to compress them anew would only lose detail.
    """
    data, name = read_bytes(image), image.get('path') and PurePath(image['path']).name
    pixels = decode(data)  # also to see that it can be
    shorter = min(pixels.size)
    if shorter <= size:
        return dict(bytes=data, path=name)
    width, height = (round(length * size / shorter) for length in pixels.size)
    file = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC).save(file, 'JPEG', quality=quality)
    return dict(bytes=file.getvalue(), path=name and PurePath(name).stem + '.jpg')


if __name__ == '__main__':
    main(**vars(arguments))
