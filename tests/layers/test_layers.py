"""The dynamic convolutions: what a user of nn.Conv2d relies on, each method's attention, and the temperatures."""
import copy
import math
import pickle

import pytest
import timm.layers
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.init import calculate_gain

from fmd_timm import CondConv2d, DyConv2d, FMDConv2d, ODConv2d, dynamic_conv2d, set_temperature
from fmd_timm.layers.attention import pool

METHODS = [CondConv2d, DyConv2d, ODConv2d, FMDConv2d]
every_method = pytest.mark.parametrize('method', METHODS, ids=lambda method: method.__name__)


def make_conv(method=FMDConv2d, **kwargs):
    torch.manual_seed(0)
    return method(6, 8, 3, padding=1, **kwargs)


def attention_of(conv, x):
    """The attentions a method has, by name."""
    names = 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn'
    return {name: attn for name, attn in zip(names, conv.attention(x), strict=True) if attn is not None}


@every_method
@pytest.mark.parametrize('args', [
    dict(kernel_size=1), dict(kernel_size=3, padding=1), dict(kernel_size=(1, 5), padding=(0, 2)),
    dict(kernel_size=7, stride=2, padding=3), dict(kernel_size=3, padding=2, dilation=2, groups=2),
    dict(kernel_size=3, padding='same'), dict(kernel_size=3, padding='valid', bias=False),
])
def test_takes_the_arguments_of_conv2d_and_gives_its_shape(args, method):
    x = torch.randn(2, 8, 12, 10)
    assert method(8, 4, **args)(x).shape == nn.Conv2d(8, 4, **args)(x).shape


@every_method
def test_like_takes_over_the_sizes_of_a_convolution(method):
    static = nn.Conv2d(8, 4, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False, dtype=torch.float64)
    conv = method.like(static, num_kernels=2)
    assert conv.weight.shape == (2 * 4, *static.weight.shape[1:]) and conv.bias is None
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    assert conv(x).shape == static(x).shape and conv(x).dtype == torch.float64


@pytest.mark.parametrize('method', [ODConv2d, FMDConv2d])
def test_depthwise_has_no_attention_over_output_channels(method):
    assert 'out_attn' not in attention_of(method(8, 8, 3, groups=8), torch.randn(2, 8, 5, 5))


@pytest.mark.parametrize('method, sizes', [
    (CondConv2d, dict(kernel_attn=4)), (DyConv2d, dict(kernel_attn=4)),
    (ODConv2d, dict(kernel_attn=4, in_attn=6, out_attn=8, tap_attn=9)),
    (FMDConv2d, dict(kernel_attn=4, in_attn=6, out_attn=8)),
])
def test_attentions_of_each_method(method, sizes):
    found = attention_of(make_conv(method), torch.randn(2, 6, 5, 5))
    assert {name: attn.shape for name, attn in found.items()} == {name: (2, size) for name, size in sizes.items()}
    summed = found['kernel_attn'].sum(1)
    if method is not CondConv2d:  # a softmax
        torch.testing.assert_close(summed, torch.ones(2))
    else:
        assert ((found['kernel_attn'] > 0) & (found['kernel_attn'] < 1)).all()


def test_a_kernel_of_one_tap_has_no_attention_over_taps():
    assert 'tap_attn' not in attention_of(ODConv2d(6, 8, 1), torch.randn(2, 6, 5, 5))


@every_method
def test_one_kernel_has_no_idle_parameters(method):
    conv = make_conv(method, num_kernels=1)
    assert ('kernel_attn' in attention_of(conv, torch.randn(2, 6, 5, 5))) == (method is CondConv2d)
    conv(torch.randn(2, 6, 5, 5)).sum().backward()
    assert all(parameter.grad is not None for parameter in conv.parameters())


def test_hidden_widths_are_those_of_the_authors():
    assert (make_conv().attention.gate_hidden, make_conv().attention.kernel_hidden) == (16, 2)
    assert FMDConv2d(512, 8, 1).attention.gate_hidden == 32
    assert FMDConv2d(3, 8, 1, num_kernels=5).attention.kernel_hidden == 5
    assert [ODConv2d(width, 8, 1).attention.hidden for width in (64, 512)] == [16, 32]
    assert [DyConv2d(width, 8, 1).attention.kernel_hidden for width in (64, 3)] == [16, 4]


@every_method
def test_each_kernel_is_initialised_with_its_own_fan_out(method):
    conv = method(64, 64, 3, num_kernels=4)
    expected = math.sqrt(2 / (64 * 9))
    for kernel in conv.weight.chunk(4):
        assert kernel.std().item() == pytest.approx(expected, rel=0.03)  # 36,864 values


