"""c_conv: attention and convolution in C are what the definition says in float64, and touch no foreign memory."""
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fmd_timm.ops import c_conv, reference
from fmd_timm.ops.case import Attention, case_of

CACHES = 2**12, 2**16, 2**20  # bytes of L2: images one by one, in groups, and in chunks of rows

SHAPES = {  # B, K, I, O, kernel, stride, padding, dilation, (H, W)
    '1x1': (1, 2, 16, 32, (1, 1), (1, 1), (0, 0), (1, 1), (1, 1)),
    '3x3': (1, 4, 32, 64, (3, 3), (1, 1), (1, 1), (1, 1), (7, 7)),
    '3x3_stride': (1, 3, 48, 32, (3, 3), (2, 2), (1, 1), (1, 1), (9, 6)),
    '5x5_dilation': (1, 8, 16, 96, (5, 5), (1, 1), (4, 4), (2, 2), (5, 8)),
    'uneven': (1, 2, 160, 32, (1, 3), (2, 1), (0, 1), (1, 1), (4, 11)),
    'stride_and_dilation': (1, 2, 32, 32, (3, 3), (1, 3), (1, 1), (1, 2), (6, 40)),
    'one_pixel': (1, 4, 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    'wide': (1, 5, 144, 64, (7, 7), (2, 2), (3, 3), (1, 1), (40, 35)),
    'batch': (5, 4, 32, 64, (3, 3), (1, 1), (1, 1), (1, 1), (7, 6)),
    'wide_batch': (3, 2, 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), (61, 47)),  # chunks of rows that end within an image
}

pytestmark = pytest.mark.usefixtures('compiled')


def make_call(B, K, I, O, kernel_size, stride, padding, dilation, size, gates=(True, True, True)):
    """Images, kernels, attention and their case; `gates`: whether there are in_attn, out_attn and tap_attn"""
    x = torch.randn(B, I, *size).to(memory_format=torch.channels_last)
    weight = torch.randn(K * O, I, *kernel_size).to(memory_format=torch.channels_last)
    sizes = I, O, kernel_size[0] * kernel_size[1]
    attention = Attention(torch.rand(B, K), *(torch.rand(B, n) if given else None for n, given in zip(sizes, gates)))
    return x, weight, attention, case_of(x, weight, attention, stride, padding, dilation, 1)


def definition(x, weight, attention, case):
    return reference.forward(
        x.double(), weight.double(), Attention(*(None if t is None else t.double() for t in attention)), case)


