"""Small images in whole batches: each with its own crop and flip, and on the device where there is room for all.

The crop is that of the CIFAR papers: an image is padded by an eighth with black and cropped to its size again. Crops
and flips are drawn for all images at once, by seed and epoch. They do not depend on the processes, on the batch that
the epoch begins with, or on where the images are: a run can go on where there is less memory.
"""
import functools
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from _data import LabelledImages
from _recipe import Recipe
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

SHARE = 0.1  # of the memory that is free, which the images may take
CGROUP_LIMIT = Path('/sys/fs/cgroup/memory.max')  # bytes of a container of Linux, or 'max'


def crops_batches(recipe: Recipe) -> bool:
    """Whether all that is random about an image, before it is normalised, is what CroppedImages does."""
    return recipe.crop == 'pad' and not recipe.aa and not recipe.color_jitter and len(recipe.train_sizes()) == 1


def have_room(accelerator: Accelerator, recipe: Recipe, images: dict[str, LabelledImages]) -> bool:
    """Whether all images, decoded, take little of the memory that is free on the device of every process; says so.

    Args:
        accelerator: Of the run.
        recipe: Complete.
        images: Of each part.
    """
    pixels = len(images['train']) * recipe.train_size(0) ** 2 + len(images['validation']) * recipe.test_size ** 2
    free = min(gather_object([free_memory(accelerator)]))  # the same on all processes
    fits = 3 * pixels <= SHARE * free
    of_memory = f'{3 * pixels / 2**20:,.1f} of {free / 2**20:,.0f} MiB free on {accelerator.device.type}'
    accelerator.print(
        f'images are decoded once and stay on the device: {of_memory}' if fits else
        f'images are decoded in each epoch: all would take {of_memory}, more than {SHARE:.0%}')
    return fits


def free_memory(accelerator: Accelerator) -> int:
    """Bytes that a process can have of its device's memory; where it has none of its own, of the machine's."""
    if accelerator.device.type == 'cuda':
        return torch.cuda.mem_get_info(accelerator.device)[0]
    free = psutil.virtual_memory().available
    limit = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else 'max'
    return min(free, int(limit) if limit.isdecimal() else free) // accelerator.num_processes


class ResidentImages(Dataset):
    """Images that stay on the device as uint8, decoded once, by each process a part of them.

    Args:
        accelerator: Of the run.
        images: Their transform makes all of one size, and is not random.
        num_workers: Processes that decode them, for each process.
    """

    def __init__(self, accelerator: Accelerator, images: LabelledImages, num_workers: int):
        loader = accelerator.prepare(DataLoader(
            images, batch_size=64 * accelerator.num_processes, num_workers=num_workers, generator=torch.Generator()))
        bar = tqdm(
            loader, f'decoding {images.name}', leave=False, mininterval=1, disable=not accelerator.is_main_process)
        self.pixels, self.labels = map(torch.cat, zip(*map(accelerator.gather_for_metrics, bar)))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: images (B, 3, S, S) uint8 and labels (B,), on the device."""
        places = torch.tensor(places).to(self.labels.device, non_blocking=True)
        return self.pixels[places], self.labels[places]


class CroppedImages(Dataset):
    """Batches of images with their random crops and flips.

    Args:
        images: Their transform makes all of one size, and is not random.
        recipe: Complete.
        resident: The same images, if they stay on the device.
    """

    def __init__(self, images: LabelledImages, recipe: Recipe, resident: ResidentImages | None = None):
        self.images, self.recipe, self.resident = images, recipe, resident

    def set_epoch(self, epoch: int) -> None:
        self.images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch: images (B, 3, S, S) uint8 and labels (B,). Indices beyond the images' number: see LabelledImages."""
        places = [index % len(self) for index in indices]
        if self.resident is not None:
            images, labels = self.resident.__getitems__(places)
        else:
            read = map(self.images.read, places)
            images, labels = default_collate([(self.images.transform(image), label) for image, label in read])
        margin = images.shape[-1] // 8
        drawn = draw_crops(
            len(self) * self.recipe.aug_repeats, margin, self.recipe.hflip, self.images.seed, int(self.images.epoch))
        return crop_and_flip(images, drawn[indices].to(images.device, non_blocking=True), margin), labels


@functools.lru_cache(maxsize=1)  # of the present epoch
def draw_crops(count: int, margin: int, hflip: float, seed: int, epoch: int) -> Tensor:
    """Of each image y and x, where its crop starts (0 to 2 * margin), and 1 if it is flipped: (count, 3) int64."""
    generator = np.random.default_rng((seed, epoch))
    starts = generator.integers(2 * margin + 1, size=(count, 2))
    return torch.from_numpy(np.concatenate([starts, generator.random((count, 1)) < hflip], axis=1))


def crop_and_flip(images: Tensor, drawn: Tensor, margin: int) -> Tensor:
    """(B, C, S, S) padded by `margin` pixels of black, and of each the S x S of `drawn` (B, 3), see draw_crops."""
    padded = F.pad(images, (margin,) * 4)
    size = torch.arange(images.shape[-1], device=images.device)
    y, x, is_flipped = drawn[:, :, None].unbind(1)  # (B, 1)
    rows, columns = y + size, x + torch.where(is_flipped > 0, size.flip(0), size)  # (B, S)
    places = (rows[:, :, None] * padded.shape[-1] + columns[:, None]).flatten(1)  # (B, S * S)
    places = places[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, places).view_as(images)
