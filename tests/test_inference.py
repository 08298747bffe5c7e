"""prepare_for_inference: the same outputs to 1e-5, and a network that can still be used as one."""
import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load, save
from timm.layers import BatchNormAct2d, Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.utils import reparameterize_model
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fmd_timm import (
    CondConv2d,
    DyConv2d,
    DynamicConv2d,
    FMDConv2d,
    ODConv2d,
    inflate,
    make_dynamic,
    prepare_for_inference,
    set_temperature,
)
from fmd_timm.layers import prepared as prepared_layer
from fmd_timm.layers.prepared import PreparedConv2d
from fmd_timm.ops import c_conv, im2col, per_image

METHODS = [CondConv2d, DyConv2d, ODConv2d, FMDConv2d]


def make_model(name='resnet18_fmd', **kwargs):
    """A narrow network with statistics and shifts that are not the initial ones, in evaluation mode."""
    torch.manual_seed(0)
    args = {}
    if 'resnet' in name:
        args.update(channels=(32, 24, 32, 64), layers=(2, 1, 1, 1), num_classes=5, zero_init_last=False)
    if 'resnet20' in name:  # whose shortcut only adds channels
        args.update(channels=(16, 24, 64), layers=(2, 1, 1))
    return randomize(timm.create_model(name, **dict(args, **kwargs)))


