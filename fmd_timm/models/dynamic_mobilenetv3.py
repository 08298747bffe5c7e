"""MobileNetV3 with dynamic convolutions, the headline of Dynamic Convolution (arXiv 1912.03458): timm's MobileNetV3.

Dynamic are all convolutions of the blocks, as that paper finds best in inverted residuals: the 1x1 expansions, the
depthwise ones and the 1x1 projections, and the last 1x1 in front of the pooling. Static are the stem and the maps of
pooled features: squeeze-and-excitation, the 1x1 behind the pooling and the classifier.
"""
from functools import partial

import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import round_channels
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features

from ..layers import DyConv2d, FMDConv2d
from ._dynamic_blocks import DynamicBlocks, build_blocks, cfg
from ._pretrained import inflated_cfgs, with_published_tags

__all__ = ['DynamicMobileNetV3', 'DynamicMobileNetV3Features']  # register_model adds each entrypoint


class DynamicMobileNetV3(DynamicBlocks, MobileNetV3):
    """timm's MobileNetV3 with dynamic convolutions in its blocks."""


class DynamicMobileNetV3Features(DynamicBlocks, MobileNetV3Features):
    """The same for `features_only=True`."""


_cfgs = {}
for _method in DyConv2d, FMDConv2d:
    _cfgs |= inflated_cfgs(
        f'mobilenetv3_small_100_{_method.suffix}', cfg(paper_ids=f'arXiv:{_method.arxiv}'), 'mobilenetv3_small_100',
        ['lamb_in1k'])
default_cfgs = generate_default_cfgs(with_published_tags(_cfgs))


def _mobilenetv3_small_100(variant: str, pretrained: bool, **kwargs) -> nn.Module:
    model_args = dict(
        # as in timm's _gen_mobilenet_v3
        arch_def=[
            ['ds_r1_k3_s2_e1_c16_se0.25_nre'],
            ['ir_r1_k3_s2_e4.5_c24_nre', 'ir_r1_k3_s1_e3.67_c24_nre'],
            ['ir_r1_k5_s2_e4_c40_se0.25', 'ir_r2_k5_s1_e6_c40_se0.25'],
            ['ir_r2_k5_s1_e3_c48_se0.25'],
            ['ir_r3_k5_s2_e6_c96_se0.25'],
            ['cn_r1_k1_s1_c576'],
        ],
        num_features=1024,
        stem_size=16,
        round_chs_fn=round_channels,
        se_layer=partial(
            SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=round_channels),
    )
    return build_blocks(
        DynamicMobileNetV3, DynamicMobileNetV3Features, variant, pretrained,
        **dict(dict(model_args, act_layer='hard_swish'), **kwargs))


@register_model
def mobilenetv3_small_100_dy(pretrained: bool = False, **kwargs) -> DynamicMobileNetV3:
    """MobileNetV3-Small with DyConv, K = 4 kernels per convolution."""
    return _mobilenetv3_small_100('mobilenetv3_small_100_dy', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def mobilenetv3_small_100_fmd(pretrained: bool = False, **kwargs) -> DynamicMobileNetV3:
    """MobileNetV3-Small with FMDConv, K = 4 kernels per convolution."""
    return _mobilenetv3_small_100('mobilenetv3_small_100_fmd', pretrained, conv_layer=FMDConv2d, **kwargs)
