"""timm's ResNet for images of 32x32 pixels, the static twins of the dynamic `_cifar` models.

The stem is that of He et al. (arXiv 1512.03385, section 4.2): a 3x3 convolution with stride 1 and no max-pool.
`resnet20_cifar` is their whole network: three stages of 16, 32 and 64 channels, and shortcuts without parameters.
"""
import torch.nn as nn
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor

from ._pretrained import build_model, with_published_tags

__all__ = ['CifarResNet']  # register_model adds each entrypoint


class CifarResNet(ResNet):
    """timm's ResNet for 32x32 images: the stem keeps the resolution, and every stride is a quarter of ImageNet's.

    Args:
        *args: Arguments of timm's ResNet. `channels` of three stages make a network without `layer4`.
        output_stride: Stride of the last stage: 8, or less for dilated stages (4, 2). Three stages end at 4.
        stem_width: Channels of the stem, an even number.
        **kwargs: Arguments of timm's ResNet.

    Raises:
        ValueError: There is no such stride or width, or the stem is asked to be another one.
    """

    def __init__(self, *args, output_stride: int = 8, stem_width: int = 64, **kwargs):
        if output_stride not in (8, 4, 2):
            raise ValueError(f'output_stride must be 8, 4 or 2, got {output_stride}')
        if stem_width < 2 or stem_width % 2:
            raise ValueError(f'stem_width must be even and positive, got {stem_width}')
        for name in 'stem_type', 'replace_stem_pool':
            if kwargs.get(name):
                raise ValueError(f'{name} must be left out: the stem is one 3x3 convolution, got {kwargs[name]!r}')
        # timm's plain stem has 64 channels. Its deep one has twice the width that it is given.
        kwargs |= dict(stem_type='deep' if stem_width != 64 else '', stem_width=stem_width // 2)
        super().__init__(*args, output_stride=output_stride * 4, **kwargs)
        weight = next(self.conv1.parameters())
        self.conv1 = nn.Conv2d(
            self.in_chans, stem_width, kernel_size=3, padding=1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info['reduction'] = max(info['reduction'] // 4, 1)
        for stage in range(len(self.feature_info), 5):  # timm runs four, and empties those that it prunes likewise
            self.add_module(f'layer{stage}', nn.Sequential())

    # timm counts four stages in both of these.
    def forward_intermediates(self, x, indices=None, *args, **kwargs):
        indices, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, indices, *args, **kwargs)

    def prune_intermediate_layers(self, indices=1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        indices, last = feature_take_indices(len(self.feature_info), indices)
        if last + 1 < len(self.feature_info) or prune_head:  # else nothing is pruned
            super().prune_intermediate_layers(indices, prune_norm, prune_head)
        return indices


class PaddedShortcut(nn.Module):
    """The shortcut A of He et al.: every `stride`-th pixel, and as many channels of zeros as the block adds."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(f'channels must not become fewer from stage to stage, got {in_channels}, {out_channels}')
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.behind = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.before, self.behind))


class PaddedBlock(BasicBlock):
    """timm's BasicBlock, whose shortcut has no parameters: see `PaddedShortcut`."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None, **kwargs):
        if downsample is not None:
            downsample = PaddedShortcut(inplanes, planes, stride)
        super().__init__(inplanes, planes, stride, downsample, **kwargs)


CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar_cfg(**kwargs) -> dict:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (4, 4),
        'crop_pct': 1.0, 'interpolation': 'bilinear', 'mean': CIFAR10_MEAN, 'std': CIFAR10_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:1512.03385',
        **kwargs
    }


default_cfgs = generate_default_cfgs(with_published_tags({
    'resnet20_cifar': cifar_cfg(pool_size=(8, 8)),
    'resnet18_cifar': cifar_cfg(),
    'resnet50_cifar': cifar_cfg(),
}))


def build_resnet20(model_cls: type[CifarResNet], variant: str, pretrained: bool, **kwargs) -> CifarResNet:
    model_args = dict(
        layers=(3, 3, 3), channels=(16, 32, 64), stem_width=16, feature_cfg=dict(out_indices=(0, 1, 2, 3)))
    return build_model(model_cls, variant, pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 for 32x32 images."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return build_model(CifarResNet, 'resnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-20 of He et al. for 32x32 images (arXiv 1512.03385, section 4.2), with their shortcut A."""
    return build_resnet20(CifarResNet, 'resnet20_cifar', pretrained, **dict(dict(block=PaddedBlock), **kwargs))


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-50 for 32x32 images."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build_model(CifarResNet, 'resnet50_cifar', pretrained, **dict(model_args, **kwargs))
