"""What the dynamic networks with timm's EfficientNet blocks have in common: MobileNetV2 and MobileNetV3."""
from collections.abc import Callable
from functools import partial

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_act_layer
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_builder import decode_arch_def, resolve_bn_args

from ..layers import DynamicConv2d, FMDConv2d, make_dynamic
from ._pretrained import build_model

__all__ = ['DynamicBlocks', 'build_blocks', 'cfg']


class DynamicBlocks:
    """Of a network with `blocks` of timm's EfficientNet family: their convolutions are dynamic.

    Args:
        *args: Arguments of timm's class.
        conv_layer: `CondConv2d`, `DyConv2d`, `ODConv2d` or `FMDConv2d`.
        num_kernels: K.
        reduction: Width of the gates' hidden layer (ODConv, FMDConv); None is the method's own.
        kernel_ratio: Width of the kernel attention's hidden layer (DyConv, FMDConv); None is the method's own.
        conv_bias: Give the dynamic convolutions a bias.
        **kwargs: Arguments of timm's class.

    Raises:
        TypeError: The method has no such width.
    """
    dynamic_parts = 'blocks.',  # how names of convolutions begin that are dynamic, but for squeeze-and-excitation

    def __init__(
            self,
            *args,
            conv_layer: type[DynamicConv2d] = FMDConv2d,
            num_kernels: int = 4,
            reduction: float | None = None,
            kernel_ratio: float | None = None,
            conv_bias: bool = False,
            **kwargs,
    ):
        super().__init__(*args, **kwargs)
        make_dynamic(
            self, conv_layer, filter_fn=lambda name, conv: name.startswith(self.dynamic_parts) and '.se.' not in name,
            num_kernels=num_kernels, bias=conv_bias, reduction=reduction, kernel_ratio=kernel_ratio,
        )
        for module in self.modules():
            if isinstance(module, DynamicConv2d):
                # as timm initialises the static kernels of this network
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)


def cfg(**kwargs) -> dict:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem', 'classifier': 'classifier', 'license': 'apache-2.0',
        **kwargs
    }


def build_blocks(
        model_cls: type[nn.Module],
        features_cls: type[nn.Module],
        variant: str,
        pretrained: bool,
        arch_def: list[list[str]],
        act_layer: str | type[nn.Module],
        norm_layer: Callable[..., nn.Module] | None = None,
        features_only: bool = False,
        depth_multiplier: float = 1.0,
        group_size: int | None = None,
        **kwargs,
) -> nn.Module:
    """A network as timm's own builders make it, which can't be given a class.

    Args:
        model_cls: Of the network.
        features_cls: That of its blocks alone, for `features_only`.
        variant: Its name.
        pretrained: Load weights.
        arch_def: Its blocks, in timm's notation, unless `kwargs` have `block_args`.
        act_layer: Its activation.
        norm_layer: Its norm; None is BatchNorm.
        features_only: Return feature maps.
        depth_multiplier: How many times the blocks of each stage.
        group_size: Channels of a group in the depthwise convolutions; None is 1.
        **kwargs: Arguments of the class, and of the BatchNorm as timm has them (`bn_eps`, `bn_momentum`).
    """
    bn_args = resolve_bn_args(kwargs)  # which are no arguments of the class
    kwargs.setdefault(
        'block_args', decode_arch_def(arch_def, depth_multiplier=depth_multiplier, group_size=group_size))
    kwargs |= dict(
        act_layer=get_act_layer(act_layer), norm_layer=norm_layer or partial(nn.BatchNorm2d, **bn_args))
    if not features_only or 'feature_cfg' in kwargs or 'feature_cls' in kwargs:
        return build_model(model_cls, variant, pretrained, features_only=features_only, **kwargs)
    model = build_model(
        features_cls, variant, pretrained, pretrained_strict=False,
        kwargs_filter=('num_classes', 'num_features', 'head_conv', 'head_bias', 'head_norm', 'global_pool'), **kwargs,
    )
    model.default_cfg = pretrained_cfg_for_features(model.default_cfg)
    return model
