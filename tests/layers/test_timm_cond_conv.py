"""accelerate_condconv: timm's own CondConv networks compute by our operator what they did."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import CondConv2d
from torch.nn.utils import prune

from fmd_timm import accelerate_condconv
from fmd_timm.layers.timm_cond_conv import RoutedConv2d

LAYERS = {
    'pointwise': dict(kernel_size=1),
    'depthwise': dict(kernel_size=3, stride=2, groups=8),
    'grouped': dict(kernel_size=3, groups=2, padding=1, bias=True),
    'tensorflow': dict(kernel_size=3, stride=2, padding='same'),
    'tensorflow_depthwise': dict(kernel_size=5, stride=2, padding='same', groups=8, bias=True),
    'dilated': dict(kernel_size=(3, 1), dilation=2, bias=True),
}


def both(**kwargs):
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(conv=CondConv2d(8, 8, num_experts=3, **kwargs)))
    ours = copy.deepcopy(model)
    assert accelerate_condconv(ours) == ['conv']
    return model.conv, ours.conv


@pytest.mark.parametrize('batch', [1, 4])
@pytest.mark.parametrize('name', LAYERS)
def test_layer_and_gradients_are_those_of_timm(name, batch):
    theirs, ours = both(**LAYERS[name])
    x, routing = torch.randn(batch, 8, 9, 10), torch.rand(batch, 3)
    results = []
    for conv in (theirs, ours):
        images, weights = x.clone().requires_grad_(), routing.clone().requires_grad_()
        y = conv(images, weights)
        y.sin().sum().backward()
        results.append([y, images.grad, weights.grad, *(parameter.grad for parameter in conv.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_layer_in_another_dtype(dtype):
    _, ours = both(kernel_size=3)
    x, routing = torch.randn(2, 8, 7, 7), torch.rand(2, 3)
    expected = ours(x, routing)
    result = ours.to(dtype)(x.to(dtype), routing.to(dtype))
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), expected, rtol=0.05, atol=0.05)


def test_network_keeps_its_outputs_and_its_state_dict():
    torch.manual_seed(0)
    model = timm.create_model('tf_efficientnet_cc_b0_4e', num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
    before = {name: (value.data_ptr(), value.shape) for name, value in model.state_dict().items()}
    names = accelerate_condconv(model)
    assert [name for name, module in model.named_modules() if isinstance(module, RoutedConv2d)] == names
    assert not any(isinstance(module, CondConv2d) for module in model.modules()) and len(names) == 24
    assert {name: (value.data_ptr(), value.shape) for name, value in model.state_dict().items()} == before
    for layout in torch.contiguous_format, torch.channels_last:
        with torch.inference_mode():
            result = model.to(memory_format=layout)(images.contiguous(memory_format=layout))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_features_of_a_network_are_extracted():
    model = timm.create_model('tf_efficientnet_cc_b0_4e', features_only=True).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(images)
        accelerate_condconv(model)
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-8)


def test_forward_hooks_stay_and_a_layer_at_two_places_is_one():
    conv, seen = CondConv2d(8, 8), []
    conv.register_forward_pre_hook(lambda *args: seen.append('before'))
    conv.register_forward_hook(lambda *args: seen.append('after'))
    model = nn.ModuleDict(dict(a=conv, b=conv))
    assert accelerate_condconv(model) == ['a', 'b'] and model.a is model.b
    model.a(torch.randn(2, 8, 5, 5), torch.rand(2, 4))
    assert seen == ['before', 'after']


def test_a_network_without_condconv_is_refused():
    with pytest.raises(ValueError, match="ResNet has no CondConv2d of timm's"):
        accelerate_condconv(timm.create_model('test_resnet'))


def test_a_pruned_layer_is_refused_and_nothing_is_changed():
    model = nn.ModuleDict(dict(conv=CondConv2d(8, 8)))
    prune.l1_unstructured(model.conv, 'weight', amount=0.5)
    with pytest.raises(ValueError, match=r"conv must have its weight as a parameter, got \['weight_orig'\]"):
        accelerate_condconv(model)
    assert type(model.conv) is CondConv2d
