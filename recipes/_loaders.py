"""From labelled images to batches: transforms of PIL images to uint8, loaders, normalisation on the device."""
from collections.abc import Iterable

import torch
from _data import LabelledImages
from _recipe import Recipe
from accelerate import skip_first_batches
from PIL import Image
from timm.data import ToNumpy, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms


def train_transform(recipe: Recipe, size: int, data_config: dict):
    """timm's training transform, or for small images the one of the CIFAR papers: pad by an eighth, crop, flip.

    Args:
        recipe: Of the run.
        size: Pixels of the square result.
        data_config: `mean` of the images, which RandAugment fills with, and `interpolation` of the resizing.
    """
    kwargs = dict(
        is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip, auto_augment=recipe.aa,
        color_jitter=recipe.color_jitter, interpolation=recipe.interpolation or data_config['interpolation'],
        mean=data_config['mean'], use_prefetcher=True)
    if recipe.crop == 'rrc':
        return create_transform(size, **kwargs)
    _, augment, _ = create_transform(size, separate=True, **kwargs)
    steps = [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)]
    if recipe.hflip:
        steps.append(transforms.RandomHorizontalFlip(recipe.hflip))
    return transforms.Compose([*steps, augment, ToNumpy()])


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

    def __call__(self, image: Image.Image):
        return self.transforms[self.recipe.train_size(int(self.epoch))](image)


def eval_transform(data_config: dict):
    """timm's evaluation transform for a model's data configuration, up to the normalisation."""
    return create_transform(**dict(data_config, is_training=False, use_prefetcher=True))


def make_loaders(
        recipe: Recipe,
        images: dict[str, LabelledImages],
        data_config: dict,
        pin_memory: bool,
) -> tuple[DataLoader, DataLoader]:
    """Batches to train and to validate on, of the images that open_images found; sets their transforms."""
    if recipe.aug_repeats > 1:
        raise SystemExit(f'--aug-repeats must be 1 as yet, got {recipe.aug_repeats}')
    images['train'].transform = ProgressiveTransform(recipe, data_config, images['train'].epoch)
    images['validation'].transform = eval_transform(data_config)
    kwargs = dict(
        batch_size=recipe.batch_size // recipe.accumulate, num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0, pin_memory=pin_memory,
        generator=torch.Generator(),  # not the global one: an epoch may begin anywhere and must not disturb a step
    )
    train_loader = DataLoader(images['train'], shuffle=True, drop_last=True, **kwargs)
    return train_loader, DataLoader(images['validation'], **kwargs)


def batches_of(loader: DataLoader, epoch: int, first: int = 0) -> Iterable:
    """The batches of an epoch from the one numbered `first` on, without reading the images before it.

    A run that was stopped within an epoch goes on with them. They and what is drawn for their augmentation must be
    those of an uninterrupted epoch, so they depend on seed, epoch and number alone, and no global generator is drawn
    from. A loader that isn't a DataLoader has `set_epoch`, and `skip_first_batches` of its own.
    """
    loader.set_epoch(epoch)  # and with it the images'
    if not first:
        return loader
    if hasattr(loader, 'skip_first_batches'):
        return loader.skip_first_batches(first)
    return skip_first_batches(loader, first)


class Normalize(torch.nn.Module):
    """(B, 3, H, W) uint8 -> float32 with the data's mean and standard deviation, on the images' device."""

    def __init__(self, mean: tuple, std: tuple, channels_last: bool = False):
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1) * 255)
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1) * 255)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=self.memory_format)
