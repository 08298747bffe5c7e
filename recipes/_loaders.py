"""From labelled images to batches: transforms of PIL images to uint8, loaders, normalisation on the device."""
from collections.abc import Iterable

import torch
from _data import LabelledImages
from _recipe import Recipe
from accelerate import skip_first_batches
from timm.data import ToNumpy, create_transform, rand_augment_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms


def train_transform(size: int, crop: str, hflip: float, aa: str | None, interpolation: str, mean: tuple):
    """timm's training transform, or for small images the one of the CIFAR papers: pad by an eighth, crop, flip.

    Args:
        size: Pixels of the square result.
        crop: 'rrc' (random resized crop) or 'pad'.
        hflip: Probability of a horizontal flip.
        aa: timm's RandAugment policy, such as 'rand-m9-mstd0.5-inc1'.
        interpolation: Of the resizing.
        mean: Of the data, 0 to 1: RandAugment fills with it.
    """
    if crop == 'rrc':
        return create_transform(
            size, is_training=True, hflip=hflip, auto_augment=aa, color_jitter=None, interpolation=interpolation,
            mean=mean, use_prefetcher=True,
        )
    steps = [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if aa:
        steps.append(rand_augment_transform(aa, dict(img_mean=tuple(round(255 * m) for m in mean))))
    return transforms.Compose([*steps, ToNumpy()])


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
    images['train'].transform = train_transform(
        recipe.image_size, recipe.crop, recipe.hflip, recipe.aa, data_config['interpolation'], data_config['mean'])
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
