"""From labelled images to batches: transforms of uint8 tensors, loaders, normalisation on the device.

The transforms are timm's, with the same random numbers and the same pixels. They are of tensors because these are
decoded and resized faster than Pillow's images.
"""
import random
from collections.abc import Callable, Iterable, Iterator

import torch
import torchvision.transforms.v2.functional as F
from _data import LabelledImages
from _recipe import Recipe
from _resident import CroppedImages, ResidentImages, crops_batches, have_room
from _streaming import OwnGroups
from accelerate import Accelerator, skip_first_batches
from timm.data import RandomResizedCropAndInterpolation, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from torchvision import transforms
from torchvision.transforms import v2


class RandomResizedCrop:
    """timm's, of tensors: what timm calls resizes them in float32, which is slower and rounds otherwise."""

    def __init__(self, timms: RandomResizedCropAndInterpolation):
        self.timms = timms

    def __call__(self, image: Tensor) -> Tensor:
        *corner, height, width = self.timms.get_params(image, self.timms.scale, self.timms.ratio)
        interpolation = self.timms.interpolation
        if isinstance(interpolation, tuple):
            interpolation = random.choice(interpolation)
        return F.resized_crop(image, *corner, max(height, 1), max(width, 1), self.timms.size, interpolation)


def train_transform(recipe: Recipe, size: int, data_config: dict) -> Callable[[Tensor], Tensor]:
    """timm's training transform, or for small images the one of the CIFAR papers: pad by an eighth, crop, flip.

    Args:
        recipe: Of the run.
        size: Pixels of the square result.
        data_config: `mean` of the images, which RandAugment fills with, and `interpolation` of the resizing.

    Returns:
        A function of (3, H, W) uint8 tensors.
    """
    crop_and_flip, augment, _ = create_transform(
        size, is_training=True, separate=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
        auto_augment=recipe.aa, color_jitter=recipe.color_jitter,
        interpolation=recipe.interpolation or data_config['interpolation'], mean=data_config['mean'])
    crop, *flip = crop_and_flip.transforms
    if recipe.crop == 'rrc':
        steps = [RandomResizedCrop(crop), *flip]
    else:
        steps = [v2.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8), *flip]
    if augment.transforms:  # they are for images of Pillow
        steps += [transforms.ToPILImage(), augment, transforms.PILToTensor()]
    return transforms.Compose(steps)


class ProgressiveTransform:
    """The training transform of the image size that the epoch has.

    Args:
        recipe: Of the run.
        data_config: See train_transform.
        epoch: (), int64 in shared memory: loading processes that stay see it change.
    """

    def __init__(self, recipe: Recipe, data_config: dict, epoch: Tensor):
        self.recipe, self.epoch = recipe, epoch
        self.transforms = {size: train_transform(recipe, size, data_config) for size in recipe.train_sizes()}

    def __call__(self, image: Tensor) -> Tensor:
        return self.transforms[self.recipe.train_size(int(self.epoch))](image)


def eval_transform(data_config: dict) -> Callable[[Tensor], Tensor]:
    """timm's evaluation transform for a model's data configuration, up to the normalisation, of (3, H, W) uint8."""
    timms = create_transform(**dict(data_config, is_training=False, use_prefetcher=True))
    if data_config.get('crop_mode') == 'border':  # it pads with a colour, which works on images of Pillow alone
        return transforms.Compose([transforms.ToPILImage(), timms])
    return transforms.Compose([
        v2.Resize(step.size, step.interpolation) if isinstance(step, transforms.Resize) else step
        for step in timms.transforms
    ])


class RepeatedRows(RepeatAugSampler):
    """timm's repeated augmentation over the batches of all processes.

    Row i comes as i, i + len(dataset), i + 2 * len(dataset) and so on: each time it is augmented in another way. The
    repeats of a row are far apart in a batch, where mixup mixes neighbours and other processes have their parts.
    """

    def __init__(self, images: LabelledImages, num_repeats: int, batch_size: int):
        super().__init__(images, num_replicas=1, rank=0, num_repeats=num_repeats)
        self.batch_size = batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.dataset.seed + epoch)  # timm's order is of the epoch alone

    def __iter__(self) -> Iterator[int]:
        rows = [row + i % self.num_repeats * len(self.dataset) for i, row in enumerate(super().__iter__())]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start:start + self.batch_size]
            for first in range(self.num_repeats):
                yield from batch[first::self.num_repeats]


def make_loaders(
        accelerator: Accelerator,
        recipe: Recipe,
        images: dict[str, LabelledImages],
        data_config: dict,
) -> tuple[DataLoader, DataLoader]:
    """Batches to train and to validate on, of the images that open_images found; sets their transforms."""
    train, validation = images['train'], images['validation']
    validation.transform = eval_transform(data_config)
    batch_size = recipe.batch_size // recipe.accumulate
    order, in_order = dict(shuffle=True), {}
    if recipe.aug_repeats > 1:
        order = dict(sampler=RepeatedRows(train, recipe.aug_repeats, batch_size))
    if recipe.streaming:
        order, in_order = (
            dict(sampler=OwnGroups(of.rows, batch_size, accelerator.num_processes, recipe.num_workers, seed))
            for of, seed in ((train, recipe.seed), (validation, None)))
    loading = dict(
        num_workers=recipe.num_workers, persistent_workers=recipe.num_workers > 0,
        pin_memory=accelerator.device.type == 'cuda')
    if crops_batches(recipe):
        train.transform = v2.Resize((recipe.train_size(0),) * 2)
        resident = None
        if have_room(accelerator, recipe, images):
            resident, validation = (ResidentImages(accelerator, of, recipe.num_workers) for of in (train, validation))
            loading, in_order = {}, {}  # there is nothing left to load
        train = CroppedImages(train, recipe, resident)
    else:
        train.transform = ProgressiveTransform(recipe, data_config, train.epoch)

    def load(dataset: Dataset, **kwargs) -> DataLoader:
        return DataLoader(
            dataset, batch_size, **kwargs, **loading,
            collate_fn=default_convert if hasattr(dataset, '__getitems__') else None,  # it has whole batches
            generator=torch.Generator(),  # not the global one: an epoch may begin anywhere and must not disturb a step
        )

    return load(train, drop_last=True, **order), load(validation, **in_order)


def stay_on_device(loaders: tuple[DataLoader, DataLoader]) -> bool:
    """Whether the images are decoded once and stay there, both parts; `loaders` are what make_loaders returned."""
    return isinstance(loaders[1].dataset, ResidentImages)


def batches_of(loader: DataLoader, epoch: int, first: int = 0) -> Iterable:
    """The batches of an epoch from the one numbered `first` on, without reading the images before it.

    A run that was stopped within an epoch goes on with them. They and what is drawn for their augmentation must be
    those of an uninterrupted epoch, so they depend on seed, epoch and number alone, and no global generator is drawn
    from.
    """
    loader.set_epoch(epoch)
    loader.dataset.set_epoch(epoch)  # which accelerate does on one process alone
    return skip_first_batches(loader, first) if first else loader


class Normalize(torch.nn.Module):
    """(B, 3, H, W) uint8 -> float32 with the data's mean and standard deviation, on the images' device."""

    def __init__(self, mean: tuple, std: tuple, channels_last: bool = False):
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1) * 255)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=self.memory_format)
