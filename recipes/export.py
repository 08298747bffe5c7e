"""Write a network to a file for another runtime:  python recipes/export.py <checkpoint> --format FORMAT

The checkpoint is a folder (of a training run, or any that timm's `local-dir:` loads), a Hub repository
(`hf-hub:owner/name`) or a model with a tag that is registered in timm (`resnet18_fmd.<tag>`). It is prepared for
inference, exported, and the file is run by its own runtime on images: those that the run validated on, or --images. A
file that computes something else is not kept.

Beside the file stands its record, <file>.json: the largest difference to PyTorch, how often the two have the same best
class, the file's size, and the latency of one image. The file itself says how images are prepared and what the classes
are called.
"""
import sys

from _arguments import parse_export

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_export(sys.argv[1:], __doc__)

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import torch
from _accelerator import use_all_cores
from _arguments import EXPORT_SUFFIXES
from _data import decode_pixels, open_images, read_bytes, refuse_bad_images
from _dataset import choose_parts, dataset_name, find_image_column, open_dataset, take_parts
from _exported import FORMATS, Metadata, Run, export_program
from _loaders import Normalize, eval_transform
from _measure import median_seconds
from _recipe import VALIDATION_SPLITS, Recipe
from _record import circumstances, hardware, read_json, sha256, write_json
from _sources import Source, find_source, load_network, origin_of
from _stored import STORED
from accelerate import Accelerator
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from tqdm import tqdm

from fmd_timm import prepare_for_inference

MOST_IMAGES = 256  # to compare on
BATCH = 16  # of them, where a network takes as many
LARGEST_DIFFERENCE = dict(fp32=1e-4, fp16=1e-2, int8=0.1)  # relative to the largest logit


@refuse_bad_images()
def main(
        checkpoint: str,
        format: str,
        batch: str,
        weights: str,
        output: Path | None,
        images: str | None,
) -> dict[str, Any]:
    """Returns the record, which is written beside the file."""
    runtime, what = FORMATS[format], f'checkpoint {checkpoint!r}'
    runtime.check_installed()
    accelerator = Accelerator(cpu=True)
    use_all_cores(accelerator)
    source = find_source(checkpoint, 'checkpoint')
    network = load_network(source, 'checkpoint').eval()
    metadata = Metadata.of(network, what)
    input_size = metadata.data_config['input_size']
    if input_size[0] != 3:
        raise SystemExit(f'{what} must be a network for images of 3 channels, got {input_size[0]}')
    of_images, pixels = read_images(source, images, metadata.data_config)
    output = output or default_output(source, EXPORT_SUFFIXES[format])
    output.parent.mkdir(parents=True, exist_ok=True)

    program = export_program(STORED[weights](prepare_for_inference(network)), input_size, batch)
    with TemporaryDirectory(dir=output.parent, prefix='.export-') as folder:
        unchecked = Path(folder, output.name)
        runtime.save(program, metadata, unchecked)
        run, _ = runtime.open(unchecked)
        compared = compare(network, run, pixels, 1 if batch == '1' else BATCH, LARGEST_DIFFERENCE[weights])
        seconds = median_seconds(partial(run, pixels[:1]), accelerator.device)
        del run  # Windows removes no file that is open
        files = {
            file.name: dict(bytes=file.stat().st_size, sha256=sha256(file)) for file in sorted(Path(folder).iterdir())}
        for name in files:
            Path(folder, name).replace(output.with_name(name))
    made_by = circumstances('export.py')
    record = dict(
        format=format, batch=batch, weights=weights, files=files,
        checkpoint=origin_of(source, network), compared_on=of_images, **compared, infer_ms_per_image=1000 * seconds,
        **hardware(accelerator), **dict(made_by, versions={**made_by['versions'], **runtime.versions()}))
    write_json(output.with_name(f'{output.name}.json'), record)
    report(output, record)
    return record


