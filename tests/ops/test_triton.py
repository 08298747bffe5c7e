"""The algorithms for CUDA against the reference in float64: on a GPU if there is one, always in Triton's interpreter.

The interpreter is chosen before triton is imported, so these tests run in a process of their own.
"""
import os
import subprocess
import sys

import pytest
import torch
from inputs import GOLDEN_CASES, check_against_the_authors_code

from fmd_timm.ops import cuda, reference

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
    'pointwise': (3, 4, 5, 7, 1, 1, 0, 1, (4, 5)),
    'single': (1, 4, 5, 7, 3, 2, 1, 1, (6, 5)),
}
WAYS = [
    *(('fused', case) for case in CASES if case not in ('pointwise', 'single')),
    *(('materialised', case) for case in ('1x1_padding', 'dilation_stride', '1x2')),
    ('pointwise', 'pointwise'), ('single', 'single'),
]
FEW = [('fused', '1x2'), ('materialised', '1x2'), ('pointwise', 'pointwise'), ('single', 'single')]
NAMES = 'x', 'weight', 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn', 'bias'
OPTIONAL = NAMES[2:]


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
    from fmd_timm.ops import triton_conv, triton_mix, triton_weight_grad
    conv, grad = triton_conv.ConvTile(2, 16, 16, 16, 4, 2), triton_weight_grad.GradTile(16, 16, 16, 4, 2)
    tiles = triton_conv.Tiles(conv._replace(samples=1), conv, conv)
    monkeypatch.setattr(triton_conv, 'TILES', dict.fromkeys(triton_conv.TILES, tiles))
    monkeypatch.setattr(triton_weight_grad, 'TILES', dict.fromkeys(triton_weight_grad.TILES, grad))
    monkeypatch.setattr(triton_weight_grad, 'PROGRAMS', 36)
    monkeypatch.setattr(triton_mix, 'BLOCK', 256)
    monkeypatch.setattr(triton_mix, 'SAMPLES', 2)


def choose(monkeypatch, algorithm):
    """Let the algorithm run whatever the rules say, and a failure in it be one."""
    def chosen(*args, backward, **kwargs):
        return 'reference' if backward and algorithm == 'single' else algorithm

    def fail(function, *args):
        return function(*args)

    monkeypatch.setattr(cuda, 'choose', chosen)
    monkeypatch.setattr(cuda, '_by_triton', fail)


def make_inputs(B, K, I, O, kernel, stride, padding, dilation, size, dtype=torch.float32, without=()):
    h, w = pair(kernel)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = dict(
        x=normal(B, I, *size).to(dtype), weight=normal(K * O, I, h, w).to(dtype), kernel_attn=normal(B, K).softmax(1),
        in_attn=normal(B, I).sigmoid(), out_attn=normal(B, O).sigmoid(), tap_attn=normal(B, h * w).sigmoid(),
        bias=normal(K * O),
    )
    tensors = {name: None if name in without else t.to(DEVICE) for name, t in tensors.items()}
    return tensors, dict(stride=pair(stride), padding=pair(padding), dilation=pair(dilation), groups=1)


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def run(implementation, tensors, conv_args, grad_y=None):
    """The result and, by name, the gradients."""
    y = implementation.forward(**tensors, **conv_args)
    if grad_y is None:
        grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = implementation.backward(grad_y, **tensors, **conv_args)
    return dict(zip(('y', *NAMES), (y, *grads))), grad_y


def check(tensors, conv_args, tolerance):
    results, grad_y = run(cuda, tensors, conv_args)
    exact = {name: None if t is None else t.double().cpu() for name, t in tensors.items()}
    exact, _ = run(reference, exact, conv_args, grad_y.double().cpu())
    for name, expected in exact.items():
        got = results[name]
        if expected is None:
            assert got is None, name
            continue
        assert got.shape == expected.shape, name
        error = (got.double().cpu() - expected).norm() / expected.norm()
        assert error < tolerance, f'{name} is off by {error:.1e}'  # NaN too fails
    return results