def assert_close(y, expected, tolerance=1e-5):
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    error, largest = ((y - expected).abs().max()).item(), expected.abs().max().item()
    assert error <= tolerance * largest, f'error {error:.1e} of {largest:.1e}'


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """New memory holds NaN, so that results that were not written show."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def cache_of(monkeypatch):
    """Sets the bytes of the L2 cache."""
    def set_bytes(count: int) -> None:
        monkeypatch.setattr(c_conv, 'cache_bytes', lambda: count)
        c_conv._conv.cache_clear()
    yield set_bytes
    c_conv._conv.cache_clear()


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('gates', [(True, True, True), (True, True, False), (False, False, False)])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_a_convolution_is_what_the_definition_says(shape, gates, threads):
    call = make_call(*shape, gates=gates)
    assert c_conv.supports(call[-1])
    torch.set_num_threads(threads)
    assert_close(c_conv.forward(*call), definition(*call))


@pytest.mark.parametrize('shape', ['batch', 'wide_batch'])
def test_an_image_depends_neither_on_its_batch_nor_on_caches_and_threads(shape, cache_of):
    x, weight, attention, case = make_call(*SHAPES[shape])
    expected = torch.cat([
        c_conv.forward(x[b:b + 1], weight, Attention(*(t[b:b + 1] for t in attention)), case._replace(batch=1))
        for b in range(case.batch)])
    for count in CACHES:
        for threads in 1, 2, 5:
            cache_of(count)
            torch.set_num_threads(threads)
            assert torch.equal(c_conv.forward(x, weight, attention, case), expected)


UNSUPPORTED = dict(
    num_kernels=1, in_channels=24, out_channels=48, groups=2, dtype=torch.bfloat16, weight_dtype=torch.float64,
    channels_last=False, weight_channels_last=False, device=torch.device('meta'),
)


@pytest.mark.parametrize('name', UNSUPPORTED)
def test_what_c_can_not_do_is_not_supported(name):
    *_, case = make_call(*SHAPES['3x3'])
    assert c_conv.supports(case)
    assert not c_conv.supports(case._replace(**{name: UNSUPPORTED[name]}))


def test_without_the_library_nothing_is_supported(monkeypatch):
    monkeypatch.setattr(c_conv, 'library', lambda: None)
    assert not c_conv.supports(make_call(*SHAPES['3x3'])[-1])


def test_images_and_kernels_of_one_pixel_have_any_layout():
    *_, case = make_call(*SHAPES['1x1'])
    assert not case.channels_last and not case.weight_channels_last and c_conv.supports(case)


@pytest.mark.parametrize('name, value, is_supported', [
    ('stride', (1, 8), True), ('stride', (1, 10**6), False), ('stride', (2**31 - 1, 2**31 - 1), False),
    ('padding', (50, 50), True),
    ('dilation', (3, 3), True), ('dilation', (5, 5), False),  # kernels that are wider than the image
    ('image_size', (0, 7), False), ('image_size', (5000, 5000), True),
])
def test_sizes_are_supported_as_long_as_padded_images_are_in_proportion(name, value, is_supported):
    *_, case = make_call(*SHAPES['3x3'])
    assert c_conv.supports(case._replace(**{name: value})) == is_supported


def test_a_convolution_out_of_proportion_is_not_supported_however_it_comes_about():
    *_, case = make_call(*SHAPES['3x3'])
    assert not c_conv.supports(case._replace(dilation=(10**6, 10**6), padding=(10**6, 10**6)))
    assert not c_conv.supports(case._replace(stride=(10**3, 10**3), padding=(10**4, 10**4)))


METHODS = {  # sizes of what is squeezed for the gates and for the kernels, softmax, which gates
    'cond': (None, False, (False, False, False)), 'dy': ((9, 9), True, (False, False, False)),
    'od': ((16, 16), True, (True, True, True)), 'fmd': ((21, 10), True, (True, True, False)),
}


def make_layer(
        method, K, I, O, kernel_size, stride, padding, dilation, groups=1, convolves=True, are_integers=False):
    """A layer, its kernels and shift, and a function that computes its attention in float64"""
    hidden, competes, (has_in_attn, has_out_attn, has_tap_attn) = METHODS[method]
    given = has_in_attn, has_out_attn and not 1 < groups == I == O, has_tap_attn
    gate_sizes = [size if is_given else 0 for size, is_given in zip((I, O, kernel_size[0] * kernel_size[1]), given)]

    def linear(outputs: int, inputs: int):
        return torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs)

    squeeze = linear(sum(hidden) if hidden and hidden[0] != hidden[1] else hidden[0], I) if hidden else None
    gates = linear(sum(gate_sizes), hidden[0]) if any(given) else None
    kernel = linear(K, hidden[1] if hidden else I)
    weight = torch.randn(K * O, I // groups, *kernel_size)
    shift, scale = torch.randn(O), None
    if are_integers:
        scale, integers = torch.rand(O) / 2**15, torch.randint(-2**15, 2**15, weight.shape, dtype=torch.int16)
        weight = integers * scale.repeat(K)[:, None, None, None]
    layer = c_conv.Layer(
        squeeze, gates, kernel, competes, gate_sizes, I, weight if scale is None else integers, convolves, scale, shift,
        stride, padding, dilation)

    def attend(x):
        def apply(pair, features):
            return F.linear(features[:, -pair[0].shape[1]:], *(t.double() for t in pair))

        features = x.double().mean((2, 3))
        if squeeze:
            features = apply(squeeze, features).relu()
        kernel_attn = apply(kernel, features)
        kernel_attn = kernel_attn.softmax(1) if competes else kernel_attn.sigmoid()
        if gates is None:
            return Attention(kernel_attn)
        opened = apply(gates, features[:, :hidden[0]]).sigmoid().split(gate_sizes, 1)
        return Attention(kernel_attn, *(gate if size else None for gate, size in zip(opened, gate_sizes)))

    return layer, weight, shift, attend


@pytest.mark.parametrize('are_integers', [False, True], ids=['', 'int16'])
@pytest.mark.parametrize('batch, threads', [(1, 1), (1, 3), (3, 1), (7, 2)])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_a_layer_is_attention_and_convolution_of_any_batch(shape, method, batch, threads, are_integers, cache_of):
    _, K, I, O, kernel_size, *conv_args, size = shape
    layer, weight, shift, attend = make_layer(method, K, I, O, kernel_size, *conv_args, are_integers=are_integers)
    x = torch.randn(batch, I, *size)
    attention = attend(x)
    expected = definition(x, weight, attention, case_of(x, weight, attention, *conv_args, 1))
    cache_of(2**16)
    torch.set_num_threads(threads)
    assert_close(layer(x), expected + shift[:, None, None])
    assert_same_attention(layer.attend(x), attention)


def assert_same_attention(found, expected):
    for name, value, true in zip(Attention._fields, found, expected):
        if true is None:
            assert value is None, name
        else:
            assert value.is_contiguous() and value.dtype == torch.float32
            torch.testing.assert_close(value, true.float(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize('method', METHODS)
def test_the_attention_alone_may_be_of_any_channels(method):
    layer, _, _, attend = make_layer(method, 3, 7, 5, (3, 3), (1, 1), (1, 1), (1, 1), convolves=False)
    for batch in 1, 4:
        x = torch.randn(batch, 7, 6, 5)
        assert_same_attention(layer.attend(x), attend(x))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('batch, threads', [(1, 1), (3, 2)])
@pytest.mark.parametrize('K, I, kernel_size, stride, padding, dilation, size', [
    (4, 72, (3, 3), (1, 1), (1, 1), (1, 1), (7, 9)), (2, 40, (5, 5), (2, 2), (2, 2), (1, 1), (6, 6)),
    (3, 11, (3, 1), (2, 1), (0, 3), (2, 3), (9, 4)), (4, 2, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
], ids=str)
def test_a_layer_is_a_depthwise_convolution_of_any_size(
        K, I, kernel_size, stride, padding, dilation, size, batch, threads, method):
    conv_args = stride, padding, dilation
    layer, weight, shift, attend = make_layer(method, K, I, I, kernel_size, *conv_args, groups=I)
    x = torch.randn(batch, I, *size)
    attention = attend(x)
    case = case_of(x, weight, attention, *conv_args, I)
    expected = definition(x, weight, attention, case) + shift[:, None, None]
    torch.set_num_threads(threads)
    assert_close(layer(x), expected)
    results = [F.conv2d(*pair, shift, *conv_args, I) for pair in zip(x.split(1), layer.mixed(x))]
    torch.testing.assert_close(torch.cat(results).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('K, I, O, groups, kernel_size', [
    (4, 7, 5, 1, (3, 3)), (2, 40, 24, 1, (1, 1)), (3, 12, 18, 6, (3, 1)), (4, 36, 72, 36, (5, 5)),
    (8, 1200, 13, 1, (3, 3)),
], ids=str)
@pytest.mark.parametrize('batch, threads', [(1, 1), (3, 2)])
def test_a_layer_mixes_kernels_of_any_size(batch, threads, K, I, O, groups, kernel_size, method):
    layer, weight, _, attend = make_layer(
        method, K, I, O, kernel_size, (1, 1), (0, 0), (1, 1), groups=groups, convolves=False)
    x = torch.randn(batch, I, 6, 5)
    torch.set_num_threads(threads)
    kernel_attn, *gates = attend(x)
    expected = torch.einsum('bk,kgoihw->bgoihw', kernel_attn, weight.double().unflatten(0, (K, groups, -1)))
    for gate, shape in zip(gates, [(groups, 1, -1, 1, 1), (groups, -1, 1, 1, 1), (1, 1, 1, *kernel_size)]):
        expected = expected if gate is None else expected * gate.view(batch, *shape)
    assert_close(layer.mixed(x).flatten(0, 1), expected.flatten(0, 2))


def test_an_image_does_not_depend_on_its_batch_in_a_layer(cache_of):
    _, K, I, O, *conv_args, size = SHAPES['batch']
    layer, *_ = make_layer('od', K, I, O, *conv_args)
    x = torch.randn(5, I, *size)
    alone = torch.cat([layer(image[None]) for image in x])
    for count in CACHES:
        cache_of(count)
        assert torch.equal(layer(x), alone)


def test_a_layer_keeps_the_tensors_it_was_made_of():
    linear = torch.nn.Linear(16, 2)
    layer = c_conv.Layer(
        None, None, (linear.weight, linear.bias), True, [0, 0, 0], 16, torch.ones(2, 16, 1, 1), False, None,
        None, (1, 1), (0, 0), (1, 1))
    x = torch.randn(1, 16, 3, 3)
    before = layer.attend(x).kernel_attn
    for parameter in linear.parameters():
        parameter.data = torch.zeros_like(parameter)
    garbage = [torch.full((2, 16), float(n)) for n in range(100)]  # takes memory that was given back
    assert torch.equal(layer.attend(x).kernel_attn, before) and len(garbage) == 100


def test_a_layer_gives_nan_for_nan():
    layer, *_ = make_layer('fmd', *SHAPES['3x3'][1:4], *SHAPES['3x3'][4:8])
    x = torch.randn(2, 32, 7, 7)
    x[0, 3, 2, 2] = torch.nan
    y = layer(x)
    assert y[0].isnan().all() and not y[1].isnan().any()


@pytest.mark.parametrize('x', [
    torch.zeros(1, 16, 5, 5), torch.zeros(32, 5, 5), torch.zeros(1, 32, 5, 5).double(),
    torch.zeros(1, 32, 5, 5, device='meta')], ids=['channels', '3-D', 'float64', 'meta'])
def test_a_layer_refuses_images_that_it_would_misread(x):
    layer, *_ = make_layer('od', 4, 32, 32, (3, 3), (1, 1), (0, 0), (1, 1))
    for call in layer, layer.attend, layer.mixed:
        with pytest.raises(ValueError, match=r'x must have shape \(B, 32, H, W\) and be float32 on the CPU, got \('):
            call(x)


def test_a_layer_refuses_sizes_that_can_not_be_convolved():
    layer, *_ = make_layer('od', 4, 32, 32, (5, 5), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match=r'x of 2x9 pixels can not be convolved in C by 5x5 taps with stride=\(1, 1\)'):
        layer(torch.zeros(1, 32, 2, 9))


def convolve_at_random(seed: int, count: int) -> None:
    """Compare random convolutions with the definition."""
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def pair(least: int, most: int) -> tuple[int, int]:
        return rng.randint(least, most), rng.randint(least, most)

    done = 0
    while done < count:
        K, I, O = rng.randint(2, 6), 16 * rng.randint(1, 10), 32 * rng.randint(1, 3)
        kernel_size, stride = pair(1, rng.choice([1, 3, 7])), pair(1, rng.choice([1, 2, 4]))
        padding, dilation = pair(0, rng.choice([0, 1, 5])), pair(1, rng.choice([1, 3]))
        size, batch = pair(1, rng.choice([3, 8, 20, 40])), rng.choice([1, 1, 2, 5])
        c_conv.cache_bytes = partial(rng.choice, CACHES)
        c_conv._conv.cache_clear()
        if c_conv._conv(I, O, K, kernel_size, stride, padding, dilation, size) is None:
            continue
        torch.set_num_threads(rng.randint(1, 4))
        if rng.random() < 0.5:
            gates = tuple(rng.random() < 0.6 for _ in range(3))
            call = make_call(batch, K, I, O, kernel_size, stride, padding, dilation, size, gates)
            assert_close(c_conv.forward(*call), definition(*call))
        else:
            layer, weight, shift, attend = make_layer(
                rng.choice(list(METHODS)), K, I, O, kernel_size, stride, padding, dilation,
                are_integers=rng.random() < 0.5)
            x = torch.randn(batch, I, *size)
            attention = attend(x)
            case = case_of(x, weight, attention, stride, padding, dilation, 1)
            expected = definition(x, weight, attention, case) + shift[:, None, None]
            assert_close(layer(x), expected)
            if layer.mixes:
                pairs = zip(x.split(1), layer.mixed(x))
                y = torch.cat([F.conv2d(*pair, shift, stride, padding, dilation) for pair in pairs])
                assert_close(y.contiguous(memory_format=torch.channels_last), expected)
        done += 1


@pytest.mark.parametrize('seed', [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 41))])
def test_random_convolutions_are_what_the_definition_says(seed, monkeypatch):
    monkeypatch.setattr(c_conv, 'cache_bytes', c_conv.cache_bytes)  # given back in the end
    convolve_at_random(seed, 100)
    c_conv._conv.cache_clear()


@pytest.mark.slow
def test_random_convolutions_by_every_compiler_and_vector(run_built):
    run_built('import test_c_conv; test_c_conv.convolve_at_random(7, 150)')