def default_output(source: Source, suffix: str) -> Path:
    """In the folder of a run, or named like the model in the current folder."""
    if source.name.startswith('local-dir:'):
        return Path(source.name.removeprefix('local-dir:'), f'model{suffix}')
    return Path(f'{(source.repo if source.name.startswith("hf-hub:") else source.name).rpartition("/")[2]}{suffix}')


def read_images(source: Source, asked: str | None, config: dict[str, Any]) -> tuple[str, Tensor]:
    """What the images are, and as many as are compared (N, 3, H, W), float32, normalised.

    Args:
        source: The checkpoint, whose run says which images it validated on.
        asked: A dataset or a folder; its validation split, or 'train' where there is none. They need no labels.
        config: How they are prepared.
    """
    if asked is None:
        images = open_images(recipe_of(source))['validation']
        name, pixels = images.name, (images.read(place)[0] for place in images.sample(MOST_IMAGES))
    else:
        name, pixels = read_unlabelled(asked)
    transform, normalize = eval_transform(config), Normalize(config['mean'], config['std'])
    return name, torch.cat([normalize(transform(image)[None]) for image in pixels])


def read_unlabelled(asked: str) -> tuple[str, Iterator[Tensor]]:
    splits = open_dataset(asked)
    split, parts = choose_parts(splits, asked, None, (*VALIDATION_SPLITS, 'train'))
    name, rows = f'{dataset_name(asked)} split {split!r}', take_parts(splits, parts)
    column = find_image_column(rows, name, None)
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    places = np.linspace(0, len(rows) - 1, min(MOST_IMAGES, len(rows)), dtype=int)
    return name, (decode_pixels(read_bytes(rows[int(place)][column])) for place in places)


def recipe_of(source: Source) -> Recipe:
    """Of the training run, whose record is beside its weights.

    Raises:
        SystemExit: There is none.
    """
    try:
        if source.name.startswith('local-dir:'):
            path = Path(source.name.removeprefix('local-dir:'), 'result.json')
        else:
            path = hf_hub_download(source.repo, 'result.json', revision=source.revision.removeprefix('commit '))
        recipe = read_json(Path(path))['recipe']
        known = {field.name for field in dataclasses.fields(Recipe)}
        return Recipe(**{name: value for name, value in recipe.items() if name in known})
    except Exception as error:
        raise SystemExit(
            f'--images must be a dataset or a folder of images, to compare the file with PyTorch on: {source.asked} '
            f'has no result.json of a training run that names them ({type(error).__name__}: {error})') from error


@torch.inference_mode()
def compare(network: nn.Module, run: Run, images: Tensor, batch: int, largest: float) -> dict[str, Any]:
    """How the file agrees with the network in PyTorch.

    Raises:
        SystemExit: By more than `largest` of the largest logit they don't.
    """
    expected, found = (
        torch.cat([logits(some) for some in tqdm(images.split(size), what, leave=False, mininterval=1)])
        for logits, size, what in ((network, BATCH, 'PyTorch'), (run, batch, 'the file')))
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= largest:  # NaN is not
        raise SystemExit(f'the file computes something else: its logits differ by {difference:.2g} of the largest one, '
                         f'expected {largest:g} at most. It is not kept')
    agreed = (found.argmax(1) == expected.argmax(1)).sum().item()
    return dict(images=len(images), top1_agreement=agreed, largest_relative_difference=difference)


def report(output: Path, record: dict[str, Any]) -> None:
    print(f'wrote {output} and its record {output.name}.json')
    print(f'MB: {sum(file["bytes"] for file in record["files"].values()) / 1e6:.1f}')
    print(f'largest difference to PyTorch, relative: {record["largest_relative_difference"]:.2g}')
    print(f'images with the same best class: {record["top1_agreement"]} of {record["images"]}')
    print(f'ms per image at batch 1: {record["infer_ms_per_image"]:.4g}')
    print(f'device: {record["device"]}')


if __name__ == '__main__':
    main(**vars(arguments))
