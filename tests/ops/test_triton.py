"""The convolution in Triton against the reference in float64: on a GPU if there is one, always in Triton's interpreter.

The interpreter is chosen before triton is imported, so these tests run in a process of their own.
"""
import os
import random
import subprocess
import sys
import warnings
from types import SimpleNamespace

import cases
import pytest
import torch
from cases import assert_near, random_like, run, run_reference

from fmd_timm import dynamic_conv2d
from fmd_timm.ops import operator, triton_checked
from fmd_timm.ops.case import Attention
from fmd_timm.ops.triton_checked import TritonConv

pytest.importorskip('triton')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'

runs_kernels = pytest.mark.skipif(
    DEVICE == 'cpu' and not INTERPRETED, reason='no GPU; test_in_the_interpreter runs it')
slow = pytest.mark.slow

CASES = {  # B, K, I, O, kernel, stride, padding, dilation, (H, W)
    '1x1': (3, 2, 8, 24, 1, 1, 0, 1, (3, 6)),
    '1x1_stride': (2, 2, 24, 8, 1, 2, 0, 1, (6, 5)),
    '1x1_padding': (2, 2, 8, 8, 1, 1, 1, 1, (4, 3)),
    '1x2': (3, 2, 8, 24, (1, 2), 1, 0, 1, (3, 4)),
    '3x3': (3, 4, 8, 24, 3, 1, 1, 1, (4, 5)),
    '3x3_stride': (2, 2, 24, 8, 3, 2, 1, 1, (8, 5)),
    'one_kernel': (2, 1, 8, 8, 3, 1, 0, 1, (5, 4)),
    'eight_kernels': (2, 8, 8, 24, (1, 3), 1, (0, 1), 1, (4, 5)),
    'dilation': (2, 2, 8, 8, 3, 1, 2, 2, (5, 6)),
    'dilation_stride': (2, 2, 8, 8, 3, 2, 2, 2, (7, 6)),
    '5x5': (2, 4, 8, 8, 5, 1, 2, 1, (4, 4)),
    '7x7': (2, 2, 8, 8, 7, 2, 3, 1, (7, 6)),
    '1x3': (3, 3, 8, 24, (1, 3), (2, 1), (0, 1), 1, (5, 6)),
    'stride_beyond_kernel': (2, 2, 8, 8, 2, 3, 0, 1, (8, 9)),
    'stride_beyond_image': (2, 2, 8, 8, 3, 2, 1, 1, (1, 1)),
    'one_image': (1, 4, 8, 16, 3, 2, 1, 1, (6, 5)),
}
BY_DEFAULT = '1x1_stride', '3x3_stride', 'one_image'  # all take a minute
DTYPES = torch.float32, torch.bfloat16, torch.float16
# float32 is multiplied in full; bfloat16 has 8 bits of mantissa
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.mark.parametrize('which', ['not slow', pytest.param('slow', marks=slow)])
def test_in_the_interpreter(which):
    if INTERPRETED:
        pytest.skip('this is the interpreter')
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-m', which, __file__],
        env=dict(os.environ, TRITON_INTERPRET='1'), capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """What torch.empty returns holds NaN, so that an element no program writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_tiles(monkeypatch):
    """That leave every size ragged, with several images a program."""
    from fmd_timm.ops import triton_conv
    tile = triton_conv.Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(triton_conv, 'TILES', {(64, itemsize): tile for itemsize in (2, 4)})
    monkeypatch.setattr(triton_conv, 'BLOCK', 256)
    monkeypatch.setattr(triton_conv, 'SAMPLES', 2)


def make_inputs(*shape, **options):
    return cases.make_inputs(*shape, **options, device=DEVICE)


def in_triton(channels=64):
    """The algorithm, unchecked."""
    from fmd_timm.ops import triton_conv
    return SimpleNamespace(
        forward=lambda *inputs: triton_conv.forward(*inputs, channels),
        backward=lambda *inputs: triton_conv.backward(*inputs, channels))


def check(*inputs, channels=64):
    found, case = run(in_triton(channels), *inputs), inputs[3]
    assert_near(found, run_reference(*inputs), TOLERANCES[case.dtype])
    assert found['y'].dtype == found['x'].dtype == case.dtype


@runs_kernels
@pytest.mark.parametrize('taps', [True, pytest.param(False, marks=slow)], ids=['taps', 'no_taps'])
@pytest.mark.parametrize('case', [case if case in BY_DEFAULT else pytest.param(case, marks=slow) for case in CASES])
def test_result_and_gradients(case, taps, small_tiles):
    check(*make_inputs(*CASES[case], without=() if taps else ('tap_attn',)))


@runs_kernels
@pytest.mark.parametrize('weight_dtype', [torch.float32, None], ids=['float32_kernels', 'half_kernels'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str)
@pytest.mark.parametrize('case', ['1x2', pytest.param('3x3_stride', marks=slow)])
def test_half_precision(case, dtype, weight_dtype, small_tiles):
    check(*make_inputs(*CASES[case], dtype=dtype, weight_dtype=weight_dtype))


@runs_kernels
@pytest.mark.parametrize('without', [Attention._fields, ('in_attn', 'tap_attn'), ('out_attn',)], ids='-'.join)
def test_each_factor_may_be_missing(without, small_tiles):
    check(*make_inputs(*CASES['1x2'], without=without))


@runs_kernels
def test_closed_gates_have_a_gradient(small_tiles):
    x, weight, attention, case = make_inputs(*CASES['3x3_stride'], without=())
    attention.out_attn[:, ::2] = 0
    attention.in_attn[:, ::2] = 0
    attention.tap_attn[0] = 0
    check(x, weight, attention, case)


@runs_kernels
def test_any_strides_and_any_address_give_the_same_numbers(small_tiles):
    x, weight, attention, case = make_inputs(*CASES['1x2'])
    expected = run(in_triton(), x, weight, attention, case)
    assert expected['y'].is_contiguous(memory_format=torch.channels_last)
    grad_y = random_like(expected['y'])
    for change in (
            lambda t: t.contiguous(memory_format=torch.channels_last),
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # not a multiple of 16
    ):
        found = run(in_triton(), change(x), change(weight), attention, case, change(grad_y))
        assert_near(found, expected, TOLERANCES[torch.float32])


@runs_kernels
def test_an_image_does_not_depend_on_its_batch(small_tiles):
    x, weight, attention, case = make_inputs(*CASES['1x2'])
    together = run(in_triton(), x, weight, attention, case)
    one = Attention(*(None if t is None else t[1:2] for t in attention))
    alone = run(in_triton(), x[1:2], weight, one, case._replace(batch=1), random_like(together['y'])[1:2])
    del alone['weight']
    assert_near(alone, {name: None if t is None else t[1:2] for name, t in together.items()}, TOLERANCES[torch.float32])


@runs_kernels
def test_results_repeat_bit_for_bit(small_tiles):
    inputs = make_inputs(*CASES['1x2'], dtype=torch.bfloat16)
    first, second = run(in_triton(), *inputs), run(in_triton(), *inputs)
    for name in set(first) - {'tap_attn'}:
        assert torch.equal(first[name], second[name]), name


@runs_kernels
@pytest.mark.parametrize('channels, dtype', [
    (128, torch.bfloat16), *(pytest.param(64, dtype, marks=slow) for dtype in (torch.float32, torch.bfloat16)),
], ids=str)
def test_the_real_tiles(channels, dtype):
    check(*make_inputs(3, 3, 40, 136, (1, 3), (1, 2), (0, 1), 1, (12, 13), dtype=dtype), channels=channels)


@runs_kernels
@pytest.mark.parametrize('case, dtype', [('3x3_stride', torch.float32), ('1x2', torch.bfloat16)], ids=str)
def test_the_check_of_the_first_use_passes(case, dtype, small_tiles, monkeypatch):
    monkeypatch.setattr(triton_checked, '_right', {})
    *_, case = make_inputs(*CASES[case], dtype=dtype, without=())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)  # ours; old interpreters warn of NumPy's changes
        assert TritonConv(64, None).supports(case) and TritonConv(64, None).is_right(case)


class Short:
    """A kernel of which the last program is left out."""
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0] - 1,)]


@runs_kernels
def test_the_check_of_the_first_use_notices_results_that_are_not_written(small_tiles, monkeypatch):
    from fmd_timm.ops import triton_conv
    monkeypatch.setattr(triton_checked, '_right', {})
    monkeypatch.setattr(triton_conv, '_conv_kernel', Short(triton_conv._conv_kernel))
    *_, case = make_inputs(*CASES['3x3_stride'])
    with pytest.warns(UserWarning, match='the result is off by nan'):
        assert not TritonConv(64, None).is_right(case)


@runs_kernels
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
def test_the_operator_lays_out_what_it_gets_from_here(channels_last, small_tiles, monkeypatch):
    from fmd_timm.ops import triton_conv
    x, weight, attention, case = make_inputs(*CASES['1x2'])
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors = [t for t in (x, weight, *attention[:3]) if t is not None]

    def step():
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = dynamic_conv2d(*leaves, stride=case.stride, padding=case.padding)
        return y, *torch.autograd.grad(y, leaves, random_like(y))

    used, forward = [], triton_conv.forward
    monkeypatch.setattr(triton_conv, 'forward', lambda *arguments: used.append(1) or forward(*arguments))
    expected = step()
    assert not used
    monkeypatch.setattr(operator, 'algorithms', lambda question, case: [TritonConv(64, None)])
    found = step()
    assert used
    for got, value in zip(found, expected):
        torch.testing.assert_close(got, value)
        assert got.stride() == value.stride()


def random_shape(number):
    """One that is supported; sizes are those of the interpreter, or of a GPU."""
    rng = random.Random(number)
    largest = 3 if DEVICE == 'cpu' else 24
    kernel, stride, dilation = ((rng.randint(1, most), rng.randint(1, most)) for most in (3, 3, 2))
    padding = tuple(rng.randint(0, size // 2 * 2) for size in kernel)
    size = tuple(
        max(d * (k - 1) + 1 - 2 * p, 1) + rng.randint(0, 2 * largest)
        for d, k, p in zip(dilation, kernel, padding))
    I, O = 8 * rng.randint(1, largest), 8 * rng.randint(1, largest)
    return rng.randint(1, 5), rng.randint(1, 8), I, O, kernel, stride, padding, dilation, size


@runs_kernels
@pytest.mark.parametrize('dtype, numbers', [
    (torch.float32, range(2)), pytest.param(torch.float32, range(2, 4), marks=slow),
    *(pytest.param(dtype, range(start, start + 20), marks=slow)
      for dtype in DTYPES for start in range(100, 200, 20)),
], ids=str)
def test_random_shapes(dtype, numbers, request):
    from fmd_timm.ops import triton_conv
    if DEVICE == 'cpu':
        request.getfixturevalue('small_tiles')
    for number in numbers:
        without = random.Random(f'without {number}').sample(Attention._fields[1:], k=number % 4)
        inputs = make_inputs(*random_shape(number), dtype=dtype, weight_dtype=torch.float32, without=without)
        for channels, itemsize in triton_conv.TILES:
            if itemsize == dtype.itemsize:
                check(*inputs, channels=channels)