def randomize(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def make_images(batch=2, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(prepared, model, x, tolerance=1e-5):
    y, expected = prepared(x), model(x)
    error = ((y - expected).abs().max() / expected.abs().max()).item()
    assert error < tolerance, f'relative error {error:.1e}'


def prefer(algorithm, monkeypatch):
    """Prepared layers take this algorithm wherever it is among those that may be fastest."""
    def fastest(question, case, algorithms, run, may_time):
        return algorithm if algorithm in algorithms else algorithms[0]

    monkeypatch.setattr(prepared_layer, 'fastest', fastest)


WAYS = 'fastest', 'c_conv', 'im2col', 'per_image without C'


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Convolutions as they are fastest, or all that can be by one algorithm."""
    if request.param == 'c_conv':
        request.getfixturevalue('compiled')
        prefer(c_conv, monkeypatch)
    elif request.param == 'im2col':
        prefer(im2col, monkeypatch)
    elif request.param != 'fastest':
        prefer(per_image, monkeypatch)
        monkeypatch.setattr(c_conv, 'is_available', lambda: False)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('name', [
    'resnet50_fmd', 'resnet18_od', 'resnet18_dy', 'resnet18_cond', 'resnet20_fmd_cifar', *(
        pytest.param(name, marks=pytest.mark.slow) for name in (
            'resnet18_fmd', 'resnet18_fmd_cifar', 'resnet50_fmd_cifar', 'resnet18_cifar')),
])
def test_outputs_are_the_same(name, batch, way):
    model = make_model(name)
    assert_same(prepare_for_inference(model), model, make_images(batch))


@pytest.mark.parametrize('conv_bias', [False, True])
def test_biases_and_temperatures_are_kept(conv_bias, way):
    model = make_model(conv_bias=conv_bias)
    for conv in model.modules():
        if isinstance(conv, DynamicConv2d) and conv_bias:
            nn.init.normal_(conv.bias)
    set_temperature(model, kernel=5.0, gate=2.0)
    assert_same(prepare_for_inference(model), model, make_images(1))


@pytest.mark.parametrize('shape', [  # C_in, C_out, kernel, stride, padding, dilation, (H, W), K
    (16, 32, 1, 1, 0, 1, (1, 1), 2),
    (32, 64, 3, 1, 1, 1, (7, 7), 4),
    (48, 32, 3, 2, 1, 1, (9, 6), 3),
    (16, 96, 5, 1, 4, 2, (5, 8), 8),
    (160, 32, (1, 3), (2, 1), (0, 1), 1, (4, 11), 2),
    (32, 32, 3, (1, 3), 1, (1, 2), (6, 40), 2),
    (16, 32, 7, 2, 3, 1, (150, 145), 2),  # more than the L2 cache gets at once
])
@pytest.mark.parametrize('layer', METHODS)
@pytest.mark.parametrize('batch, threads', [(1, 1), (1, 3), (3, 2)])
def test_in_c_a_layer_computes_the_same(shape, layer, batch, threads, compiled, monkeypatch):
    I, O, kernel, stride, padding, dilation, size, K = shape
    torch.manual_seed(0)
    conv = layer(I, O, kernel, stride, padding, dilation, bias=False, num_kernels=K)
    net = randomize(nn.Sequential(conv, nn.BatchNorm2d(O)))
    x = torch.randn(batch, I, *size)
    expected = copy.deepcopy(net).double()(x.double())
    prepared, threads_before = PreparedConv2d(*net), torch.get_num_threads()
    prefer(c_conv, monkeypatch)
    monkeypatch.setattr(prepared_layer, 'convolve', None)  # of PyTorch
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            y = prepared(x)
    finally:
        torch.set_num_threads(threads_before)
    assert y.shape == expected.shape and y.is_contiguous(memory_format=torch.channels_last)
    assert ((y - expected).abs().max() / expected.abs().max()).item() < 2e-6


def test_a_wrong_number_of_channels_is_refused(way):
    prepared = PreparedConv2d(FMDConv2d(16, 32, 3, bias=False).eval())
    with torch.no_grad():
        prepared(torch.randn(1, 16, 5, 5))
        for batch in 1, 2:
            with pytest.raises(ValueError, match=rf'x must have shape .B, 16, H, W., got .{batch}, 32, 5, 5.'):
                prepared(torch.randn(batch, 32, 5, 5))


def test_temperatures_of_a_prepared_network_cannot_be_set():
    with pytest.raises(ValueError, match='ResNet has no dynamic convolution to set a temperature of'):
        set_temperature(prepare_for_inference(make_model()), kernel=5.0)


@pytest.mark.parametrize(
    'layer', [pytest.param(layer, marks=() if layer is FMDConv2d else pytest.mark.slow) for layer in METHODS])
@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'regnetx_002', 'tf_efficientnet_lite0'])
def test_networks_of_other_families(name, layer):
    model = timm.create_model(name, num_classes=5)
    make_dynamic(model, layer)
    assert_same(prepare_for_inference(randomize(model)), model, make_images())


def test_every_batchnorm_of_a_resnet_is_folded_also_those_of_static_convolutions():
    prepared = prepare_for_inference(make_model('resnet50_fmd'))
    assert not [m for m in prepared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert isinstance(prepared.act1, nn.ReLU) and isinstance(prepared.layer1[0].act1, nn.ReLU)


@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'tf_mobilenetv3_small_minimal_100'])
@pytest.mark.parametrize('is_inflated', [False, True])
def test_batchnorms_behind_tensorflows_padding_are_folded(name, is_inflated):
    model = randomize(timm.create_model(name, num_classes=5))
    assert [m for m in model.modules() if isinstance(m, Conv2dSame)]
    if is_inflated:
        model = inflate(model, FMDConv2d)
    prepared = prepare_for_inference(model)
    assert not [m for m in prepared.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for size in 64, 75:
        assert_same(prepared, model, make_images(size=size))


@pytest.mark.parametrize('conv_layer', [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame])
def test_convolutions_that_standardise_their_weights_keep_the_batchnorm(conv_layer):
    model = randomize(nn.Sequential(conv_layer(8, 8, 3, stride=2), nn.BatchNorm2d(8)))
    assert_same(prepare_for_inference(model), model, torch.randn(2, 8, 9, 9))


def test_batchnorm_with_activation_leaves_the_activation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = FMDConv2d(8, 8, 3, padding=1, bias=False)
            self.norm = BatchNormAct2d(8, act_layer=nn.SiLU)

        def forward(self, x):
            return self.norm(self.conv(x))

    model = randomize(Net())
    x = torch.randn(2, 8, 6, 6)
    prepared = prepare_for_inference(model)
    assert isinstance(prepared.norm, nn.SiLU)
    assert_same(prepared, model, x)


class TwoUses(nn.Module):
    """A BatchNorm that can't be folded: the convolution's result is used once more."""

    def __init__(self):
        super().__init__()
        self.conv = FMDConv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(TwoUses):
    """The convolution's result goes into a BatchNorm once, the second time it does not."""

    def forward(self, x):
        return self.conv(self.norm(self.conv(x)))


@pytest.mark.parametrize('network', [TwoUses, CalledTwice])
def test_a_batchnorm_stays_where_folding_would_change_the_result(network):
    model = randomize(network())
    prepared = prepare_for_inference(model)
    assert isinstance(prepared.norm, nn.BatchNorm2d)
    assert_same(prepared, model, torch.randn(2, 8, 6, 6))


def test_a_network_that_cannot_be_traced_keeps_its_batchnorms_and_says_so(caplog):
    class Untraceable(TwoUses):
        def forward(self, x):
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    model = randomize(Untraceable())
    prepared = prepare_for_inference(model)
    assert "Untraceable keeps its BatchNorms, torch.fx can't trace it" in caplog.text
    assert_same(prepared, model, torch.rand(2, 8, 6, 6))


def test_the_network_itself_is_untouched_unless_asked_for():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    assert prepare_for_inference(model) is not model
    torch.testing.assert_close(model.state_dict(), before)
    expected = model(make_images())
    assert prepare_for_inference(model, inplace=True) is model
    torch.testing.assert_close(model(make_images()), expected, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_after_the_first(way):
    model = make_model()
    prepared = prepare_for_inference(model)
    for size in 64, 96, 64:
        assert_same(prepared, model, make_images(1, size))


def test_two_threads_do_not_disturb_each_other(way):
    prepared, images = prepare_for_inference(make_model()), [make_images(1), make_images(1).flip(0, 2)]
    with torch.inference_mode():
        expected = [prepared(x) for x in images]
    wrong = []

    def run(x, y):
        with torch.inference_mode():
            for _ in range(20):
                if not torch.allclose(prepared(x), y, rtol=1e-4, atol=1e-5):
                    wrong.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(images, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_and_other_dtypes_after_use(way):
    model = make_model()
    prepared = prepare_for_inference(model)
    assert_same(prepared, model, make_images(1))
    for clone in copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)):
        assert_same(clone, model, make_images(1))
    assert_same(prepared.double(), model.double(), make_images(1).double())
    assert_same(prepared.float(), model.float(), make_images(1))


def test_weights_loaded_after_use(way):
    model, other = make_model(), randomize(make_model())
    prepared = prepare_for_inference(model)
    assert_same(prepared, model, make_images(1))
    prepared.load_state_dict(prepare_for_inference(other).state_dict())
    assert_same(prepared, other, make_images(1))


def test_the_gradient_of_the_input_is_still_there():
    model = make_model()
    gradients = []
    for network in model, prepare_for_inference(model):
        x = make_images().requires_grad_()
        gradients.append(torch.autograd.grad(network(x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_autocast_and_empty_batch():
    model = make_model()
    prepared = prepare_for_inference(model)
    with torch.autocast('cpu', torch.bfloat16):
        assert_same(prepared, model, make_images(), 5e-2)
    assert prepared(make_images()[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    'way', [way if way == 'c_conv' else pytest.param(way, marks=pytest.mark.slow) for way in WAYS], indirect=True)
def test_compiled_and_exported(way):
    model = make_model(layers=(1, 1, 1, 1))
    prepared = prepare_for_inference(model)
    program = torch.export.export(
        prepared, (make_images(3),), dynamic_shapes=({0: torch.export.Dim('batch')},)).module()
    assert_same(program, model, make_images(2))
    layers = randomize(nn.Sequential(  # a whole network takes as long for each of its layers
        FMDConv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), FMDConv2d(32, 64, 3, padding=1)))
    prepared = prepare_for_inference(layers)
    with torch.no_grad():
        assert_same(torch.compile(prepared, fullgraph=True, dynamic=True, backend='aot_eager'), layers, make_images(2))


def test_tensors_without_memory_go_through_the_operator():
    prepared = prepare_for_inference(make_model())
    with torch.no_grad():
        prepared(make_images(1))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert prepared(mode.from_tensor(make_images(1))).shape == (1, 5)


def test_features_of_a_prepared_network():
    model = make_model(features_only=True)
    x = make_images()
    with torch.no_grad():
        for feature, expected in zip(prepare_for_inference(model)(x), model(x), strict=True):
            torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def make_integers(model, dtype=torch.int16, **kwargs):
    return prepare_for_inference(model, kernel_dtype=dtype, **kwargs)


def kernels_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PreparedConv2d)}


@pytest.mark.parametrize('args', [dict(), dict(bias=True), dict(groups=2), dict(num_kernels=1)], ids=str)
@pytest.mark.parametrize('layer', METHODS)
def test_kernels_of_int16_give_the_same(layer, args, way):
    torch.manual_seed(0)
    net = randomize(nn.Sequential(layer(32, 64, 3, padding=1, **dict(dict(bias=False), **args)), nn.BatchNorm2d(64)))
    for batch in 1, 3:
        assert_same(make_integers(net), net, torch.randn(batch, 32, 9, 7), 1e-4)


@pytest.mark.parametrize('dtype, tolerance', [(torch.int16, 1e-4), (torch.int8, 2e-2)])
@pytest.mark.parametrize('name', ['resnet50_fmd', 'mobilenetv3_small_100_fmd'])
def test_networks_with_kernels_of_integers(name, dtype, tolerance, way):
    model = make_model(name)
    assert_same(make_integers(model, dtype), model, make_images(), tolerance)


@pytest.mark.parametrize('dtype, of_weights, of_copies', [(torch.int16, 1 / 2, 1 / 2), (torch.int8, 1 / 4, 1 / 2)])
def test_kernels_of_integers_take_fewer_bytes(dtype, of_weights, of_copies, way):
    def sizes(kernel_dtype):
        layers = kernels_of(make_integers(make_model(), kernel_dtype, example_input=make_images(1))).values()
        copies = [layer._made.layer and layer._made.layer.bank for layer in layers]
        return [sum(t.nbytes for t in tensors if t is not None) for tensors in (
            (layer.weight for layer in layers), copies)]

    weights, copies = sizes(None)
    assert sizes(dtype) == [of_weights * weights, of_copies * copies]


@pytest.mark.parametrize('size', [0, 1e-42, 1e-30, 1e-6, 1e6, 1e30])
def test_kernels_of_any_size_have_the_whole_range_of_int16(size, way):
    """A folded BatchNorm may leave any; float16 would overflow or have nothing left of it."""
    net = randomize(nn.Sequential(FMDConv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32)))
    with torch.no_grad():
        net[0].weight.unflatten(0, (4, -1))[:, 7] *= size / net[1].weight[7]
        net[1].bias.zero_()
        net[1].running_mean.zero_()
        x = torch.randn(2, 16, 9, 9)
        y, expected = make_integers(net)(x), copy.deepcopy(net).double()(x.double())
    for channel in 6, 7, 8:
        error, largest = ((y - expected)[:, channel].abs().max()).item(), expected[:, channel].abs().max().item()
        assert error <= max(1e-4 * largest, 1e-38)


@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_kernels_that_are_not_finite_can_not_be_integers(value):
    model = make_model()
    with torch.no_grad():
        model.layer2[0].conv1.weight[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match='layer2.0.conv1: its kernels must be finite to be kept as torch.int16'):
        make_integers(model)


@pytest.mark.parametrize('dtype', [torch.float16, torch.uint8, 'int16'])
def test_kernels_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f'kernel_dtype must be torch.int16, torch.int8 or None, got {dtype}'):
        prepare_for_inference(make_model(), kernel_dtype=dtype)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_kernels_of_int16_in_networks_of_other_dtypes(dtype, tolerance):
    """Made of such a network, and made such afterwards."""
    model, x = make_model(), make_images(2)
    expected = model(x).double()
    for prepared in make_integers(copy.deepcopy(model).to(dtype)), make_integers(model).to(dtype):
        assert all(layer.weight.dtype == torch.int16 for layer in kernels_of(prepared).values())
        with torch.no_grad():
            y = prepared(x.to(dtype)).double()
        assert ((y - expected).abs().max() / expected.abs().max()).item() < tolerance


def test_kernels_of_int16_are_copied_saved_and_loaded(way):
    model, other = make_model(), randomize(make_model())
    prepared = make_integers(model)
    assert_same(prepared, model, make_images(1), 1e-4)
    for clone in copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared)):
        assert_same(clone, model, make_images(1), 1e-4)
    saved = save({name: t.contiguous() for name, t in make_integers(other).state_dict().items()})
    prepared.load_state_dict(load(saved))
    assert_same(prepared, other, make_images(1), 1e-4)
    for there, here in (prepared, prepare_for_inference(model)), (prepare_for_inference(model), prepared):
        with pytest.raises(RuntimeError, match='layer1.0.conv1.scale'):
            here.load_state_dict(there.state_dict())


