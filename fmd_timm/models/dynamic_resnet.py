"""ResNets with dynamic convolutions: timm's ResNet, every convolution of its residual blocks made dynamic.

`resnet18_fmd` and the deeper ones follow FMDConv (arXiv 2503.17530): stem, downsample and classifier are static. So are
they in the networks of the methods it is compared with, `_cond`, `_dy` and `_od`. FMDConv's authors give their dynamic
convolutions a bias: `conv_bias=True`. Those for images of 32x32 pixels are in `dynamic_cifar_resnet.py`.
"""
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..layers import METHODS, CondConv2d, DyConv2d, DynamicConv2d, FMDConv2d, ODConv2d
from ._pretrained import build_model, inflated_cfgs, with_published_tags

__all__ = ['DynamicResNet']  # register_model adds each entrypoint


class DynamicBasicBlock(BasicBlock):
    """timm's BasicBlock with both 3x3 convolutions made dynamic by `conv_like`."""

    def __init__(self, *args, conv_like: Callable[[nn.Conv2d], nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1 = conv_like(self.conv1)
        self.conv2 = conv_like(self.conv2)


class DynamicBottleneck(Bottleneck):
    """timm's Bottleneck with all three convolutions made dynamic by `conv_like`."""

    def __init__(self, *args, conv_like: Callable[[nn.Conv2d], nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1 = conv_like(self.conv1)
        self.conv2 = conv_like(self.conv2)
        self.conv3 = conv_like(self.conv3)


class DynamicResNet(ResNet):
    """timm's ResNet with dynamic convolutions in its residual blocks.

    Args:
        block: `DynamicBasicBlock` or `DynamicBottleneck`.
        *args: Arguments of timm's ResNet.
        conv_layer: `CondConv2d`, `DyConv2d`, `ODConv2d` or `FMDConv2d`.
        num_kernels: K.
        reduction: Width of the gates' hidden layer (ODConv, FMDConv); None is the method's own.
        kernel_ratio: Width of the kernel attention's hidden layer (DyConv, FMDConv); None is the method's own.
        conv_bias: Give the dynamic convolutions a bias, as FMDConv's authors do (the BatchNorm behind each
            convolution makes it nearly redundant, so ours have none).
        block_args: Arguments of the blocks, such as `attn_layer`.
        **kwargs: Arguments of timm's ResNet.

    Raises:
        TypeError: The method has no such width.
    """

    def __init__(
            self,
            block: type[DynamicBasicBlock | DynamicBottleneck],
            *args,
            conv_layer: type[DynamicConv2d] = FMDConv2d,
            num_kernels: int = 4,
            reduction: float | None = None,
            kernel_ratio: float | None = None,
            conv_bias: bool = False,
            block_args: dict[str, Any] | None = None,
            **kwargs,
    ):
        conv_like = partial(
            conv_layer.like, num_kernels=num_kernels, bias=conv_bias, reduction=reduction, kernel_ratio=kernel_ratio)
        super().__init__(block, *args, block_args=dict(block_args or {}, conv_like=conv_like), **kwargs)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise all weights; the dynamic convolutions by their own rule.

        Args:
            zero_init_last: Start every residual branch at zero.
        """
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, DynamicConv2d):
                module.reset_parameters()


def _cfg(**kwargs) -> dict:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        **kwargs
    }


# As in timm: the block, and how many of them each stage has.
BLOCKS = dict(
    resnet18=(DynamicBasicBlock, (2, 2, 2, 2)),
    resnet34=(DynamicBasicBlock, (3, 4, 6, 3)),
    resnet50=(DynamicBottleneck, (3, 4, 6, 3)),
    resnet101=(DynamicBottleneck, (3, 4, 23, 3)),
)

# timm's 224 px checkpoints to inflate: its default, and one that saw a billion more images (non-commercial licence).
STATIC_TAGS = dict(
    resnet18=['a1_in1k', 'fb_swsl_ig1b_ft_in1k'],
    resnet34=['a1_in1k'],
    resnet50=['a1_in1k', 'fb_swsl_ig1b_ft_in1k'],
    resnet101=['a1h_in1k'],
)

_cfgs = {}
for _method in METHODS.values():
    _paper = f'arXiv:{_method.arxiv}'
    for _depth, _tags in STATIC_TAGS.items():
        _cfgs |= inflated_cfgs(f'{_depth}_{_method.suffix}', _cfg(paper_ids=_paper), _depth, _tags)
default_cfgs = generate_default_cfgs(with_published_tags(_cfgs))


def build_resnet(variant: str, pretrained: bool, model_cls=DynamicResNet, **kwargs) -> DynamicResNet:
    block, layers = BLOCKS[variant.partition('_')[0]]
    return build_model(model_cls, variant, pretrained, **dict(dict(block=block, layers=layers), **kwargs))


@register_model
def resnet18_cond(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-18 with CondConv, K = 4 kernels per convolution."""
    return build_resnet('resnet18_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet50_cond(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-50 with CondConv, K = 4 kernels per convolution."""
    return build_resnet('resnet50_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet18_dy(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-18 with DyConv, K = 4 kernels per convolution."""
    return build_resnet('resnet18_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet50_dy(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-50 with DyConv, K = 4 kernels per convolution."""
    return build_resnet('resnet50_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet18_od(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-18 with ODConv, K = 4 kernels per convolution."""
    return build_resnet('resnet18_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet50_od(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-50 with ODConv, K = 4 kernels per convolution."""
    return build_resnet('resnet50_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet18_fmd(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-18 with FMDConv, K = 4 kernels per convolution."""
    return build_resnet('resnet18_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)


@register_model
def resnet50_fmd(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-50 with FMDConv, K = 4 kernels per convolution."""
    return build_resnet('resnet50_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)


@register_model
def resnet34_cond(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-34 with CondConv, K = 4 kernels per convolution."""
    return build_resnet('resnet34_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet101_cond(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-101 with CondConv, K = 4 kernels per convolution."""
    return build_resnet('resnet101_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet34_dy(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-34 with DyConv, K = 4 kernels per convolution."""
    return build_resnet('resnet34_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet101_dy(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-101 with DyConv, K = 4 kernels per convolution."""
    return build_resnet('resnet101_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet34_od(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-34 with ODConv, K = 4 kernels per convolution."""
    return build_resnet('resnet34_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet101_od(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-101 with ODConv, K = 4 kernels per convolution."""
    return build_resnet('resnet101_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet34_fmd(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-34 with FMDConv, K = 4 kernels per convolution."""
    return build_resnet('resnet34_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)


@register_model
def resnet101_fmd(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-101 with FMDConv, K = 4 kernels per convolution."""
    return build_resnet('resnet101_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)