@runs_kernels
@pytest.mark.parametrize('algorithm, case', WAYS, ids=str)
def test_result_and_gradients(algorithm, case, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    check(*make_inputs(*CASES[case]), tolerance=1e-5)  # float32 is multiplied in full


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str)
@pytest.mark.parametrize('algorithm, case', FEW, ids=str)
def test_result_and_gradients_in_half_precision(algorithm, case, dtype, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    results = check(*make_inputs(*CASES[case], dtype=dtype), tolerance=2e-2)  # bfloat16 has 8 bits of mantissa
    assert results['y'].dtype == results['x'].dtype == dtype


@runs_kernels
@pytest.mark.parametrize('algorithm, case', FEW, ids=str)
def test_float32_kernels_beside_half_precision_images(algorithm, case, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    tensors, conv_args = make_inputs(*CASES[case])
    tensors['x'] = tensors['x'].bfloat16()
    results = check(tensors, conv_args, tolerance=2e-2)  # the images have 8 bits of mantissa
    assert results['y'].dtype == results['x'].dtype == torch.bfloat16


@runs_kernels
@pytest.mark.parametrize('without', [OPTIONAL, *(pytest.param((name,), marks=slow) for name in OPTIONAL)], ids='-'.join)
@pytest.mark.parametrize('algorithm, case', FEW, ids=str)
def test_each_factor_may_be_missing(algorithm, case, without, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    shape = list(CASES[case])
    if 'kernel_attn' in without:
        shape[1] = 1
    check(*make_inputs(*shape, without=without), tolerance=1e-5)


@runs_kernels
@pytest.mark.parametrize('algorithm, case', FEW[:3], ids=str)
def test_closed_gates_have_a_gradient(algorithm, case, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    tensors, conv_args = make_inputs(*CASES[case])
    tensors['out_attn'][:, ::2] = 0
    tensors['in_attn'][:, ::2] = 0
    tensors['tap_attn'][0] = 0
    check(tensors, conv_args, tolerance=1e-5)


@runs_kernels
@pytest.mark.parametrize('algorithm, case', FEW, ids=str)
def test_any_strides_give_the_same_numbers(algorithm, case, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    tensors, conv_args = make_inputs(*CASES[case])
    tensors['x'] = tensors['x'][:1].expand_as(tensors['x'])
    expected, grad_y = run(cuda, {name: t.contiguous() for name, t in tensors.items()}, conv_args)
    assert expected['y'].is_contiguous(memory_format=torch.channels_last)
    for name in 'weight', 'in_attn', 'kernel_attn':
        tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    transposed, _ = run(cuda, tensors, conv_args, grad_y)
    tensors['weight'] = tensors['weight'].contiguous(memory_format=torch.channels_last)
    tensors['x'] = tensors['x'].contiguous(memory_format=torch.channels_last)
    channels_last, _ = run(cuda, tensors, conv_args, grad_y)
    for name in expected:
        torch.testing.assert_close(transposed[name], expected[name])
        torch.testing.assert_close(channels_last[name], expected[name])


@runs_kernels
@pytest.mark.parametrize('algorithm, case', FEW[:3], ids=str)
def test_an_image_does_not_depend_on_its_batch(algorithm, case, small_tiles, monkeypatch):
    choose(monkeypatch, algorithm)
    tensors, conv_args = make_inputs(*CASES[case])
    together, grad_y = run(cuda, tensors, conv_args)
    alone, _ = run(
        cuda, {name: t if name in ('weight', 'bias') else t[1:2] for name, t in tensors.items()}, conv_args,
        grad_y[1:2])
    for name in set(alone) - {'weight', 'bias'}:
        torch.testing.assert_close(alone[name], together[name][1:2])


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('algorithm, kernel, size', [
    ('fused', 1, (3, 6)),
    *(pytest.param(*way, marks=slow) for way in [
        ('fused', (1, 3), (6, 6)), ('fused', (1, 3), (9, 8)), ('materialised', (1, 3), (16, 16)),
        ('pointwise', 1, (16, 17)),
    ]),
], ids=str)
def test_tiles_of_the_rules(algorithm, kernel, size, dtype, monkeypatch):
    choose(monkeypatch, algorithm)
    padding = 0 if kernel == 1 else (0, 1)
    tensors, conv_args = make_inputs(3, 3, 40, 72, kernel, 1, padding, 1, size, dtype)
    check(tensors, conv_args, tolerance=1e-5 if dtype == torch.float32 else 2e-2)


@runs_kernels
@pytest.mark.skipif(DEVICE == 'cuda', reason='runs layers on the CPU through the CUDA functions')
@pytest.mark.filterwarnings('ignore:dynamic_conv2d. its kernels for CUDA take')  # 12 channels, 4 groups
@pytest.mark.parametrize('mode', [pytest.param('eval', marks=slow), 'train'])
@pytest.mark.parametrize('name', GOLDEN_CASES)
def test_golden_numbers_hold(name, mode, monkeypatch):
    from fmd_timm.ops import cpu
    monkeypatch.setattr(cpu, 'forward', cuda.forward)
    monkeypatch.setattr(cpu, 'backward', cuda.backward)
    monkeypatch.setattr(cuda, 'FEW_RESULTS', 0)
    monkeypatch.setattr(cuda, 'DENSE_UP_TO', 0)
    with torch.backends.cudnn.flags(allow_tf32=False):
        check_against_the_authors_code(name, mode, torch.float32)
    assert not cuda._triton_failed