def test_each_part_of_the_attention_is_initialised_with_its_own_fan_out():
    squeeze = FMDConv2d(512, 64, 1).attention.squeeze.weight
    assert squeeze[:32].std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.03)
    assert squeeze[32:].std().item() == pytest.approx(math.sqrt(2 / 129), rel=0.03)
    heads = ODConv2d(512, 256, 3).attention.heads.weight  # (512 + 256 + 9 + 4, 32)
    for part, fan_out in zip(heads.split([512, 256, 9, 4]), (512, 256, 9, 4)):
        # five standard errors of a standard deviation
        expected = calculate_gain('relu') / fan_out ** 0.5
        assert part.std().item() == pytest.approx(expected, rel=5 / (2 * part.numel()) ** 0.5)
    routing = CondConv2d(512, 8, 1).attention.kernel
    assert routing.weight.abs().max().item() == pytest.approx(1 / math.sqrt(512 + 4), rel=0.01)
    assert (routing.bias == 0).all()


def test_cond_conv_is_that_of_timm_for_the_same_routing_weights():
    args = dict(in_channels=6, out_channels=8, kernel_size=3, stride=2, padding=1, groups=2, bias=True)
    conv, theirs = CondConv2d(**args).double(), timm.layers.CondConv2d(**args, num_experts=4).double()
    nn.init.normal_(conv.bias)
    with torch.no_grad():
        theirs.weight.copy_(conv.weight.reshape(4, -1))
        theirs.bias.copy_(conv.bias.reshape(4, -1))
    x = torch.randn(3, 6, 9, 9, dtype=torch.float64)
    routing_weights, *_ = conv.attention(x)
    grad = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    y, expected = conv(x), theirs(x, routing_weights.detach())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (y * grad).sum().backward()
    (expected * grad).sum().backward()
    torch.testing.assert_close(conv.weight.grad.reshape(4, -1), theirs.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(conv.bias.grad.reshape(4, -1), theirs.bias.grad, rtol=1e-12, atol=1e-12)


def test_routing_of_cond_conv_is_that_of_timm():
    """timm's CondConvResidual: sigmoid(routing_fn(pooled)) with one nn.Linear."""
    conv, x = make_conv(CondConv2d).double(), torch.randn(3, 6, 9, 9, dtype=torch.float64)
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
    expected = torch.sigmoid(pooled @ conv.attention.kernel.weight.T + conv.attention.kernel.bias)
    torch.testing.assert_close(conv.attention(x)[0], expected)


@pytest.mark.parametrize('temperature', [1.0, 30.0])
def test_dy_conv_is_the_equations_of_its_paper(temperature):
    """arXiv 1912.03458: W(x) = sum_k pi_k(x) W_k, b(x) = sum_k pi_k(x) b_k, pi = softmax(z / tau), with z by average
    pooling, a layer to a quarter of the channels, ReLU and a layer to K."""
    conv = DyConv2d(16, 8, 3, stride=2, padding=1).double()
    nn.init.normal_(conv.bias)
    nn.init.normal_(conv.attention.kernel.bias)
    set_temperature(conv, kernel=temperature)
    state = {key: value.detach().clone().requires_grad_() for key, value in conv.named_parameters()}
    x = torch.randn(3, 16, 9, 9, dtype=torch.float64, requires_grad=True)
    ours = x.detach().clone().requires_grad_()

    assert state['attention.squeeze.weight'].shape == (16 // 4, 16)
    images = []
    for image in x:
        pooled = image.sum((1, 2)) / 81
        hidden = torch.clamp(state['attention.squeeze.weight'] @ pooled, min=0)
        z = state['attention.kernel.weight'] @ hidden + state['attention.kernel.bias']
        exponents = torch.exp(z / temperature)
        pi = exponents / exponents.sum()
        weight = sum(pi[k] * state['weight'][8 * k:8 * (k + 1)] for k in range(4))
        bias = sum(pi[k] * state['bias'][8 * k:8 * (k + 1)] for k in range(4))
        images.append(F.conv2d(image[None], weight, bias, stride=2, padding=1))
    expected = torch.cat(images)

    y, grad = conv(ours), torch.randn_like(expected)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    (y * grad).sum().backward()
    (expected * grad).sum().backward()
    torch.testing.assert_close(ours.grad, x.grad, rtol=1e-10, atol=1e-10)
    for key, parameter in conv.named_parameters():
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('size', [7, 8])
@pytest.mark.parametrize('stride', [1, 2])
def test_like_pads_as_the_same_convolution_of_timm(stride, size):
    static = timm.layers.Conv2dSame(4, 6, 3, stride=stride).double()
    conv = CondConv2d.like(static, num_kernels=1)
    conv.attention.make_constant()
    with torch.no_grad():
        conv.weight.copy_(2 * static.weight)  # the routing weight is 1/2
        conv.bias.copy_(2 * static.bias)
    x = torch.randn(2, 4, size, size + 2, dtype=torch.float64)
    torch.testing.assert_close(conv(x), static(x))
    assert 'TensorFlow' in repr(conv)


@pytest.mark.parametrize('conv, message', [
    (timm.layers.StdConv2d(4, 6, 3), 'only nn.Conv2d and Conv2dSame can be made dynamic, got StdConv2d'),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'), "pads with zeros, got padding_mode='reflect'"),
])
def test_like_refuses_what_computes_something_else(conv, message):
    with pytest.raises(ValueError, match=message):
        FMDConv2d.like(conv)


@every_method
@pytest.mark.parametrize('num_kernels', [1, 4])
def test_constant_attention_is_the_same_for_every_image_at_any_temperature(num_kernels, method):
    conv = make_conv(method, num_kernels=num_kernels)
    conv.attention.make_constant()
    for temperature in 1.0, 30.0:
        set_temperature(conv, kernel=temperature, gate=temperature)
        for name, attn in attention_of(conv, torch.randn(3, 6, 5, 5)).items():
            share = 1 / num_kernels if name == 'kernel_attn' and method is not CondConv2d else 0.5
            torch.testing.assert_close(attn, torch.full_like(attn, share), rtol=0, atol=0)


def test_attention_reaches_the_operator_in_its_place():
    """Each factor where the definition has it, for the method that has them all."""
    conv, x = make_conv(ODConv2d), torch.randn(2, 6, 5, 5)
    nn.init.normal_(conv.bias)
    attention = attention_of(conv, x)
    torch.testing.assert_close(conv(x), dynamic_conv2d(x, conv.weight, bias=conv.bias, padding=1, **attention))


@pytest.mark.parametrize('args, message', [
    (dict(num_kernels=0), 'num_kernels must be at least 1, got 0'),
    (dict(out_channels=0), 'out_channels must be at least 1, got 0'),
    (dict(groups=4), 'groups must divide in_channels=6 and out_channels=8, got 4'),
    (dict(reduction=-1), 'reduction must not be negative, got -1'),
    (dict(kernel_ratio=-1), 'kernel_ratio must not be negative, got -1'),
    (dict(padding='full'), "'same', 'valid' or pixels, got 'full'"),
    (dict(padding='same', stride=2), "padding='same' needs stride 1"),
])
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        FMDConv2d(**dict(dict(in_channels=6, out_channels=8, kernel_size=3), **args))


@pytest.mark.parametrize('method, argument', [
    (CondConv2d, 'reduction'), (CondConv2d, 'kernel_ratio'), (DyConv2d, 'reduction'), (ODConv2d, 'kernel_ratio'),
])
def test_arguments_of_another_method_are_refused(method, argument):
    with pytest.raises(TypeError, match=argument):
        make_conv(method, **{argument: 0.5})


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
    kernel_attn, in_attn, out_attn, _ = conv.attention(torch.randn(2, 6, 5, 5))
    torch.testing.assert_close(kernel_attn, torch.full((2, 4), 0.25))
    torch.testing.assert_close(torch.cat([in_attn, out_attn], 1), torch.full((2, 14), 0.5))


def test_od_conv_has_one_temperature_for_all_four_attentions():
    conv, x = make_conv(ODConv2d), torch.randn(2, 6, 5, 5)
    set_temperature(conv, gate=1e6)
    assert conv.attention.kernel_temperature == 1
    set_temperature(conv, kernel=1e6)
    for name, attn in attention_of(conv, x).items():
        torch.testing.assert_close(attn, torch.full_like(attn, 0.25 if name == 'kernel_attn' else 0.5))


def test_cond_conv_has_no_temperature():
    conv, x = make_conv(CondConv2d), torch.randn(2, 6, 5, 5)
    before = conv(x)
    set_temperature(conv, kernel=30.0, gate=30.0)
    assert torch.equal(conv(x), before) and not list(conv.buffers())


@pytest.mark.parametrize('value', [0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(value):
    with pytest.raises(ValueError, match=f'kernel temperature must be positive and finite, got {value}'):
        set_temperature(make_conv(), kernel=value)


def test_temperature_of_a_network_without_dynamic_convolutions_is_an_error():
    with pytest.raises(ValueError, match='Linear has no dynamic convolution'):
        set_temperature(nn.Linear(2, 2), kernel=1.0)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype, rtol', [  # half a unit of the last place is 2^-8 in bfloat16, which is rounded twice
    (torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2 * 2 ** -8), (torch.float16, 2 ** -11),
], ids=str)
def test_pooling_is_the_mean_over_the_pixels(dtype, rtol, memory_format):
    x = (torch.rand(2, 6, 13, 9) + 1).to(dtype).to(memory_format=memory_format)
    assert pool(x).dtype == dtype
    torch.testing.assert_close(pool(x).double(), x.double().mean((2, 3)), rtol=rtol, atol=0)


def test_pooling_of_large_values_does_not_overflow():
    x = torch.full((1, 2, 64, 64), 1e4, dtype=torch.float16)
    assert torch.equal(pool(x), torch.full((1, 2), 1e4, dtype=torch.float16))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_pooling_is_right_and_is_not_written(dtype):
    x, strides = torch.randn(2, 6, 16, 8, dtype=dtype, requires_grad=True), []
    image = x * 1
    image.register_hook(lambda grad: strides.append(grad.stride()))
    grad = torch.randn(2, 6, dtype=dtype)
    pool(image).backward(grad)
    assert strides == [(6, 1, 0, 0)]
    torch.testing.assert_close(x.grad, (grad / 128)[:, :, None, None].expand_as(x))


@pytest.mark.parametrize('method', [ODConv2d, FMDConv2d])
def test_training_batch_of_one_image_uses_the_running_statistics(method):
    conv, x = make_conv(method), torch.randn(1, 6, 5, 5)
    conv(torch.randn(4, 6, 5, 5))  # statistics that are not the initial ones
    before = copy.deepcopy(conv.attention.bn.state_dict())
    torch.testing.assert_close(conv.train()(x), conv.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in conv.attention.bn.state_dict().items())


@every_method
def test_empty_training_batch_gives_every_parameter_a_gradient(method):
    conv = make_conv(method)
    y = conv(torch.randn(0, 6, 5, 5))
    assert y.shape == (0, 8, 5, 5)
    y.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in conv.parameters())
    assert all(buffer.isfinite().all() for buffer in conv.buffers())


@every_method
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_attention_is_float32_under_autocast(dtype, method):
    conv, x = make_conv(method), torch.randn(2, 6, 5, 5)
    set_temperature(conv, kernel=30.0)
    with torch.autocast('cpu', dtype):
        attention = attention_of(conv, x)
        y = conv(x)
    assert all(attn.dtype == torch.float32 for attn in attention.values())
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in conv.parameters())


