"""make_dynamic: which convolutions of timm's CNNs it swaps, and that the network still does all a network does."""
import copy
import re

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.models import resnet

from fmd_timm import CondConv2d, DyConv2d, DynamicConv2d, FMDConv2d, ODConv2d, make_dynamic

FAMILIES = {  # timm's model -> convolutions that are swapped
    'test_resnet': 9, 'regnety_002': 39, 'efficientnet_b0': 47, 'tf_mobilenetv3_small_minimal_100': 33,
    'convnext_atto': 36, 'mobilenetv3_small_050': 33, 'densenet121': 119,
}


def make_images(**kwargs):
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64, **kwargs)


def make_model(name, method=FMDConv2d, **kwargs):
    torch.manual_seed(0)
    if name == 'densenet121':
        kwargs.update(block_config=(2, 2, 2, 2), growth_rate=8)
    model = timm.create_model(name, **dict(dict(num_classes=5) if 'features_only' not in kwargs else {}, **kwargs))
    return model, make_dynamic(model, method, num_kernels=2)


@pytest.mark.parametrize('name', FAMILIES)
def test_convolutions_of_the_blocks_are_swapped_and_named(name):
    sizes = 'in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups'
    static = timm.create_model(name, device='meta')
    model = timm.create_model(name, device='meta')
    swapped = make_dynamic(model, ODConv2d)
    assert len(swapped) == FAMILIES[name]
    assert swapped == [key for key, module in model.named_modules() if type(module) is ODConv2d]
    for key in swapped:
        old, new = static.get_submodule(key), model.get_submodule(key)
        assert [getattr(old, size) for size in sizes] == [getattr(new, size) for size in sizes]
        assert (old.bias is None) == (new.bias is None)
    kept = {key for key, module in static.named_modules() if isinstance(module, nn.Conv2d)} - set(swapped)
    outside = re.compile(r'^conv1|^features\.conv0|stem|\.se\.|downsample|head')
    assert all(outside.search(key) for key in kept), kept


def test_of_resnets_it_swaps_what_the_registered_models_have():
    for name, method in ('resnet18', 'cond'), ('resnet50', 'dy'), ('resnet18_cifar', 'fmd'):
        ours = timm.create_model(f'{name[:8]}_{method}{name[8:]}', device='meta')
        model = timm.create_model(name, device='meta')
        make_dynamic(model, dict(cond=CondConv2d, dy=DyConv2d, fmd=FMDConv2d)[method])
        assert list(model.state_dict()) == list(ours.state_dict())


def test_of_mobilenetv3_it_swaps_what_the_registered_model_has():
    model = timm.create_model('mobilenetv3_small_100', device='meta')
    make_dynamic(model, DyConv2d)
    assert list(model.state_dict()) == list(timm.create_model('mobilenetv3_small_100_dy', device='meta').state_dict())


@pytest.mark.parametrize('name', FAMILIES)
def test_network_trains(name):
    model, _ = make_model(name)
    logits = model(make_images())
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize('name', FAMILIES)
def test_features_keep_their_channels_and_reductions(name):
    model, swapped = make_model(name, features_only=True)
    assert swapped
    features = model(make_images())
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == model.feature_info.reduction()


@pytest.mark.parametrize('method', [CondConv2d, FMDConv2d])
@pytest.mark.parametrize('name', FAMILIES)
def test_saved_network_loads(name, method, tmp_path):
    model, _ = make_model(name, method)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / 'model.safetensors')
    loaded, _ = make_model(name, method)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    loaded.load_state_dict(load_file(tmp_path / 'model.safetensors'))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(make_images()), model.eval()(make_images()))


def test_a_filter_chooses_by_name_and_module():
    model = timm.create_model('test_resnet')
    swapped = make_dynamic(model, filter_fn=lambda name, conv: name.startswith('layer4') and conv.kernel_size == (3, 3))
    assert swapped and all(name.startswith('layer4') for name in swapped)
    assert isinstance(model.layer4[0].conv1, FMDConv2d) and type(model.layer3[0].conv1) is nn.Conv2d


def test_mode_and_dtype_stay():
    model = timm.create_model('test_resnet').double().eval()
    swapped = make_dynamic(model, num_kernels=3)
    conv = model.get_submodule(swapped[0])
    assert conv.num_kernels == 3 and not any(module.training for module in conv.modules())
    assert model(make_images(dtype=torch.float64)).dtype == torch.float64


def test_a_convolution_that_stands_in_two_places_stays_one():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    assert make_dynamic(model) == ['0', '2']
    assert model[0] is model[2] and isinstance(model[0], FMDConv2d)


def test_forward_hooks_stay_in_the_place_of_a_convolution():
    """Networks with `feature_location='expansion'` return their features by such hooks."""
    static = timm.create_model('efficientnet_b0', features_only=True, feature_location='expansion', out_indices=(1, 2))
    model = copy.deepcopy(static)
    make_dynamic(model)
    features, expected = model(make_images()), static(make_images())
    assert [feature.shape for feature in features] == [feature.shape for feature in expected] and len(features) == 2


@pytest.mark.parametrize('make', [
    lambda: timm.create_model('vit_tiny_patch16_224', device='meta'), lambda: nn.Linear(2, 2),
    lambda: nn.Sequential(nn.Conv2d(3, 8, 3)),
])
def test_a_network_without_such_a_convolution_is_refused(make):
    with pytest.raises(ValueError, match='has no convolution to make dynamic'):
        make_dynamic(make())


def test_a_dynamic_network_is_refused():
    with pytest.raises(ValueError, match='DynamicResNet has no convolution to make dynamic: of its 5 the filter'):
        make_dynamic(timm.create_model('resnet18_fmd', device='meta', channels=(8, 16, 32, 64)))


@pytest.mark.parametrize('name', ['test_nfnet', 'resnetv2_50x1_bit'])
def test_convolutions_that_standardise_their_weights_are_refused_and_nothing_is_swapped(name):
    model = timm.create_model(name, device='meta')
    message = r'conv1 of \w+: only nn.Conv2d and Conv2dSame can be made dynamic, got \w*StdConv'
    with pytest.raises(ValueError, match=message):
        make_dynamic(model)
    assert not any(isinstance(module, DynamicConv2d) for module in model.modules())


def test_a_block_can_be_swapped_alone():
    block = resnet.BasicBlock(8, 8)
    assert make_dynamic(block) == ['conv1', 'conv2']
