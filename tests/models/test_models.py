"""The networks are timm's, dynamic where they should be, and keep what timm asks of a model.

timm's own tests of its models run on ours too: test_timm_contract.py.
"""
import copy
import pickle
import re

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import DropPath, GroupNorm1, convert_sync_batchnorm
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.nn.init import calculate_gain

from fmd_timm import CondConv2d, DyConv2d, DynamicConv2d, FMDConv2d, ODConv2d, set_temperature
from fmd_timm.models._pretrained import MODULES

METHODS = dict(cond=CondConv2d, dy=DyConv2d, od=ODConv2d, fmd=FMDConv2d)
ALL_MODELS = timm.list_models(module=MODULES)
# Every method on one architecture and every architecture with one method; the other combinations take minutes.
FAST = re.compile(
    'resnet18_(cond|dy|od|fmd)|resnet50_fmd|resnet20_fmd_cifar|mobilenetv3_small_100_fmd|mobilenetv2_050_od')


def models(pattern):
    """The names that match, those not in FAST marked as slow."""
    marks = {name: () if FAST.fullmatch(name) else pytest.mark.slow for name in ALL_MODELS}
    return [pytest.param(name, marks=marks[name]) for name in ALL_MODELS if re.search(pattern, name)]


MODELS = models('')
DYNAMIC = models('_(cond|dy|od|fmd)')
DYNAMIC_NAMES = [param.values[0] for param in DYNAMIC]
RESNETS = models('^resnet')
CIFAR = models('_cifar$')


def make_model(name, **kwargs):
    """A narrow network whose residual branches, unlike those of a new one, have an effect."""
    torch.manual_seed(0)
    args = dict(num_classes=5)
    if name.startswith('resnet'):
        args.update(channels=(8, 16, 32, 64), layers=(2, 1, 1, 1), zero_init_last=False)
    if name.startswith('resnet20'):  # narrow as it is
        args.update(channels=(16, 32, 64), layers=(2, 1, 1))
    if name.startswith('mobilenetv2'):  # each BatchNorm over two pooled values makes differences larger
        args.update(depth_multiplier=0.3)  # a block a stage
    return timm.create_model(name, **dict(args, **kwargs))


def make_images(batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, 64, 64)


def static_name(name):
    """timm's network of this architecture, which has no ResNet-20."""
    return 'resnet20_cifar' if name.startswith('resnet20') else re.sub('_(cond|dy|od|fmd|cifar).*', '', name)


def method_of(name):
    return METHODS[re.search('_(cond|dy|od|fmd)', name).group(1)]


def dynamic_convs(model):
    return [module for module in model.modules() if isinstance(module, DynamicConv2d)]


def test_models_are_listed():
    assert set(ALL_MODELS) == {
        *(f'resnet{depth}_{method}{suffix}' for depth in (18, 50) for method in METHODS for suffix in ('', '_cifar')),
        *(f'resnet20_{method}_cifar' for method in METHODS),
        *(f'{name}_{method}' for name in ('resnet34', 'resnet101') for method in METHODS),
        *(f'mobilenetv2_{width}_{method}' for width in ('050', '075', '100') for method in METHODS),
        'resnet18_cifar', 'resnet20_cifar', 'resnet50_cifar', 'mobilenetv3_small_100_dy', 'mobilenetv3_small_100_fmd',
    }