@every_method
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_module_in_another_dtype_keeps_it(dtype, method):
    assert make_conv(method).to(dtype)(torch.randn(2, 6, 5, 5, dtype=dtype)).dtype == dtype


@every_method
def test_channels_last_model_gives_channels_last_output(method):
    conv, x = make_conv(method), torch.randn(2, 6, 5, 5)
    expected = conv(x)
    y = conv.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


@every_method
def test_meta_device(method):
    conv = make_conv(method, device='meta')
    assert all(tensor.is_meta for tensor in conv.state_dict().values())
    assert conv(torch.empty(2, 6, 5, 5, device='meta')).shape == (2, 8, 5, 5)
    conv.to_empty(device='cpu').reset_parameters()
    assert conv.eval()(torch.randn(2, 6, 5, 5)).isfinite().all()


@every_method
@pytest.mark.parametrize('same_padding', [False, True])
def test_exported_layer_takes_any_batch(same_padding, method):
    static = timm.layers.Conv2dSame(6, 8, 3, stride=2) if same_padding else nn.Conv2d(6, 8, 3, stride=2, padding=1)
    conv, batch = method.like(static).eval(), torch.export.Dim('batch')
    program = torch.export.export(conv, (torch.randn(2, 6, 9, 9),), dynamic_shapes=({0: batch},))
    for size in 1, 3:
        x = torch.randn(size, 6, 9, 9)
        torch.testing.assert_close(program.module()(x), conv(x))


@every_method
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_graphs_of_a_layer_take_images_of_any_size(method):
    conv, example = make_conv(method).eval(), torch.randn(2, 6, 9, 7)
    sizes = {2: torch.export.Dim('height', min=4), 3: torch.export.Dim('width', min=4)}
    exported = torch.export.export(conv, (example,), dynamic_shapes=(sizes,)).module()
    traced, compiled = torch.jit.trace(conv, example), torch.compile(conv, dynamic=True, backend='eager')
    for size in (5, 8), (12, 4):
        x = torch.randn(2, 6, *size)
        for graph in exported, traced, compiled:
            torch.testing.assert_close(graph(x), conv(x))
