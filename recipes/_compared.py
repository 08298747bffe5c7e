"""An exported file and the network in PyTorch: on which images, how far apart their logits are, and the accuracy."""
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _data import LabelledImages, open_images
from _dataset import Rows, choose_parts, dataset_name, find_image_column, open_dataset, take_parts
from _exported import Run
from _loaders import Normalize, eval_transform
from _matching import match_classes
from _recipe import VALIDATION_SPLITS, Recipe
from _record import read_json
from _sources import Source
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

CALIBRATION = 256  # images, by which a quantiser knows how large activations are
BATCH = 16  # images at a time, where a network takes as many
UNLABELLED = 256  # images to compare on, where they have no labels


class Compared(NamedTuple):
    """The images to compare on, and others where there are any."""
    name: str
    images: LabelledImages
    have_labels: bool  # those of the network; else their labels mean nothing
    others: LabelledImages  # to calibrate on


def open_compared(source: Source, asked: str | None, network: nn.Module, what: str) -> Compared:
    """Those that the run validated on, or those that were asked for.

    Args:
        source: The checkpoint, whose run says which images it validated on.
        asked: A dataset or a folder; its validation split, or 'train' where there is none.
        network: Of the checkpoint, whose classes the images have.
        what: What to call it in errors.

    Raises:
        SystemExit: There are no images.
    """
    if asked is None:
        recipe = recipe_of(source)
        others, images = open_images(recipe).values()
        match_classes(images, network, what, print)
        return Compared(f'{dataset_name(recipe.dataset)} split {images.split!r}', images, True, others)
    splits = open_dataset(asked)
    images = read_unlabelled(splits, asked, (*VALIDATION_SPLITS, 'train'))
    others = read_unlabelled(splits, asked, ('train', images.split))
    split, parts = choose_parts(splits, asked, images.split)
    try:
        labelled = LabelledImages(take_parts(splits, parts), split, images.name)
        match_classes(labelled, network, what, print)
        return Compared(images.name, labelled, True, others)
    except SystemExit as reason:
        print(f'no accuracy is measured: {reason}')
    return Compared(images.name, images.select(images.sample(UNLABELLED)), False, others)


def read_unlabelled(splits: dict[str, Rows], dataset: str, candidates: tuple[str, ...]) -> LabelledImages:
    """The images of the first of these splits that there is, all with the same label."""
    split, parts = choose_parts(splits, dataset, None, candidates)
    name, rows = f'{dataset_name(dataset)} split {split!r}', take_parts(splits, parts)
    rows = rows.select_columns([find_image_column(rows, name, None)]).add_column('label', [0] * len(rows))
    return LabelledImages(rows, split, name)


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


def batches_for(images: LabelledImages, config: dict[str, Any], what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W), float32, prepared for a network by its data configuration, and labels (B,)."""
    images.transform, normalize = eval_transform(config), Normalize(config['mean'], config['std'])
    for pixels, labels in tqdm(DataLoader(images, BATCH), what, leave=False, mininterval=1):
        yield normalize(pixels), labels


def calibration_images(images: LabelledImages, config: dict[str, Any]) -> Iterator[Tensor]:
    """Some of the images, evenly spread, one at a time (1, 3, H, W), prepared in the same way."""
    transform, normalize = eval_transform(config), Normalize(config['mean'], config['std'])
    for place in tqdm(images.sample(CALIBRATION), 'calibrating', leave=False, mininterval=1):
        yield normalize(transform(images.read(place)[0])[None])


@torch.inference_mode()
def compare(
        network: nn.Module, run: Run, compared: Compared, config: dict[str, Any], batch: int, largest: float,
) -> dict[str, Any]:
    """How the file agrees with the network in PyTorch, and the top-1 of both in percent; None without labels.

    Args:
        network: The network.
        run: The file.
        compared: On all of these.
        config: How they are prepared.
        batch: Images that the file takes at a time, at most.
        largest: Difference of two logits, relative to the largest one.

    Raises:
        SystemExit: They differ by more, or the runtime fails.
    """
    difference = size = torch.zeros(())
    agreed, right, found_right = 0, 0, 0
    for images, labels in batches_for(compared.images, config, 'comparing'):
        expected = network(images)
        try:
            found = torch.cat([run(some) for some in images.split(batch)])
        except Exception as error:  # each runtime has its own
            raise SystemExit(
                f'the file was written, but its runtime does not compute it ({type(error).__name__}: {error}). It is '
                f'not kept') from error
        difference, size = (torch.maximum(most, t.abs().max()) for most, t in (
            (difference, found - expected), (size, expected)))
        if not difference <= largest * size:  # NaN is not
            raise SystemExit(
                f'the file computes something else: its logits differ by {(difference / size).item():.2g} of the '
                f'largest one, expected {largest:g} at most. It is not kept')
        best, found_best = expected.argmax(1), found.argmax(1)
        agreed += (found_best == best).sum().item()
        right += (best == labels).sum().item()
        found_right += (found_best == labels).sum().item()
    count = len(compared.images)
    top1, pytorch_top1 = (100 * n / count if compared.have_labels else None for n in (found_right, right))
    return dict(
        images=count, top1_agreement=agreed, largest_relative_difference=(difference / size).item(),
        top1=top1, pytorch_top1=pytorch_top1)