def test_kernels_of_int16_are_seen_to_change(way):
    model = make_model()
    prepared, x = make_integers(model), make_images(1)
    assert_same(prepared, model, x, 1e-4)
    with torch.no_grad():
        for name, layer in kernels_of(prepared).items():
            layer.scale *= 2
            layer.weight.copy_(layer.weight.flip(0, 1))
            conv = model.get_submodule(name)
            conv.weight.copy_(2 * conv.weight)
    fresh = copy.deepcopy(prepared)  # which holds nothing of what was
    assert_same(prepared, fresh, x)
    with pytest.raises(AssertionError, match='relative error'):
        assert_same(prepared, model, x, 1e-4)


def test_kernels_of_int16_compiled_exported_and_differentiated():
    torch.manual_seed(0)
    model = randomize(nn.Sequential(FMDConv2d(16, 32, 3, bias=False), nn.BatchNorm2d(32), ODConv2d(32, 8, 3)))
    prepared, x = make_integers(model), torch.randn(2, 16, 9, 9)
    batch = torch.export.Dim('batch')
    program = torch.export.export(prepared, (torch.randn(3, 16, 9, 9),), dynamic_shapes=({0: batch},))
    assert_same(program.module(), model, x, 1e-4)
    with torch.no_grad():
        assert_same(torch.compile(prepared, fullgraph=True, dynamic=True, backend='aot_eager'), model, x, 1e-4)
        with torch.autocast('cpu', torch.bfloat16):
            assert_same(prepared, model, x, 5e-2)
    gradients = []
    for network in model, prepared:
        image = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(network(image).square().sum(), image)[0])
    error = (gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()
    assert error < 1e-4


@pytest.mark.parametrize('change', ['copy_', 'data', 'mul_', 'attention'])
def test_weights_changed_or_moved_after_use_are_seen(change, way):
    model, other = make_model(), randomize(make_model(num_kernels=4))
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    prepared, theirs = prepare_for_inference(model), prepare_for_inference(other)
    assert_same(prepared, model, make_images(1))
    with torch.no_grad():
        for (name, mine), new in zip(prepared.named_parameters(), theirs.parameters()):
            if change == 'data':
                mine.data = new.data.clone()
            elif change == 'mul_':
                mine.mul_(0).add_(new)
            elif change == 'copy_' or 'attention' not in name:
                mine.copy_(new)
            else:
                prepared.get_submodule(name.rpartition('.')[0])._parameters[name.rpartition('.')[2]] = new
    assert_same(prepared, theirs, make_images(1))


def test_a_single_layer_can_be_prepared(caplog):
    layer = FMDConv2d(8, 8, 3, padding=1).eval()
    assert_same(prepare_for_inference(layer), layer, torch.randn(2, 8, 6, 6))
    assert not caplog.text


def test_what_c_does_not_convolve_is_convolved_in_pytorch(way):
    """A stride so large that the copy C works on would be a hundred times the image."""
    layer = FMDConv2d(16, 32, 1, stride=(1, 5000), bias=False).eval()
    assert_same(prepare_for_inference(layer), layer, torch.randn(1, 16, 200, 100))


def test_an_image_smaller_than_the_kernel_is_refused():
    prepared = prepare_for_inference(FMDConv2d(16, 32, 5, bias=False).eval())
    with torch.no_grad(), pytest.raises(ValueError, match='x of 2x2 pixels with .* smaller than a kernel of 5x5'):
        prepared(torch.randn(1, 16, 2, 2))


def test_a_quantized_network_is_refused_by_the_name_of_the_layer():
    model = torch.ao.quantization.quantize_dynamic(make_model(), {nn.Linear})
    with pytest.raises(ValueError, match='layer1.0.conv1: .*prepare the network before it is quantized'):
        prepare_for_inference(model)


def test_scripting_a_prepared_network_says_what_works():
    with pytest.raises(NotImplementedError, match='can not be scripted: use torch.jit.trace or torch.export'):
        torch.jit.script(prepare_for_inference(make_model()))


def test_an_example_is_timed_at_once(monkeypatch):
    timed = []

    def fastest(question, case, algorithms, run, may_time):
        timed.append(may_time)
        return algorithms[0]

    monkeypatch.setattr(prepared_layer, 'fastest', fastest)
    model = make_model()
    prepared = prepare_for_inference(model, example_input=make_images(1))
    assert timed == [True] * 10
    assert_same(prepared, model, make_images(1))
    assert len(timed) == 10
    for size in range(64, 64 + 32 * 10, 32):
        assert_same(prepared, model, make_images(1, size))
    assert timed.count(True) == 10 * prepared_layer.TIMED_SIZES  # images of other sizes are not held up


def test_arithmetic_of_a_prepared_network_is_counted():
    model = make_model()
    counts = []
    for network in model, prepare_for_inference(model):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(make_images(1))
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(counts[0], rel=0.01)  # without the attention's last few additions


@pytest.mark.parametrize('layer', METHODS)
def test_timms_own_way_reaches_the_prepared_layer(layer):
    model = make_model(f'resnet18_{layer.suffix}')
    fused = reparameterize_model(model)
    assert not [m for m in fused.modules() if isinstance(m, DynamicConv2d)]
    assert len([m for m in fused.modules() if isinstance(m, PreparedConv2d)]) == 10
    assert_same(fused.eval(), model, make_images())
