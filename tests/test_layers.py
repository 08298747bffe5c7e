"""FMDConv2d: what a user of nn.Conv2d relies on, and its temperatures."""
import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn

from fmd_timm import FMDConv2d, set_temperature


def make_conv(**kwargs):
    torch.manual_seed(0)
    return FMDConv2d(6, 8, 3, padding=1, **kwargs)


@pytest.mark.parametrize('args', [
    dict(kernel_size=1), dict(kernel_size=3, padding=1), dict(kernel_size=(1, 5), padding=(0, 2)),
    dict(kernel_size=7, stride=2, padding=3), dict(kernel_size=3, padding=2, dilation=2, groups=2),
    dict(kernel_size=3, padding='same'), dict(kernel_size=3, padding='valid', bias=False),
])
def test_takes_the_arguments_of_conv2d_and_gives_its_shape(args):
    x = torch.randn(2, 8, 12, 10)
    assert FMDConv2d(8, 4, **args)(x).shape == nn.Conv2d(8, 4, **args)(x).shape


def test_like_takes_over_the_sizes_of_a_convolution():
    static = nn.Conv2d(8, 4, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False, dtype=torch.float64)
    conv = FMDConv2d.like(static, num_kernels=2)
    assert conv.weight.shape == (2 * 4, *static.weight.shape[1:]) and conv.bias is None
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert conv(x).shape == static(x).shape and conv(x).dtype == torch.float64


def test_depthwise_has_no_attention_over_output_channels():
    assert FMDConv2d(8, 8, 3, groups=8).attention(torch.randn(2, 8, 5, 5))[2] is None


def test_one_kernel_has_no_kernel_attention_and_no_idle_parameters():
    conv = make_conv(num_kernels=1)
    assert conv.attention(torch.randn(2, 6, 5, 5))[0] is None
    conv(torch.randn(2, 6, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in conv.parameters())


def test_hidden_widths_are_those_of_the_authors():
    assert (make_conv().attention.gate_hidden, make_conv().attention.kernel_hidden) == (16, 2)
    assert FMDConv2d(512, 8, 1).attention.gate_hidden == 32
    assert FMDConv2d(3, 8, 1, num_kernels=5).attention.kernel_hidden == 5


def test_each_kernel_is_initialised_with_its_own_fan_out():
    conv = FMDConv2d(64, 64, 3, num_kernels=4)
    expected = math.sqrt(2 / (64 * 9))
    for kernel in conv.weight.chunk(4):
        assert kernel.std().item() == pytest.approx(expected, rel=0.03)  # 36,864 values
    squeeze = FMDConv2d(512, 64, 1).attention.squeeze.weight
    assert squeeze[:32].std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.03)
    assert squeeze[32:].std().item() == pytest.approx(math.sqrt(2 / 129), rel=0.03)


@pytest.mark.parametrize('args, message', [
    (dict(num_kernels=0), 'num_kernels must be at least 1, got 0'),
    (dict(out_channels=0), 'out_channels must be at least 1, got 0'),
    (dict(groups=4), 'groups must divide in_channels=6 and out_channels=8, got 4'),
    (dict(reduction=-1), 'reduction must not be negative, got -1'),
    (dict(padding='full'), "'same', 'valid' or pixels, got 'full'"),
    (dict(padding='same', stride=2), "padding='same' needs stride 1"),
])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        FMDConv2d(**dict(dict(in_channels=6, out_channels=8, kernel_size=3), **args))


def test_temperatures_are_saved_and_change_the_result():
    conv, x = make_conv().eval(), torch.randn(2, 6, 5, 5)
    hot = conv(x)
    set_temperature(conv, kernel=17.5, gate=3.0)
    assert not torch.equal(conv(x), hot)
    assert conv.attention.kernel_temperature.shape == conv.attention.gate_temperature.shape == (1,)
    for clone in copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)):
        assert torch.equal(clone(x), conv(x))
    loaded = make_conv().eval()
    loaded.load_state_dict(conv.state_dict())
    assert torch.equal(loaded(x), conv(x))


def test_high_temperature_makes_the_kernels_equal_and_the_gates_half():
    conv = make_conv()
    set_temperature(conv, kernel=1e6, gate=1e6)
    kernel_attn, in_attn, out_attn = conv.attention(torch.randn(2, 6, 5, 5))
    torch.testing.assert_close(kernel_attn, torch.full((2, 4), 0.25))
    torch.testing.assert_close(torch.cat([in_attn, out_attn], 1), torch.full((2, 14), 0.5))


@pytest.mark.parametrize('value', [0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(value):
    with pytest.raises(ValueError, match=f'kernel temperature must be positive and finite, got {value}'):
        set_temperature(make_conv(), kernel=value)


def test_temperature_of_a_network_without_dynamic_convolutions_is_an_error():
    with pytest.raises(ValueError, match='Linear has no dynamic convolution'):
        set_temperature(nn.Linear(2, 2), kernel=1.0)


def test_training_batch_of_one_image_uses_the_running_statistics():
    conv, x = make_conv(), torch.randn(1, 6, 5, 5)
    conv(torch.randn(4, 6, 5, 5))  # statistics that are not the initial ones
    before = copy.deepcopy(conv.attention.bn.state_dict())
    torch.testing.assert_close(conv.train()(x), conv.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in conv.attention.bn.state_dict().items())


def test_empty_training_batch_gives_every_parameter_a_gradient():
    conv = make_conv()
    y = conv(torch.randn(0, 6, 5, 5))
    assert y.shape == (0, 8, 5, 5)
    y.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in conv.parameters())
    assert all(buffer.isfinite().all() for buffer in conv.buffers())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_attention_is_float32_under_autocast(dtype):
    conv, x = make_conv(), torch.randn(2, 6, 5, 5)
    set_temperature(conv, kernel=30.0)
    with torch.autocast('cpu', dtype):
        attention = conv.attention(x)
        y = conv(x)
    assert all(attn.dtype == torch.float32 for attn in attention)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in conv.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_module_in_another_dtype_keeps_it(dtype):
    assert make_conv().to(dtype)(torch.randn(2, 6, 5, 5, dtype=dtype)).dtype == dtype


def test_channels_last_model_gives_channels_last_output():
    conv, x = make_conv(), torch.randn(2, 6, 5, 5)
    expected = conv(x)
    y = conv.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


def test_meta_device():
    conv = make_conv(device='meta')
    assert all(tensor.is_meta for tensor in conv.state_dict().values())
    assert conv(torch.empty(2, 6, 5, 5, device='meta')).shape == (2, 8, 5, 5)
    conv.to_empty(device='cpu').reset_parameters()
    assert conv.eval()(torch.randn(2, 6, 5, 5)).isfinite().all()
