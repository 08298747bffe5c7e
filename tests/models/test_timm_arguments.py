"""Every argument that timm's ResNet and MobileNetV3 take is one of ours: the network is timm's with that argument,
but for its dynamic convolutions."""
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BlurPool2d, FrozenBatchNormAct2d, GroupNorm1, SEModule
from timm.models._efficientnet_builder import decode_arch_def

from fmd_timm import DynamicConv2d

COMMON = [
    dict(), dict(num_classes=0), dict(in_chans=1), dict(global_pool='max'), dict(global_pool='catavgmax'),
    dict(global_pool='', num_classes=0), dict(act_layer='silu'), dict(act_layer=nn.SiLU), dict(aa_layer=BlurPool2d),
    dict(drop_rate=0.5), dict(drop_path_rate=0.5), dict(device='cpu'), dict(dtype=torch.float64),
    dict(dtype=torch.bfloat16), dict(scriptable=True), dict(exportable=True), dict(no_jit=True),
    dict(pretrained_cfg_overlay=dict(num_classes=3)), dict(pretrained_cfg=dict(num_classes=3, input_size=(1, 64, 64))),
    dict(cache_dir='elsewhere'), dict(features_only=True), dict(features_only=True, out_indices=(1, 3)),
    dict(features_only=True, out_indices=2), dict(features_only=True, out_indices=(-1,)),
    dict(features_only=True, feature_cls='hook'), dict(features_only=True, feature_cls='fx'),
    dict(features_only=True, feature_cls='getter'), dict(features_only=True, in_chans=1),
]
RESNET = COMMON + [
    dict(output_stride=8), dict(stem_width=32), dict(block_reduce_first=2), dict(down_kernel_size=3),
    dict(avg_down=True), dict(norm_layer=GroupNorm1), dict(norm_layer=FrozenBatchNormAct2d),
    dict(norm_layer=partial(nn.BatchNorm2d, eps=1e-3)), dict(aa_layer=nn.AvgPool2d), dict(drop_block_rate=0.1),
    dict(zero_init_last=False), dict(block_args=dict()), dict(block_args=dict(attn_layer='se')),
    dict(block_args=dict(attn_layer='eca')), dict(block_args=dict(attn_layer=partial(SEModule, rd_ratio=0.5))),
    dict(features_only=True, output_stride=8), dict(features_only=True, feature_cls='dict'),
    dict(features_only=True, feature_cfg=dict(out_indices=(0, 1))),
]
IMAGENET_STEM = [
    dict(output_stride=16), dict(stem_type='deep', stem_width=32), dict(stem_type='deep_tiered', stem_width=32),
    dict(replace_stem_pool=True), dict(replace_stem_pool=True, aa_layer=BlurPool2d),
]
BOTTLENECK = IMAGENET_STEM + [
    dict(), dict(cardinality=2, base_width=32), dict(base_width=128), dict(block_args=dict(attn_layer='se')),
    dict(aa_layer=BlurPool2d), dict(block_reduce_first=2), dict(avg_down=True), dict(features_only=True),
]
MOBILENET = COMMON + [
    dict(head_bias=False), dict(head_norm=True), dict(pad_type='same'), dict(se_from_exp=False),
    dict(bn_eps=1e-2, bn_momentum=0.2), dict(layer_scale_init_value=1e-5), dict(aa_layer='blur'),
    dict(depth_multiplier=2.0), dict(group_size=8), dict(features_only=True, output_stride=16),
    dict(features_only=True, pad_type='same'), dict(features_only=True, global_pool='max'),
    dict(features_only=True, feature_location='expansion', out_indices=(1, 2)),
]
SIZES = 'in_channels', 'out_channels', 'kernel_size', 'stride', 'dilation', 'groups'


def make_model(name, **args):
    defaults = dict(num_classes=5)
    if name.startswith('resnet'):
        defaults.update(channels=(8, 16, 32, 64), layers=(1, 2, 1, 1))
    return timm.create_model(name, **dict(defaults, **args))


def output_sizes(model):
    """Of the logits, or of each feature map, with the dtype."""
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    images = torch.empty(2, conv.in_channels, 64, 64, device=conv.weight.device, dtype=conv.weight.dtype)
    y = model(images)
    outputs = y if isinstance(y, list) else list(y.values()) if isinstance(y, dict) else [y]
    return [(output.shape, output.dtype) for output in outputs]


def assert_is_the_network_of_timm(model, static):
    """The same modules of the same sizes, but for the dynamic convolutions, which have the sizes of static ones."""
    dynamic = {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv2d)}
    inside = tuple(f'{name}.' for name in dynamic)
    modules = {name: module for name, module in model.named_modules() if not name.startswith(inside)}
    expected = dict(static.named_modules())
    assert dynamic and modules.keys() == expected.keys()
    for name, module in modules.items():
        if name in dynamic:
            assert [getattr(module, size) for size in SIZES] == [getattr(expected[name], size) for size in SIZES]
        elif not list(module.children()):
            assert repr(module) == repr(expected[name]), name
    assert output_sizes(model) == output_sizes(static)


@pytest.mark.parametrize('name, static, args', [
    *(('resnet18_fmd', 'resnet18', args) for args in RESNET + IMAGENET_STEM),
    *(('resnet50_od', 'resnet50', args) for args in BOTTLENECK),
    *(pytest.param(name, static, args, marks=pytest.mark.slow) for name, static, cases in (
        ('resnet18_fmd_cifar', 'resnet18_cifar', RESNET),
        ('mobilenetv3_small_100_fmd', 'mobilenetv3_small_100', COMMON)) for args in cases),
    *(('mobilenetv3_small_100_fmd', 'mobilenetv3_small_100', args) for args in MOBILENET if args not in COMMON),
], ids=str)
def test_arguments_of_timm_reach_the_network(name, static, args):
    assert_is_the_network_of_timm(make_model(name, **args), make_model(static, **args))


# timm's entrypoint of this network sets these and fails where they are given, too; its class takes them.
BLOCKS = decode_arch_def([['ds_r1_k3_s2_e1_c16'], ['ir_r1_k3_s2_e4_c24'], ['cn_r1_k1_s1_c64']])


@pytest.mark.parametrize('args, reached', [
    (dict(stem_size=20), lambda model: model.conv_stem.out_channels == 24),  # a multiple of 8
    (dict(stem_size=20, fix_stem=True), lambda model: model.conv_stem.out_channels == 20),
    (dict(round_chs_fn=lambda channels: 2 * channels), lambda model: model.conv_stem.out_channels == 32),
    (dict(num_features=512), lambda model: model.head_hidden_size == 512),
    (dict(norm_layer=GroupNorm1), lambda model: isinstance(model.bn1, nn.GroupNorm)),
    (dict(se_layer='eca'), lambda model: 'Eca' in type(model.blocks[0][0].se).__name__),
    (dict(block_args=BLOCKS), lambda model: len(model.blocks) == 3),
], ids=lambda value: '_'.join(value) if isinstance(value, dict) else '')
def test_arguments_of_the_class_reach_mobilenetv3(args, reached):
    model = make_model('mobilenetv3_small_100_fmd', **args)
    assert reached(model) and not reached(make_model('mobilenetv3_small_100_fmd'))
    assert output_sizes(model) == [((2, 5), torch.float32)]