@pytest.mark.parametrize('name, num_kernels, millions', [
    ('resnet18_od', 1, 11.94), ('resnet18_od', 4, 44.90), ('resnet50_od', 1, 28.64), ('resnet50_od', 4, 90.67),
    ('resnet101_od', 1, 50.82), ('resnet101_od', 2, 90.44), ('mobilenetv2_050_od', 1, 2.43),
    ('mobilenetv2_050_od', 4, 4.44), ('mobilenetv2_075_od', 1, 3.51), ('mobilenetv2_075_od', 4, 7.50),
    ('mobilenetv2_100_od', 1, 4.94), ('mobilenetv2_100_od', 4, 11.51),
])
def test_networks_of_odconv_have_as_many_parameters_as_its_authors_state(name, num_kernels, millions):
    """The tables of github.com/OSVAI/ODConv."""
    model = timm.create_model(name, device='meta', num_kernels=num_kernels)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_resnet20_is_the_network_of_he_et_al():
    """arXiv 1512.03385, section 4.2 and table 6: 19 convolutions of 3x3, one linear layer, 0.27 M parameters."""
    model = timm.create_model('resnet20_cifar')
    convs = [(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
             for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    expected = [(3, 16, (3, 3), (1, 1))]
    for before, width in (16, 16), (16, 32), (32, 64):
        stride = width // before
        expected += [(before, width, (3, 3), (stride, stride)), *5 * [(width, width, (3, 3), (1, 1))]]
    assert convs == expected
    assert [module.out_features for module in model.modules() if isinstance(module, nn.Linear)] == [10]
    assert sum(p.numel() for p in model.parameters()) == 269_722

    # shortcut A: with closed branches a stage halves its images and adds channels of zeros
    x = torch.rand(2, 16, 32, 32)
    y = model.eval().layer2(x)
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()
    with pytest.raises(ValueError, match='channels must not become fewer .* got 32, 16'):
        timm.create_model('resnet20_cifar', channels=(32, 16, 64))


def test_features_of_three_stages_are_counted_as_such():
    model = make_model('resnet20_cifar').eval()
    assert len(model.forward_intermediates(make_images(), intermediates_only=True)) == 4
    last, = model.forward_intermediates(make_images(), indices=1, intermediates_only=True)
    torch.testing.assert_close(last, model.forward_features(make_images()))
    logits = model(make_images())
    assert model.prune_intermediate_layers(indices=[3], prune_head=False) == [3]
    torch.testing.assert_close(model(make_images()), logits)
    for args in {}, dict(feature_cls='getter'), dict(out_indices=(1, 2)), {}:  # and back: no call changes the next
        features = make_model('resnet20_fmd_cifar', features_only=True, **args)(make_images())
        assert len(features) == (2 if 'out_indices' in args else 4)


@pytest.mark.parametrize('conv_bias', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', [model for model in ALL_MODELS if not re.fullmatch('resnet.._cifar', model)])
def test_every_convolution_of_the_blocks_is_of_the_method_and_no_other(name, conv_bias):
    kind = {}
    for conv_name, conv in timm.create_model(name, device='meta', conv_bias=conv_bias).named_modules():
        if isinstance(conv, DynamicConv2d):
            assert conv.num_kernels == 4 and type(conv) is method_of(name)
            assert (conv.bias is not None) == conv_bias
            kind[conv_name] = 'dynamic'
        elif isinstance(conv, nn.Conv2d):
            kind[conv_name] = 'static'
    of_timm = timm.create_model(static_name(name), device='meta').named_modules()
    in_block = re.compile(r'layer\d\.\d+\.conv\d|blocks\.\d\.\d\.conv(_pw|_dw|_pwl)?')
    if 'mobilenetv2' in name:
        in_block = re.compile(f'{in_block.pattern}|conv_head')
    assert kind == {
        conv_name: 'dynamic' if in_block.fullmatch(conv_name) else 'static'
        for conv_name, conv in of_timm if isinstance(conv, nn.Conv2d)
    }


@pytest.mark.parametrize('name', MODELS)
def test_with_one_kernel_and_open_gates_it_is_the_network_of_timm(name):
    model = make_model(name, **(dict(num_kernels=1) if name in DYNAMIC_NAMES else {})).eval()
    for conv in dynamic_convs(model):
        conv.attention.make_constant()
        for layer in conv.attention.last_layers:
            nn.init.constant_(getattr(conv.attention, layer).bias, 100.0)  # sigmoid(100) is 1
    static = make_model(static_name(name)).eval()
    if name.endswith('_cifar') and not name.startswith('resnet20'):
        static.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        static.maxpool = nn.Identity()
    static.load_state_dict({key: value for key, value in model.state_dict().items() if '.attention.' not in key})
    x = make_images().double()
    torch.testing.assert_close(model.double()(x), static.double()(x))


@pytest.mark.parametrize('name', CIFAR)
def test_cifar_stem_keeps_the_resolution(name):
    model = timm.create_model(name, device='meta')
    assert model.num_classes == 10
    features = model.forward_intermediates(torch.empty(2, 3, 32, 32, device='meta'), intermediates_only=True)
    sizes = [32, 32, 16, 8] if name.startswith('resnet20') else [32, 32, 16, 8, 4]
    assert [feature.shape[-1] for feature in features] == sizes
    assert features[-1].shape[-2:] == model.pretrained_cfg['pool_size']
    assert model.conv1.kernel_size == (3, 3)


@pytest.mark.parametrize('name', DYNAMIC)
def test_arguments_of_the_dynamic_convolutions_are_reachable(name):
    widths = {CondConv2d: [], DyConv2d: ['kernel_ratio'], ODConv2d: ['reduction']}.get(
        method_of(name), ['kernel_ratio', 'reduction'])
    model = make_model(name, num_kernels=2, **{width: 0.5 for width in widths})
    usual = make_model(name, num_kernels=2)
    for conv, other in zip(dynamic_convs(model), dynamic_convs(usual), strict=True):
        assert conv.num_kernels == 2
        assert conv.weight.shape[0] == 2 * conv.out_channels
        if conv.in_channels == 64 and widths:
            assert conv.attention.squeeze.out_features > other.attention.squeeze.out_features
    for width in {'kernel_ratio', 'reduction'}.difference(widths):
        with pytest.raises(TypeError, match=width):
            make_model(name, **{width: 0.5})


@pytest.mark.parametrize('name', MODELS)
def test_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match='num_kernel'):
        timm.create_model(name, num_kernel=2)


@pytest.mark.parametrize('name', [name for name in ALL_MODELS if not timm.is_model_pretrained(name)])
def test_without_published_weights_pretrained_says_what_there_is(name):
    with pytest.raises(RuntimeError, match=rf'{name} has no published weights \(with weights: .*pretrained=False'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('name', ALL_MODELS)
def test_unknown_tag_says_what_there_is(name):
    with pytest.raises(RuntimeError, match=rf'\(in22k\) for {name}.*With weights: .*resnet18_fmd.inflated_a1_in1k'):
        timm.create_model(f'{name}.in22k', pretrained=True)


@pytest.mark.parametrize('name', MODELS)
def test_number_of_classes_and_input_channels(name):
    assert make_model(name, num_classes=7, in_chans=1)(torch.randn(2, 1, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize('name', MODELS)
def test_forward_is_features_then_head(name):
    model, x = make_model(name).eval(), make_images()
    features = model.forward_features(x)
    assert features.shape[1] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    if name.startswith('resnet'):  # MobileNetV3 has a convolution behind the pooling
        torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


@pytest.mark.parametrize('name', MODELS)
def test_intermediates_are_those_of_the_network_also_after_pruning(name):
    model, x = make_model(name).eval(), make_images()
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    if 'mobilenetv2' not in name:  # whose last 1x1 comes after them
        torch.testing.assert_close(intermediates[-1], final)
    chosen = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    torch.testing.assert_close(chosen, [intermediates[1], intermediates[3]])
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    torch.testing.assert_close(model.forward_features(x), intermediates[2])
    assert not list(model.get_classifier().parameters())
    if name.startswith('resnet'):
        assert not list(model.layer3.parameters())


@pytest.mark.parametrize('name', MODELS)
def test_features_only_has_the_channels_and_reductions_it_states(name):
    model = make_model(name, features_only=True, out_indices=(0, 2, -1))
    stated = list(zip(model.feature_info.channels(), model.feature_info.reduction()))
    last = 4 if name.startswith('resnet20') else 8
    assert [reduction for _, reduction in stated] == ([1, 2, last] if name.endswith('_cifar') else [2, 8, 32])
    assert [(f.shape[1], 64 // f.shape[2]) for f in model(make_images())] == stated


@pytest.mark.parametrize('name', RESNETS)
def test_output_stride_dilates_the_same_weights(name):
    full = (4 if name.startswith('resnet20') else 8) if name.endswith('_cifar') else 32
    state = make_model(name).state_dict()
    for output_stride in {full, full // 2, max(full // 4, 2)}:
        model = make_model(name, output_stride=output_stride)
        model.load_state_dict(state)
        assert model.forward_features(make_images()).shape[-1] == 64 // output_stride
        assert model.feature_info[-1]['reduction'] == output_stride
    with pytest.raises((ValueError, AssertionError)):  # the latter is timm's
        make_model(name, output_stride=64)


@pytest.mark.parametrize('name', RESNETS)
@pytest.mark.parametrize('pool, factor', [('avg', 1), ('max', 1), ('avgmax', 1), ('catavgmax', 2)])
def test_global_pool(name, pool, factor):
    model = make_model(name, global_pool=pool)
    assert model.head_hidden_size == factor * model.num_features == model.get_classifier().in_features
    assert model(make_images()).shape == (2, 5)


@pytest.mark.parametrize('name', RESNETS)
def test_without_global_pool_the_output_is_the_feature_map(name):
    model = make_model(name, num_classes=0, global_pool='').eval()
    torch.testing.assert_close(model(make_images()), model.forward_features(make_images()))


@pytest.mark.parametrize('name', MODELS)
def test_reset_classifier(name):
    model, x = make_model(name, global_pool='max').eval(), make_images()
    classifier = model.pretrained_cfg['classifier']
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == 3 and model(x).shape == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled)
    assert model.get_classifier() is model.get_submodule(classifier)


@pytest.mark.parametrize('name', MODELS)
def test_reset_classifier_keeps_frozen_parameters_frozen(name):
    model = make_model(name).requires_grad_(False)
    model.reset_classifier(3)
    model(make_images()).sum().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f'{model.pretrained_cfg["classifier"]}.{part}' for part in ('weight', 'bias')}


@pytest.mark.parametrize('name', MODELS)
def test_gradient_checkpointing_changes_no_gradient(name):
    models = make_model(name), make_model(name)
    models[1].set_grad_checkpointing()
    for model in models:
        model(make_images()).square().mean().backward()
    for plain, checkpointed in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(checkpointed.grad, plain.grad)


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_parameters_of_a_block_are_one_group(name, coarse):
    groups = group_parameters(make_model(name), make_model(name).group_matcher(coarse=coarse), reverse=True)
    block, count = (r'layer\d', 4) if name.startswith('resnet') else (r'blocks\.\d', 7 if 'v2' in name else 6)
    if not coarse:
        block, count = rf'{block}\.\d', {4: 5, 6: 12, 7: 8}[count]
    count -= name.startswith('resnet20')  # a stage, of one block
    blocks = {}
    for parameter, group in groups.items():
        if match := re.match(block, parameter):
            blocks.setdefault(match.group(), set()).add(group)
    assert len(blocks) == count
    assert all(len(group) == 1 for group in blocks.values())
    assert len(set.union(*blocks.values())) == len(blocks)


@pytest.mark.parametrize('name', DYNAMIC)
def test_weight_decay_is_for_kernels_and_attention_matrices_only(name):
    model = make_model(name, conv_bias=True)
    no_decay, decay = param_groups_weight_decay(model, 0.1)
    assert (no_decay['weight_decay'], decay['weight_decay']) == (0.0, 0.1)
    name_of = {parameter: key for key, parameter in model.named_parameters()}
    decaying = {name_of[parameter] for parameter in decay['params']}
    matrices = {
        f'{key}.weight' for key, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, DynamicConv2d))
    }
    assert decaying == matrices
    assert {name_of[parameter] for parameter in no_decay['params']} == set(name_of.values()) - matrices


@pytest.mark.parametrize('name', MODELS)
def test_drop_path_drops_branches_in_training_only(name):
    plain, model, x = make_model(name).eval(), make_model(name, drop_path_rate=0.9).eval(), make_images(8)
    torch.testing.assert_close(model(x), plain(x))
    assert max(module.drop_prob for module in model.modules() if isinstance(module, DropPath)) > 0.7
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize('name', MODELS)
def test_norm_layer_replaces_the_norms_outside_the_attention(name):
    model = make_model(name, norm_layer=GroupNorm1)
    norms = {key for key, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert norms == {key for key, _ in model.named_modules() if key.endswith('.attention.bn')}
    assert model(make_images()).isfinite().all()


@pytest.mark.parametrize('name', models('mobilenet'))
def test_kernels_of_mobilenets_are_initialised_as_those_of_timm(name):
    static = timm.create_model(static_name(name))
    for key, conv in timm.create_model(name).named_modules():
        if isinstance(conv, DynamicConv2d):
            for kernel in conv.weight.chunk(4):
                # of both, five standard errors of a standard deviation
                expected = static.get_submodule(key).weight.std().item()
                assert kernel.std().item() == pytest.approx(expected, rel=10 / (2 * kernel.numel()) ** 0.5)


@pytest.mark.parametrize('name', models('mobilenet'))
def test_features_of_mobilenets_can_be_dilated(name):
    state = make_model(name).state_dict()
    model = make_model(name, features_only=True, output_stride=16)
    model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()})
    assert [f.shape[-1] for f in model(make_images())] == [32, 16, 8, 4, 4]


@pytest.mark.parametrize('zero_init_last', [False, True])
@pytest.mark.parametrize('name', RESNETS)
def test_zero_init_last_closes_the_residual_branches(name, zero_init_last):
    model = make_model(name, zero_init_last=zero_init_last)
    last = 'bn2' if name.startswith(('resnet18', 'resnet20', 'resnet34')) else 'bn3'
    for stage in model.layer1, model.layer2, model.layer3, model.layer4:
        for block in stage:
            assert (getattr(block, last).weight == (0 if zero_init_last else 1)).all()


@pytest.mark.parametrize('name', models('^resnet.*_(cond|dy|od|fmd)'))
def test_init_weights_gives_each_kernel_its_own_fan_out(name):
    model = make_model(name)
    with torch.no_grad():
        for conv in dynamic_convs(model):
            conv.weight.fill_(9.0)
    model.init_weights()
    for conv in dynamic_convs(model):
        expected = calculate_gain('relu') / (conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]) ** 0.5
        for kernel in conv.weight.chunk(4):
            # five standard errors of a standard deviation
            assert kernel.std().item() == pytest.approx(expected, rel=5 / (2 * kernel.numel()) ** 0.5)


@pytest.mark.parametrize('convert, name', [
    # torch's would lose the activations that MobileNetV3 has in its BatchNorms
    *(pytest.param(nn.SyncBatchNorm.convert_sync_batchnorm, *param.values, marks=param.marks) for param in RESNETS),
    *(pytest.param(convert_sync_batchnorm, *param.values, marks=param.marks) for param in MODELS),
])
def test_sync_batchnorm_replaces_every_batchnorm_and_keeps_the_result(convert, name):
    model = make_model(name)
    model(make_images(4))  # statistics that are not the initial ones
    model.eval()
    expected, keys = model(make_images()), list(model.state_dict())
    model = convert(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms) and len(norms) > len(dynamic_convs(model))
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(make_images()), expected)


@pytest.mark.parametrize('name', DYNAMIC)
def test_copies_compute_the_same(name):
    model = make_model(name).eval()
    set_temperature(model, kernel=17.5, gate=3.0)
    expected = model(make_images())
    for clone in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        torch.testing.assert_close(clone(make_images()), expected)


@pytest.mark.parametrize('name', DYNAMIC)
def test_temperature_of_a_network_reaches_every_dynamic_convolution(name):
    model = make_model(name).eval()
    cold = model(make_images())
    set_temperature(model, kernel=17.5, gate=3.0)
    assert torch.equal(model(make_images()), cold) == (method_of(name) is CondConv2d)  # it has none
    expected = {CondConv2d: {}, FMDConv2d: dict(kernel_temperature=17.5, gate_temperature=3.0)}.get(
        method_of(name), dict(kernel_temperature=17.5))
    for conv in dynamic_convs(model):
        found = {key: buffer.item() for key, buffer in conv.attention.named_buffers(recurse=False)}
        assert found == expected


@pytest.mark.parametrize('name', DYNAMIC)
def test_ema_follows_weights_and_temperature(name):
    model = make_model(name)
    ema = ModelEmaV3(model, decay=0.5)
    before = {key: value.clone() for key, value in ema.module.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    set_temperature(model, kernel=9.0)
    ema.update(model)
    state_dict = model.state_dict()
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (before[key] + state_dict[key]) / 2)
    set_temperature(ema, kernel=1.0)
    for network, expected in (ema.module, 1), (model, 9):
        temperatures = [buffer for key, buffer in network.named_buffers() if key.endswith('kernel_temperature')]
        assert all(temperature == expected for temperature in temperatures)
        assert len(temperatures) == (0 if method_of(name) is CondConv2d else len(dynamic_convs(network)))
    assert ema(make_images()).isfinite().all()


@pytest.mark.parametrize('name', MODELS)
def test_channels_last_network_gives_the_same_result_and_gradients(name):
    plain, last = make_model(name).double(), make_model(name).double().to(memory_format=torch.channels_last)
    x = make_images().double()
    features = last.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(features, plain.forward_features(x))
    plain(x).square().mean().backward()
    last(x.to(memory_format=torch.channels_last)).square().mean().backward()
    for expected, parameter in zip(plain.parameters(), last.parameters(), strict=True):
        # of the largest value: gradients reach 37,000 here, and images changed by 1e-15 move them by 1e-5
        scale = expected.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize('name', MODELS)
def test_bfloat16_autocast_trains_in_float32(name):
    model = make_model(name)
    with torch.autocast('cpu', torch.bfloat16):
        y = model(make_images())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@pytest.mark.parametrize('name', MODELS)
def test_network_on_the_meta_device_takes_the_weights_of_another(name):
    model, on_meta = make_model(name).eval(), make_model(name, device='meta').eval()
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())
    assert on_meta(torch.empty(2, 3, 64, 64, device='meta')).shape == (2, 5)
    on_meta.load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(on_meta(make_images()), model(make_images()))


@pytest.mark.parametrize('args', [
    dict(output_stride=32), dict(stem_type='deep'), dict(replace_stem_pool=True), dict(stem_width=15),
])
@pytest.mark.parametrize('name', ['resnet18_cifar', 'resnet18_fmd_cifar'])
def test_networks_for_small_images_refuse_what_their_stem_has_not(name, args):
    with pytest.raises(ValueError, match=f'{list(args)[0]} must be .* got {list(args.values())[0]!r}'):
        timm.create_model(name, device='meta', **args)
