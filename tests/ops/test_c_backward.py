"""c_conv.backward: the gradients in C are those of the definition in float64, and touch no foreign memory."""
import random

import pytest
import torch
from cases import differentiate_reference

from fmd_timm.ops import c_conv, operator
from fmd_timm.ops.case import Attention, case_of

SHAPES = {  # B, K, I, O, kernel, stride, padding, dilation, (H, W)
    '1x1': (2, 4, 64, 32, (1, 1), (1, 1), (0, 0), (1, 1), (7, 6)),
    '1x1_stride': (2, 4, 32, 64, (1, 1), (2, 2), (0, 0), (1, 1), (7, 6)),  # pixels that no tap reaches
    '3x3': (5, 4, 32, 64, (3, 3), (1, 1), (1, 1), (1, 1), (7, 7)),
    '3x3_single_image': (1, 2, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (4, 5)),
    '3x3_stride': (2, 3, 32, 32, (3, 3), (2, 2), (1, 1), (1, 1), (9, 6)),
    '5x5_dilation': (2, 8, 32, 32, (5, 5), (1, 1), (4, 4), (2, 2), (5, 8)),
    'uneven': (2, 2, 160, 32, (1, 3), (2, 1), (0, 1), (1, 1), (4, 11)),
    'panels': (2, 5, 32, 160, (3, 1), (1, 2), (1, 0), (1, 1), (4, 17)),  # rows of more than one panel, the last ragged
    'wide_stride': (2, 2, 32, 32, (2, 2), (3, 4), (1, 0), (1, 1), (9, 11)),
    'wide_padding': (2, 2, 32, 32, (3, 3), (1, 2), (4, 5), (1, 1), (3, 2)),  # taps that meet no pixel at all
    'one_pixel': (5, 4, 32, 32, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    'most_kernels': (2, 32, 32, 32, (1, 3), (1, 1), (0, 1), (1, 1), (3, 4)),
}
GATES = [tuple(bool(n & bit) for bit in (1, 2, 4)) for n in range(8)]  # whether there are in_attn, out_attn, tap_attn

pytestmark = pytest.mark.usefixtures('compiled')


def make_call(B, K, I, O, kernel_size, stride, padding, dilation, size, gates=(True, True, True)):
    """What `backward` takes; one in ten factors of the attention is 0"""
    x = torch.randn(B, I, *size).to(memory_format=torch.channels_last)
    weight = torch.randn(K * O, I, *kernel_size).to(memory_format=torch.channels_last)
    sizes = I, O, kernel_size[0] * kernel_size[1]
    attention = Attention(torch.rand(B, K), *(torch.rand(B, n) if given else None for n, given in zip(sizes, gates)))
    attention = Attention(*(t if t is None else t * (torch.rand_like(t) > 0.1) for t in attention))
    case = case_of(x, weight, attention, stride, padding, dilation, 1)
    grad_y = torch.randn(B, O, *case.output_size).to(memory_format=torch.channels_last)
    return grad_y, x, weight, attention, case


def gradients(backward, *call) -> dict:
    grad_x, grad_weight, of_attention = backward(*call)
    return dict(x=grad_x, weight=grad_weight, **of_attention._asdict())


def definition(change, *tensors, attention, case) -> dict:
    attention = Attention(*(t if t is None else change(t) for t in attention))
    return gradients(differentiate_reference, *map(change, tensors), attention, case)


def assert_as_defined(call):
    """Rounding errors are small beside the sum of the magnitudes of all that is added up for a gradient."""
    *tensors, attention, case = call
    expected = definition(torch.Tensor.double, *tensors, attention=attention, case=case)
    magnitudes = definition(lambda t: t.double().abs(), *tensors, attention=attention, case=case)
    found, again = gradients(c_conv.backward, *call), gradients(c_conv.backward, *call)
    for name, true in expected.items():
        if true is None:
            assert found[name] is None, name
            continue
        assert found[name].shape == true.shape and found[name].dtype == torch.float32, name
        assert torch.equal(found[name], again[name]), f'{name} does not repeat'
        error = (found[name] - true).abs() / magnitudes[name].clamp(min=1e-30)
        assert error.max() <= 1e-6, f'{name}: relative error {error.max():.1e}'


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """New memory holds NaN, so that results that were not written show."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('gates', [(True, True, True), (True, True, False)], ids=['taps', ''])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_definition(shape, gates, threads):
    torch.set_num_threads(threads)
    assert_as_defined(make_call(*shape, gates=gates))


@pytest.mark.parametrize('gates', GATES)
def test_any_attention_may_be_missing(gates):
    assert_as_defined(make_call(*SHAPES['3x3'], gates=gates))


def test_gradients_have_the_layout_of_their_tensors():
    call = make_call(*SHAPES['3x3'])
    found = gradients(c_conv.backward, *call)
    assert found['x'].stride() == call[1].stride() and found['weight'].stride() == call[2].stride()


def test_grad_y_may_have_any_strides():
    grad_y, *others = make_call(*SHAPES['3x3'])
    expected = gradients(c_conv.backward, grad_y, *others)
    for other in grad_y.contiguous(), torch.stack([grad_y, grad_y], -1)[..., 0]:
        assert all(torch.equal(g, expected[name]) for name, g in gradients(c_conv.backward, other, *others).items())


def test_nan_stays_in_the_image_that_has_it():
    grad_y, x, weight, attention, case = make_call(*SHAPES['3x3'])
    x[1, 3, 2, 2] = torch.nan
    found = gradients(c_conv.backward, grad_y, x, weight, attention, case)
    for name in 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn':
        has_nan = found[name].isnan().any(1)
        assert has_nan.tolist() == [False, True, False, False, False], name
    assert not found['x'].isnan().any()


def test_nothing_is_left_of_the_images_of_another_call():
    torch.set_num_threads(1)
    shape = SHAPES['3x3'][1:]
    for batch in 1, 2, 3:
        grad_y, x, *others = make_call(4, *shape)
        c_conv.backward(grad_y, torch.full_like(x, torch.nan), *others)
        assert_as_defined(make_call(batch, *shape))


def test_the_operator_differentiates_in_c(monkeypatch):
    grad_y, x, weight, attention, case = make_call(*SHAPES['3x3'])
    calls, backward = [], c_conv.backward
    monkeypatch.setattr(c_conv, 'backward', lambda *args: calls.append(args) or backward(*args))
    monkeypatch.setattr(operator, 'algorithms', lambda question, case: [c_conv])
    inputs = [t.requires_grad_() for t in (x, weight, *attention)]
    y = torch.ops.fmd_timm.dynamic_conv2d(*inputs, case.stride, case.padding, case.dilation, 1)
    found = torch.autograd.grad(y, inputs, grad_y)
    expected = gradients(differentiate_reference, grad_y, x.detach(), weight.detach(), attention, case)
    for value, (name, true) in zip(found, expected.items()):
        torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-5 * true.abs().max().item(), msg=name)
    assert len(calls) == 1


@pytest.mark.parametrize('change', [
    dict(in_channels=48), dict(num_kernels=33), dict(num_kernels=1), dict(groups=2), dict(dtype=torch.bfloat16),
], ids=str)
def test_what_c_can_not_differentiate_is_left_to_others(change):
    case = make_call(*SHAPES['3x3'])[-1]
    assert c_conv.differentiates(case)
    assert not c_conv.differentiates(case._replace(**change))


def differentiate_at_random(seed: int, count: int) -> None:
    """Compare random gradients with the definition."""
    rng = random.Random(seed)
    torch.manual_seed(seed)

    def pair(least: int, most: int) -> tuple[int, int]:
        return rng.randint(least, most), rng.randint(least, most)

    done = 0
    while done < count:
        K, I, O = rng.randint(2, 8), 32 * rng.randint(1, 5), 32 * rng.randint(1, 5)
        kernel_size, stride = pair(1, rng.choice([1, 3, 5])), pair(1, rng.choice([1, 2, 4]))
        padding, dilation = pair(0, rng.choice([0, 1, 5])), pair(1, rng.choice([1, 3]))
        size, batch = pair(1, rng.choice([3, 8, 20])), rng.choice([1, 2, 5])
        if c_conv._conv(I, O, K, kernel_size, stride, padding, dilation, size) is None:
            continue
        torch.set_num_threads(rng.randint(1, 4))
        assert_as_defined(make_call(
            batch, K, I, O, kernel_size, stride, padding, dilation, size, rng.choice(GATES)))
        done += 1


@pytest.mark.parametrize('seed', [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 21))])
def test_random_gradients_are_those_of_the_definition(seed):
    differentiate_at_random(seed, 40)


@pytest.mark.slow
def test_random_gradients_by_every_compiler_and_vector(run_built):
    run_built('import test_c_backward; test_c_backward.differentiate_at_random(7, 40)')
