"""ResNets with dynamic convolutions: timm's ResNet, every convolution of its residual blocks made dynamic.

`resnet18_fmd` and `resnet50_fmd` follow FMDConv (arXiv 2503.17530): stem, downsample and classifier are static. The
`_cifar` models have the stem for 32x32 images of He et al. (arXiv 1512.03385, section 4.2): a 3x3 convolution with
stride 1 and no max-pool. The authors' networks give their dynamic convolutions a bias: `conv_bias=True`.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..layers import FMDConv2d
from ._pretrained import build_dynamic_model, with_published_tags

__all__ = ['DynamicResNet', 'CifarDynamicResNet']  # register_model adds each entrypoint


class DynamicBasicBlock(BasicBlock):
    """timm's BasicBlock with both 3x3 convolutions made dynamic by `make_dynamic`."""

    def __init__(self, *args, make_dynamic: Callable[[nn.Conv2d], nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1 = make_dynamic(self.conv1)
        self.conv2 = make_dynamic(self.conv2)


class DynamicBottleneck(Bottleneck):
    """timm's Bottleneck with all three convolutions made dynamic by `make_dynamic`."""

    def __init__(self, *args, make_dynamic: Callable[[nn.Conv2d], nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1 = make_dynamic(self.conv1)
        self.conv2 = make_dynamic(self.conv2)
        self.conv3 = make_dynamic(self.conv3)


class DynamicResNet(ResNet):
    """timm's ResNet with dynamic convolutions in its residual blocks.

    Args:
        block: `DynamicBasicBlock` or `DynamicBottleneck`.
        *args: Arguments of timm's ResNet.
        num_kernels: K, see `FMDConv2d`.
        reduction: Width of the gates' hidden layer, see `FMDConv2d`.
        kernel_ratio: Width of the kernel attention's hidden layer, see `FMDConv2d`.
        conv_bias: Give the dynamic convolutions a bias, as the authors' networks have (the BatchNorm behind each
            convolution makes it nearly redundant, so ours have none).
        **kwargs: Arguments of timm's ResNet.
    """

    def __init__(
            self,
            block: type[DynamicBasicBlock | DynamicBottleneck],
            *args,
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            kernel_ratio: float = 1 / 4,
            conv_bias: bool = False,
            **kwargs,
    ):
        make_dynamic = partial(
            FMDConv2d.like, num_kernels=num_kernels, reduction=reduction, kernel_ratio=kernel_ratio, bias=conv_bias)
        super().__init__(block, *args, block_args=dict(make_dynamic=make_dynamic), **kwargs)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise all weights; the dynamic convolutions by their own rule.

        Args:
            zero_init_last: Start every residual branch at zero.
        """
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, FMDConv2d):
                module.reset_parameters()


class CifarDynamicResNet(DynamicResNet):
    """`DynamicResNet` for 32x32 images: the stem keeps the resolution, and every stride is a quarter of ImageNet's.

    Args:
        *args: Arguments of `DynamicResNet`.
        output_stride: Stride of the last stage: 8, or less for dilated stages (4, 2).
        **kwargs: Arguments of `DynamicResNet`.
    """

    def __init__(self, *args, output_stride: int = 8, **kwargs):
        if output_stride not in (8, 4, 2):
            raise ValueError(f'output_stride must be 8, 4 or 2, got {output_stride}')
        for name in 'stem_type', 'replace_stem_pool':
            if kwargs.get(name):
                raise ValueError(f'{name} must be left out: the stem is one 3x3 convolution, got {kwargs[name]!r}')
        super().__init__(*args, output_stride=output_stride * 4, **kwargs)
        stem = self.conv1
        self.conv1 = nn.Conv2d(
            stem.in_channels, stem.out_channels, kernel_size=3, padding=1, bias=False,
            device=stem.weight.device, dtype=stem.weight.dtype,
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info['reduction'] = max(info['reduction'] // 4, 1)


CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def _cfg(**kwargs) -> dict:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:2503.17530',
        **kwargs
    }


def _cifar_cfg(**kwargs) -> dict:
    return _cfg(**{
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (4, 4), 'crop_pct': 1.0,
        'mean': CIFAR10_MEAN, 'std': CIFAR10_STD, **kwargs
    })


default_cfgs = generate_default_cfgs(with_published_tags({
    'resnet18_fmd': _cfg(),
    'resnet50_fmd': _cfg(),
    'resnet18_fmd_cifar': _cifar_cfg(),
    'resnet50_fmd_cifar': _cifar_cfg(),
}))


@register_model
def resnet18_fmd(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-18 with FMDConv, K = 4 kernels per convolution."""
    model_args = dict(block=DynamicBasicBlock, layers=(2, 2, 2, 2))
    return build_dynamic_model(DynamicResNet, 'resnet18_fmd', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_fmd(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-50 with FMDConv, K = 4 kernels per convolution."""
    model_args = dict(block=DynamicBottleneck, layers=(3, 4, 6, 3))
    return build_dynamic_model(DynamicResNet, 'resnet50_fmd', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_fmd_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-18 with FMDConv for 32x32 images."""
    model_args = dict(block=DynamicBasicBlock, layers=(2, 2, 2, 2))
    return build_dynamic_model(CifarDynamicResNet, 'resnet18_fmd_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_fmd_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-50 with FMDConv for 32x32 images."""
    model_args = dict(block=DynamicBottleneck, layers=(3, 4, 6, 3))
    return build_dynamic_model(CifarDynamicResNet, 'resnet50_fmd_cifar', pretrained, **dict(model_args, **kwargs))
