"""MobileNetV3 with dynamic convolutions, the headline of Dynamic Convolution (arXiv 1912.03458): timm's MobileNetV3.

Dynamic are all convolutions of the blocks, as that paper finds best in inverted residuals: the 1x1 expansions, the
depthwise ones and the 1x1 projections, and the last 1x1 in front of the pooling. Static are the stem and the maps of
pooled features: squeeze-and-excitation, the 1x1 behind the pooling and the classifier.
"""
from functools import partial

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features

from ..layers import DyConv2d, DynamicConv2d, FMDConv2d, make_dynamic
from ._pretrained import build_model, inflated_cfgs, with_published_tags

__all__ = ['DynamicMobileNetV3', 'DynamicMobileNetV3Features']  # register_model adds each entrypoint


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
        widths = {} if reduction is None else dict(reduction=reduction)
        if kernel_ratio is not None:
            widths['kernel_ratio'] = kernel_ratio
        make_dynamic(
            self.blocks, conv_layer, filter_fn=lambda name, conv: '.se.' not in name,
            num_kernels=num_kernels, bias=conv_bias, **widths,
        )
        for module in self.blocks.modules():
            if isinstance(module, DynamicConv2d):
                # as timm initialises the static kernels of this network
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)


class DynamicMobileNetV3(DynamicBlocks, MobileNetV3):
    """timm's MobileNetV3 with dynamic convolutions in its blocks."""


class DynamicMobileNetV3Features(DynamicBlocks, MobileNetV3Features):
    """The same for `features_only=True`."""


def _cfg(**kwargs) -> dict:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem', 'classifier': 'classifier', 'license': 'apache-2.0',
        **kwargs
    }


_cfgs = {}
for _method in DyConv2d, FMDConv2d:
    _cfgs |= inflated_cfgs(
        f'mobilenetv3_small_100_{_method.suffix}', _cfg(paper_ids=f'arXiv:{_method.arxiv}'), 'mobilenetv3_small_100',
        ['lamb_in1k'])
default_cfgs = generate_default_cfgs(with_published_tags(_cfgs))


def _mobilenetv3_small_100(
        variant: str,
        pretrained: bool,
        features_only: bool = False,
        depth_multiplier: float = 1.0,
        group_size: int | None = None,
        **kwargs,
) -> nn.Module:
    # the architecture and the arguments of timm's _gen_mobilenet_v3, which can't be given a class
    blocks = decode_arch_def([
        ['ds_r1_k3_s2_e1_c16_se0.25_nre'],
        ['ir_r1_k3_s2_e4.5_c24_nre', 'ir_r1_k3_s1_e3.67_c24_nre'],
        ['ir_r1_k5_s2_e4_c40_se0.25', 'ir_r2_k5_s1_e6_c40_se0.25'],
        ['ir_r2_k5_s1_e3_c48_se0.25'],
        ['ir_r3_k5_s2_e6_c96_se0.25'],
        ['cn_r1_k1_s1_c576'],
    ], depth_multiplier=depth_multiplier, group_size=group_size)
    model_args = dict(
        block_args=blocks,
        num_features=1024,
        stem_size=16,
        round_chs_fn=round_channels,
        norm_layer=partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, 'hard_swish'),
        se_layer=partial(
            SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=round_channels),
    )
    args = dict(model_args, **kwargs)
    if not features_only or 'feature_cfg' in kwargs or 'feature_cls' in kwargs:
        return build_model(DynamicMobileNetV3, variant, pretrained, features_only=features_only, **args)
    model = build_model(
        DynamicMobileNetV3Features, variant, pretrained, pretrained_strict=False,
        kwargs_filter=('num_classes', 'num_features', 'head_conv', 'head_bias', 'head_norm', 'global_pool'), **args,
    )
    model.default_cfg = pretrained_cfg_for_features(model.default_cfg)
    return model


@register_model
def mobilenetv3_small_100_dy(pretrained: bool = False, **kwargs) -> DynamicMobileNetV3:
    """MobileNetV3-Small with DyConv, K = 4 kernels per convolution."""
    return _mobilenetv3_small_100('mobilenetv3_small_100_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def mobilenetv3_small_100_fmd(pretrained: bool = False, **kwargs) -> DynamicMobileNetV3:
    """MobileNetV3-Small with FMDConv, K = 4 kernels per convolution."""
    return _mobilenetv3_small_100('mobilenetv3_small_100_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)
