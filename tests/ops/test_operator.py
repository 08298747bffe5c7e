"""dynamic_conv2d is the sum in its docstring: against one plain convolution per image, in float64."""
import functools

import pytest
import torch
import torch.nn.functional as F
from cases import pair
from inputs import SHAPES, make_inputs, one_by_one
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from fmd_timm import dynamic_conv2d
from fmd_timm.ops import c_conv, im2col, operator, per_image, reference
from fmd_timm.ops.case import Attention, case_of

ARGUMENTS = 'x', 'weight', 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn', 'bias'


@pytest.mark.parametrize('tap_attn', [False, True], ids=['', 'taps'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_the_definition_is_one_convolution_per_image(shape, tap_attn):
    tensors, conv_args = make_inputs(*shape, tap_attn=tap_attn)
    tensors['bias'] = torch.zeros_like(tensors['bias'])
    x, weight, *attention = (tensors.get(name) for name in ARGUMENTS[:6])
    attention = Attention(*attention)
    pairs = (pair(conv_args[name]) for name in ('stride', 'padding', 'dilation'))
    y = reference.forward(x, weight, attention, case_of(x, weight, attention, *pairs, conv_args['groups']))
    torch.testing.assert_close(y, one_by_one(**tensors, **conv_args))


@pytest.mark.parametrize('tap_attn', [False, True], ids=['', 'taps'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_equals_one_convolution_per_image(shape, tap_attn, implementation):
    tensors, conv_args = make_inputs(*shape, tap_attn=tap_attn)
    torch.testing.assert_close(dynamic_conv2d(**tensors, **conv_args), one_by_one(**tensors, **conv_args))


@pytest.mark.parametrize('tap_attn', [False, True], ids=['', 'taps'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_gradients(shape, tap_attn, implementation):
    tensors, conv_args = make_inputs(*shape, tap_attn=tap_attn)

    def conv(*values):
        return dynamic_conv2d(**dict(zip(tensors, values)), **conv_args)

    assert torch.autograd.gradcheck(conv, tuple(tensors.values()), fast_mode=True)


def test_without_attention_it_is_a_plain_convolution():
    tensors, conv_args = make_inputs(*SHAPES['one_kernel'])
    x, weight, bias = tensors['x'], tensors['weight'], tensors['bias']
    expected = F.conv2d(x, weight, bias, **conv_args)
    torch.testing.assert_close(dynamic_conv2d(x, weight, None, bias=bias, **conv_args), expected)


def test_an_image_does_not_depend_on_its_batch(implementation):
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    alone = {name: t if name in ('weight', 'bias') else t[1:] for name, t in tensors.items()}
    torch.testing.assert_close(dynamic_conv2d(**tensors, **conv_args)[1:], dynamic_conv2d(**alone, **conv_args))


def test_empty_batch_has_the_right_shape_and_zero_gradients(implementation):
    tensors, conv_args = make_inputs(*SHAPES['dilated_groups'])
    empty = {name: t if name in ('weight', 'bias') else t[:0] for name, t in tensors.items()}
    empty = {name: t.detach().requires_grad_() for name, t in empty.items()}
    y = dynamic_conv2d(**empty, **conv_args)
    assert y.shape == (0, *dynamic_conv2d(**tensors, **conv_args).shape[1:])
    y.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in empty.values())


def test_channels_last_in_channels_last_out(implementation):
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    expected = dynamic_conv2d(**tensors, **conv_args)
    tensors['x'] = tensors['x'].to(memory_format=torch.channels_last)
    y = dynamic_conv2d(**tensors, **conv_args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected)


def test_depthwise_convolutions_leave_images_in_their_memory_format(monkeypatch):
    tensors, conv_args = make_inputs(*PROOF['depthwise'])
    convolved, convolve = [], per_image._convolve
    monkeypatch.setattr(per_image, '_convolve', lambda x, *args: convolved.append(x) or convolve(x, *args))
    dynamic_conv2d(**tensors, **conv_args)
    assert len(convolved) == 1  # as groups of one convolution
    dynamic_conv2d(**dict(tensors, x=tensors['x'].to(memory_format=torch.channels_last)), **conv_args)
    assert len(convolved) == 1 + len(tensors['x'])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in convolved[1:])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_close_to_float64(dtype, implementation):
    tensors, conv_args = make_inputs(*SHAPES['3x3'], dtype=torch.float32)
    exact = dynamic_conv2d(**{name: t.double() for name, t in tensors.items()}, **conv_args)
    with torch.autocast('cpu', dtype):
        y = dynamic_conv2d(**tensors, **conv_args)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() < 2e-2 * exact.abs().max()  # 8 bits of mantissa
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


PROOF = {  # as SHAPES: every kernel size, stride, dilation, groups and K, with sizes that no block divides
    '1x1': (5, 4, 19, 35, 1, 1, 0, 1, 1, (9, 7)),
    '1x1_stride': (5, 4, 19, 35, 1, 2, 0, 1, 1, (9, 7)),
    '3x3': (5, 4, 19, 35, 3, 1, 1, 1, 1, (9, 7)),
    '3x3_single_image': (1, 4, 19, 35, 3, 1, 1, 1, 1, (9, 7)),
    '3x3_many_pixels': (2, 4, 5, 7, 3, 1, 1, 1, 1, (21, 23)),
    '5x5_stride': (3, 2, 11, 40, 5, 2, 2, 1, 1, (13, 8)),
    '7x7_eight_kernels': (2, 8, 3, 33, 7, 2, 3, 1, 1, (15, 14)),
    'dilation': (3, 4, 6, 10, 3, 1, 2, 2, 1, (8, 9)),
    'groups': (3, 4, 12, 8, 3, 1, 1, 1, 4, (7, 6)),
    'groups_single_image': (1, 4, 12, 8, 3, 2, 1, 1, 4, (7, 6)),
    'depthwise': (3, 4, 11, 11, 3, 2, 1, 1, 11, (7, 6)),
    'one_kernel': (3, 1, 9, 34, 3, 1, 1, 1, 1, (7, 6)),
    'one_pixel': (40, 4, 5, 7, 3, 1, 1, 1, 1, (1, 1)),  # eight of nine taps see zeros only
    'one_row': (3, 4, 5, 7, 3, 2, 1, 1, 1, (1, 6)),
    'wide_padding': (2, 4, 5, 7, 3, 1, 4, 3, 1, (2, 3)),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several tiles of output channels, and mixed kernels of one image at a time."""
    for algorithm in im2col, per_image:
        monkeypatch.setattr(algorithm, 'cache_bytes', lambda: 1)


@functools.cache
def in_float64(shape, dtype):
    """Inputs of this dtype, a gradient of the result, and what the definition makes of them in float64."""
    tensors, conv_args = make_inputs(*shape, dtype=dtype, tap_attn=shape[4] > 1)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    y = one_by_one(**exact, **conv_args)
    probe = torch.randn_like(y).to(dtype)
    gradients = torch.autograd.grad(y, list(exact.values()), probe.double())
    return {name: t.detach() for name, t in tensors.items()}, conv_args, probe, [y.detach(), *gradients]


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-2),  # the halves have 8 and 11 bits of mantissa
], ids=['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('layout', ['nchw', 'nhwc', 'nhwc_images', 'strided'])
@pytest.mark.parametrize('shape', PROOF.values(), ids=PROOF)
def test_outputs_and_gradients_stay_close_to_float64(
        shape, layout, dtype, tolerance, implementation, small_blocks):
    tensors, conv_args, probe, expected = in_float64(shape, dtype)
    tensors = {name: t.clone() for name, t in tensors.items()}
    if layout != 'nchw':
        tensors['x'] = tensors['x'].to(memory_format=torch.channels_last)
    if layout == 'nhwc':
        tensors['weight'] = tensors['weight'].to(memory_format=torch.channels_last)
    if layout == 'strided':
        tensors = {name: torch.stack([t, t], -1)[..., 0] for name, t in tensors.items()}
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}

    y = dynamic_conv2d(**tensors, **conv_args)
    gradients = torch.autograd.grad(y, list(tensors.values()), probe)
    for name, value, true in zip(['y', *tensors], [y, *gradients], expected):
        assert value.dtype == dtype
        error = ((value.double() - true).abs().max() / true.abs().max()).item()
        assert error < tolerance, f'{name}: relative error {error:.1e}'


IN_C = {  # as SHAPES, of images in channels_last
    '1x1': (1, 2, 16, 32, 1, 1, 0, 1, 1, (1, 1)),
    '3x3': (1, 4, 32, 64, 3, 1, 1, 1, 1, (7, 7)),
    '3x3_stride': (1, 3, 48, 32, 3, 2, 1, 1, 1, (9, 6)),
    '5x5_dilation': (1, 8, 16, 96, 5, 1, 4, 2, 1, (5, 8)),
    'uneven': (1, 2, 160, 32, (1, 3), (2, 1), (0, 1), 1, 1, (4, 11)),
    'one_pixel': (1, 4, 16, 32, 3, 1, 1, 1, 1, (1, 1)),
    'wide': (1, 5, 144, 64, 7, 2, 3, 1, 1, (40, 35)),
    'batch': (5, 4, 32, 64, 3, 1, 1, 1, 1, (7, 6)),
    'wide_batch': (3, 2, 16, 32, 3, 1, 1, 1, 1, (61, 47)),  # chunks of rows that end within an image
}


@pytest.fixture
def convolved_in_c(monkeypatch, compiled):
    """Forward passes in C wherever they can be; a list of those."""
    calls, in_order, forward = [], operator.algorithms, c_conv.forward

    def algorithms(question, case):
        return [c_conv] if question == 'forward' and c_conv.supports(case) else in_order(question, case)

    monkeypatch.setattr(operator, 'algorithms', algorithms)
    monkeypatch.setattr(c_conv, 'forward', lambda *args: calls.append(args) or forward(*args))
    return calls


def make_images(shape, **kwargs):
    tensors, conv_args = make_inputs(*shape, dtype=torch.float32, **kwargs)
    for name in 'x', 'weight':
        tensors[name] = tensors[name].detach().to(memory_format=torch.channels_last).requires_grad_()
    return tensors, conv_args


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('tap_attn', [False, True], ids=['', 'taps'])
@pytest.mark.parametrize('shape', IN_C.values(), ids=IN_C)
def test_in_c_outputs_and_gradients_stay_close_to_float64(shape, tap_attn, threads, convolved_in_c):
    tensors, conv_args = make_images(shape, tap_attn=tap_attn)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = dynamic_conv2d(**tensors, **conv_args)
    finally:
        torch.set_num_threads(threads_before)
    assert len(convolved_in_c) == 1 and y.is_contiguous(memory_format=torch.channels_last)
    expected = one_by_one(**exact, **conv_args)
    probe = torch.randn_like(expected)
    gradients = torch.autograd.grad(y, list(tensors.values()), probe.float())
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), probe)
    for name, value, true in zip(['y', *tensors], [y, *gradients], [expected, *expected_gradients]):
        error = ((value.double() - true).abs().max() / true.abs().max()).item()
        assert error < 1e-5, f'{name}: relative error {error:.1e}'


@pytest.mark.parametrize('left_out', [(), ('in_attn',), ('out_attn',), ('bias',), ('in_attn', 'out_attn', 'bias')])
def test_in_c_attention_and_bias_may_be_missing(left_out, convolved_in_c):
    tensors, conv_args = make_images(IN_C['batch'])
    tensors = {name: t.detach() for name, t in tensors.items() if name not in left_out}
    y = dynamic_conv2d(**tensors, **conv_args)
    assert len(convolved_in_c) == 1
    exact = dynamic_conv2d(**{name: t.double() for name, t in tensors.items()}, **conv_args)
    assert ((y - exact).abs().max() / exact.abs().max()).item() < 1e-5


def test_in_c_attention_and_bias_may_have_any_dtype_and_strides(convolved_in_c):
    tensors, conv_args = make_images(IN_C['batch'])
    expected = dynamic_conv2d(**tensors, **conv_args)
    for name in 'kernel_attn', 'in_attn', 'out_attn', 'bias':
        tensors[name] = torch.stack([tensors[name], torch.zeros_like(tensors[name])], -1)[..., 0].double()
    torch.testing.assert_close(dynamic_conv2d(**tensors, **conv_args), expected)
    assert len(convolved_in_c) == 2


@pytest.mark.parametrize('shape, layout, dtype', [
    ((1, 1, 32, 64, 3, 1, 1, 1, 1, (7, 7)), torch.channels_last, torch.float32),
    ((1, 4, 24, 64, 3, 1, 1, 1, 1, (7, 7)), torch.channels_last, torch.float32),
    ((1, 4, 32, 48, 3, 1, 1, 1, 1, (7, 7)), torch.channels_last, torch.float32),
    ((1, 4, 32, 64, 3, 1, 1, 1, 2, (7, 7)), torch.channels_last, torch.float32),
    ((1, 4, 32, 64, 3, 1, 1, 1, 1, (7, 7)), torch.contiguous_format, torch.float32),
    ((1, 4, 32, 64, 3, 1, 1, 1, 1, (7, 7)), torch.channels_last, torch.bfloat16),
    ((1, 4, 64, 32, 1, 1, 0, 1, 1, (63, 63)), torch.channels_last, torch.float32),
], ids=['one_kernel', 'C_in', 'C_out', 'groups', 'nchw', 'bfloat16', 'many_pixels'])
def test_what_c_does_not_take_or_not_sooner_stays_with_pytorch(shape, layout, dtype, monkeypatch, compiled):
    monkeypatch.setattr(c_conv, 'forward', None)
    tensors, conv_args = make_inputs(*shape, dtype=dtype)
    tensors = {name: t.to(memory_format=layout) if t.ndim == 4 else t for name, t in tensors.items()}
    dynamic_conv2d(**tensors, **conv_args)


@pytest.mark.parametrize('change, message', [
    (dict(x=torch.zeros(4, 7, 5)), r'x must have shape \(B, C_in, H, W\), got \(4, 7, 5\)'),
    (dict(x=torch.zeros(2, 5, 7, 5)), 'takes 4 channels, got 5'),
    (dict(weight=torch.zeros(24, 4, 3)), 'weight must have shape'),
    (dict(kernel_attn=torch.zeros(3, 4)), r'kernel_attn must have shape \(2, K\), got \(3, 4\)'),
    (dict(kernel_attn=torch.zeros(2, 5)), 'weight must hold 5 kernels'),
    (dict(in_attn=torch.zeros(2, 6)), r'in_attn must have shape \(2, 4\), got \(2, 6\)'),
    (dict(out_attn=torch.zeros(6)), r'out_attn must have shape \(2, 6\), got \(6,\)'),
    (dict(tap_attn=torch.zeros(2, 3)), r'tap_attn must have shape \(2, 9\), got \(2, 3\)'),
    (dict(bias=torch.zeros(6)), r'bias must have shape \(24,\), got \(6,\)'),
])
def test_a_shape_that_does_not_fit_is_named(change, message):
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(**dict(tensors, **change), **conv_args)


@pytest.mark.parametrize('memory_format, tap_attn', [
    (torch.channels_last, True), pytest.param(torch.contiguous_format, True, marks=pytest.mark.slow),
    *(pytest.param(memory_format, False, marks=pytest.mark.slow)
      for memory_format in (torch.contiguous_format, torch.channels_last)),
], ids=['nhwc-taps', 'nchw-taps', 'nchw', 'nhwc'])
def test_operator_is_registered_as_pytorch_asks(memory_format, tap_attn, implementation):
    tensors, conv_args = make_inputs(*SHAPES['3x3'], dtype=torch.float32, tap_attn=tap_attn)
    x, weight, *rest = (tensors.get(name) for name in ARGUMENTS if name != 'bias')
    x, weight = (t.detach().to(memory_format=memory_format).requires_grad_() for t in (x, weight))
    conv_args = [[1, 1], [1, 1], [1, 1], 1]
    torch.library.opcheck(torch.ops.fmd_timm.dynamic_conv2d.default, (x, weight, *rest, *conv_args))
    torch.library.opcheck(
        torch.ops.fmd_timm.dynamic_conv2d_backward.default,
        (torch.randn(2, 6, 7, 5), *(t if t is None else t.detach() for t in (x, weight, *rest)), *conv_args),
    )


def test_arithmetic_is_counted_by_the_definition(implementation):
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    with FlopCounterMode(display=False) as counter:
        dynamic_conv2d(**tensors, **conv_args)
    B, K, I, O, taps, pixels = 2, 4, 4, 6, 9, 7 * 5
    assert counter.get_total_flops() == 2 * B * O * I * taps * (K + pixels)


def test_gradients_have_the_layout_of_their_tensors(implementation):
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    weight = tensors['weight'].detach().to(memory_format=torch.channels_last).requires_grad_()
    dynamic_conv2d(**dict(tensors, weight=weight), **conv_args).sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize('name', ARGUMENTS)
def test_a_single_argument_may_need_the_gradient(name):
    """As the attention does where everything else is frozen."""
    tensors, conv_args = make_inputs(*SHAPES['3x3'], tap_attn=True)
    expected = torch.autograd.grad(dynamic_conv2d(**tensors, **conv_args).square().sum(), tensors[name])
    frozen = {other: t if other == name else t.detach() for other, t in tensors.items()}
    torch.testing.assert_close(
        torch.autograd.grad(dynamic_conv2d(**frozen, **conv_args).square().sum(), frozen[name]), expected)


def test_a_tensor_with_the_negative_bit_is_what_it_says():
    tensors, conv_args = make_images(IN_C['3x3'])
    tensors = {name: t.detach() for name, t in tensors.items()}
    expected = dynamic_conv2d(**dict(tensors, x=-tensors['x']), **conv_args)
    torch.testing.assert_close(dynamic_conv2d(**dict(tensors, x=torch._neg_view(tensors['x'])), **conv_args), expected)


def test_a_subclass_of_tensor_goes_through_the_dispatcher():
    tensors, conv_args = make_images(IN_C['3x3'])
    tensors = {name: t.detach() for name, t in tensors.items()}
    weight = TwoTensor(tensors['weight'], tensors['weight'].clone())
    y = dynamic_conv2d(**dict(tensors, weight=weight), **conv_args)
    torch.testing.assert_close(y.a if isinstance(y, TwoTensor) else y, dynamic_conv2d(**tensors, **conv_args))


def test_forward_derivatives_are_refused():
    tensors, conv_args = make_images(IN_C['3x3'])
    tensors = {name: t.detach() for name, t in tensors.items()}
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match='has no forward-mode derivative'):
        dual = forward_ad.make_dual(tensors['x'], torch.ones_like(tensors['x']))
        dynamic_conv2d(**dict(tensors, x=dual), **conv_args)


def test_an_expanded_input_has_gradients():
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    one = tensors['x'][:1].detach().requires_grad_()
    expanded = one.expand(2, -1, -1, -1)
    repeated = one.repeat(2, 1, 1, 1)
    gradients = [
        torch.autograd.grad(dynamic_conv2d(**dict(tensors, x=x), **conv_args).square().sum(), one)[0]
        for x in (expanded, repeated)
    ]
    torch.testing.assert_close(*gradients)
