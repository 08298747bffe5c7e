"""MobileNetV2 with dynamic convolutions, as in Dynamic Convolution (arXiv 1912.03458) and ODConv (ICLR 2022).

Dynamic are all convolutions but the first, as in ODConv's code: the 1x1 expansions, the depthwise ones and the 1x1
projections of the blocks, and the last 1x1 in front of the pooling. The widths 0.5, 0.75 and 1.0 are those of ODConv's
tables. timm has no weights of the static `mobilenetv2_075`.
"""
from functools import partial

import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import round_channels
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures

from ..layers import METHODS, CondConv2d, DyConv2d, FMDConv2d, ODConv2d
from ._dynamic_blocks import DynamicBlocks, build_blocks, cfg
from ._pretrained import inflated_cfgs, with_published_tags

__all__ = ['DynamicMobileNetV2', 'DynamicMobileNetV2Features']  # register_model adds each entrypoint


class DynamicMobileNetV2(DynamicBlocks, EfficientNet):
    """timm's EfficientNet, which its MobileNetV2 is, with dynamic convolutions in all but the stem."""
    dynamic_parts = 'blocks.', 'conv_head'


class DynamicMobileNetV2Features(DynamicBlocks, EfficientNetFeatures):
    """The same for `features_only=True`, which has no last 1x1."""


_cfgs = {}
for _width, _tags in ('050', ['lamb_in1k']), ('075', []), ('100', ['ra_in1k']):
    for _method in METHODS.values():
        _cfgs |= inflated_cfgs(
            f'mobilenetv2_{_width}_{_method.suffix}', cfg(paper_ids=f'arXiv:{_method.arxiv}', interpolation='bicubic'),
            f'mobilenetv2_{_width}', _tags)
default_cfgs = generate_default_cfgs(with_published_tags(_cfgs))


def _mobilenetv2(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    model_args = dict(
        # as in timm's _gen_mobilenet_v2
        arch_def=[
            ['ds_r1_k3_s1_c16'],
            ['ir_r2_k3_s2_e6_c24'],
            ['ir_r3_k3_s2_e6_c32'],
            ['ir_r4_k3_s2_e6_c64'],
            ['ir_r3_k3_s1_e6_c96'],
            ['ir_r3_k3_s2_e6_c160'],
            ['ir_r1_k3_s1_e6_c320'],
        ],
        num_features=1280,
        stem_size=32,
        round_chs_fn=partial(round_channels, multiplier=int(variant.split('_')[1]) / 100),
    )
    return build_blocks(
        DynamicMobileNetV2, DynamicMobileNetV2Features, variant, pretrained,
        **dict(dict(model_args, act_layer='relu6'), **kwargs))


@register_model
def mobilenetv2_050_cond(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.5 times the width with CondConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_050_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def mobilenetv2_075_cond(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.75 times the width with CondConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_075_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def mobilenetv2_100_cond(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of the full width with CondConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_100_cond', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def mobilenetv2_050_dy(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.5 times the width with DyConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_050_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def mobilenetv2_075_dy(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.75 times the width with DyConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_075_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def mobilenetv2_100_dy(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of the full width with DyConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_100_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def mobilenetv2_050_od(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.5 times the width with ODConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_050_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def mobilenetv2_075_od(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.75 times the width with ODConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_075_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def mobilenetv2_100_od(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of the full width with ODConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_100_od', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def mobilenetv2_050_fmd(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.5 times the width with FMDConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_050_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)


@register_model
def mobilenetv2_075_fmd(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of 0.75 times the width with FMDConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_075_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)


@register_model
def mobilenetv2_100_fmd(pretrained: bool = False, **kwargs) -> DynamicMobileNetV2:
    """MobileNetV2 of the full width with FMDConv, K = 4 kernels per convolution."""
    return _mobilenetv2('mobilenetv2_100_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)
