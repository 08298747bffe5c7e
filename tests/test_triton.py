"""The Triton implementation against float64: on the GPU where there is one, and always in Triton's interpreter.

The interpreter is chosen before triton is imported, so one test runs this file again in a process of its own.
"""
import os
import subprocess
import sys

import pytest
import torch

from fmd_timm import dynamic_conv2d

pytest.importorskip('triton')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
DEVICE = 'cuda' if torch.cuda.is_available() and not INTERPRETED else 'cpu'

runs_kernels = pytest.mark.skipif(
    DEVICE == 'cpu' and not INTERPRETED, reason='no GPU; test_in_the_interpreter runs it')

CASES = {  # B, K, I, O, kernel, stride, padding, dilation, (H, W)
    '1x1': (3, 2, 17, 18, 1, 1, 0, 1, (3, 6)),
    '1x1_stride': (2, 2, 17, 8, 1, 2, 0, 1, (6, 5)),
    '1x1_padding': (2, 2, 8, 8, 1, 1, 1, 1, (4, 3)),
    '3x3': (3, 4, 5, 17, 3, 1, 1, 1, (5, 4)),
    '3x3_stride': (3, 2, 17, 7, 3, 2, 1, 1, (8, 5)),
    'one_kernel': (2, 1, 5, 7, 3, 1, 0, 1, (5, 4)),
    'eight_kernels': (2, 8, 9, 17, (1, 3), 1, (0, 1), 1, (4, 5)),
    'dilation': (2, 2, 6, 5, 3, 1, 2, 2, (5, 6)),
    'dilation_stride': (2, 2, 6, 8, 3, 2, 2, 2, (7, 6)),
    '5x5': (2, 4, 6, 8, 5, 1, 2, 1, (4, 4)),
    'stem': (2, 2, 3, 8, 7, 2, 3, 1, (7, 6)),
    '1x3': (3, 3, 9, 18, (1, 3), (2, 1), (0, 1), 1, (5, 6)),
    'stride_beyond_kernel': (2, 2, 4, 5, 2, 3, 0, 1, (8, 9)),
    'stride_beyond_image': (2, 2, 4, 5, 3, 2, 1, 1, (1, 1)),
}
NAMES = 'x', 'weight', 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn', 'mixed_bias'
OPTIONAL = NAMES[3:]


def test_in_the_interpreter():
    if INTERPRETED:
        pytest.skip('this is the interpreter')
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
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


@pytest.fixture(params=['fused', 'materialised'])
def way(request, monkeypatch):
    """Run the test in each of the two ways, in small tiles that leave every size ragged, several images a program."""
    from fmd_timm.ops import triton_conv, triton_mix
    conv, grad = triton_conv.ConvTile(2, 16, 16, 16, 4, 2), triton_conv.GradTile(16, 16, 16, 4, 2)
    tiles = triton_conv.Tiles(conv._replace(samples=1), conv, grad)
    monkeypatch.setattr(triton_conv, 'TILES', dict.fromkeys(triton_conv.TILES, tiles))
    monkeypatch.setattr(triton_conv, 'PROGRAMS', 36)
    monkeypatch.setattr(triton_conv, 'MATERIALISE_ABOVE', 0 if request.param == 'materialised' else 10**9)
    monkeypatch.setattr(triton_mix, 'BLOCK', 256)
    monkeypatch.setattr(triton_mix, 'SAMPLES', 2)


def make_inputs(B, K, I, O, kernel, stride, padding, dilation, size, dtype=torch.float32, without=()):
    h, w = pair(kernel)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = dict(
        x=normal(B, I, *size).to(dtype), weight=normal(K * O, I, h, w).to(dtype), kernel_attn=normal(B, K).softmax(1),
        in_attn=normal(B, I).sigmoid(), out_attn=normal(B, O).sigmoid(), tap_attn=normal(B, h * w).sigmoid(),
        mixed_bias=normal(B, O),
    )
    tensors = {name: None if name in without else t.to(DEVICE) for name, t in tensors.items()}
    return tensors, dict(stride=pair(stride), padding=pair(padding), dilation=pair(dilation))


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def triton_results(tensors, conv_args, grad_y=None):
    """The result and, by name, the gradients."""
    from fmd_timm.ops.triton_conv import dynamic_conv2d_triton, dynamic_conv2d_triton_backward
    y = dynamic_conv2d_triton(**tensors, **conv_args)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if grad_y is None else grad_y
    grads = dynamic_conv2d_triton_backward(grad_y, **tensors, **conv_args, needs=(True,) * 7)
    return dict(zip(('y', *NAMES), (y, *grads))), grad_y


def exact_results(tensors, conv_args, grad_y):
    exact = {name: None if t is None else t.double().cpu().requires_grad_() for name, t in tensors.items()}
    bias, out_attn = exact['mixed_bias'], exact['out_attn']
    y = dynamic_conv2d(**{n: t for n, t in exact.items() if n not in ('mixed_bias', 'out_attn')}, **conv_args)
    y = y if bias is None else y + bias[:, :, None, None]
    y = y if out_attn is None else y * out_attn[:, :, None, None]
    y.backward(grad_y.double().cpu())
    return dict(y=y.detach(), **{name: None if t is None else t.grad for name, t in exact.items()})


def assert_close(results, exact, tolerance):
    for name, expected in exact.items():
        got = results[name]
        if expected is None:
            assert got is None, name
            continue
        assert got.shape == expected.shape, name
        error = (got.double().cpu() - expected).norm() / expected.norm()
        assert error < tolerance, f'{name} is off by {error:.1e}'  # NaN too fails


def check(tensors, conv_args, tolerance):
    results, grad_y = triton_results(tensors, conv_args)
    assert_close(results, exact_results(tensors, conv_args, grad_y), tolerance)
    return results


@runs_kernels
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_result_and_gradients(case, way):
    check(*make_inputs(*case), tolerance=1e-5)  # float32 is multiplied in full


@runs_kernels
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('case', ['1x1', '1x3'])
def test_result_and_gradients_in_half_precision(case, dtype, way):
    results = check(*make_inputs(*CASES[case], dtype=dtype), tolerance=2e-2)  # bfloat16 has 8 bits of mantissa
    assert {name: t.dtype for name, t in results.items()} == dict(
        y=dtype, x=dtype, weight=dtype, **dict.fromkeys(NAMES[2:], torch.float32))


@runs_kernels
@pytest.mark.parametrize('without', [(), OPTIONAL, *((name,) for name in OPTIONAL)], ids='-'.join)
@pytest.mark.parametrize('case', ['1x1', '1x3'])
def test_each_factor_may_be_missing(case, without, way):
    check(*make_inputs(*CASES[case], without=without), tolerance=1e-5)


@runs_kernels
@pytest.mark.parametrize('case', ['1x1', '1x3'])
def test_closed_output_gates_have_a_gradient(case, way):
    tensors, conv_args = make_inputs(*CASES[case])
    tensors['out_attn'][:, ::2] = 0
    check(tensors, conv_args, tolerance=1e-5)


@runs_kernels
@pytest.mark.parametrize('case', ['1x1', '1x3'])
def test_memory_formats(case, way):
    tensors, conv_args = make_inputs(*CASES[case])
    plain, grad_y = triton_results(tensors, conv_args)
    for name in ('x', 'weight'):
        tensors[name] = tensors[name].contiguous(memory_format=torch.channels_last)
    tensors['in_attn'] = tensors['in_attn'].T.contiguous().T
    channels_last, _ = triton_results(tensors, conv_args, grad_y)
    for results in plain, channels_last:
        assert results['y'].is_contiguous(memory_format=torch.channels_last)
        assert results['x'].is_contiguous(memory_format=torch.channels_last)
    assert plain['weight'].is_contiguous()
    assert channels_last['weight'].stride() == tensors['weight'].stride()
    for name, expected in plain.items():
        torch.testing.assert_close(channels_last[name], expected, rtol=0, atol=0)


@runs_kernels
def test_float32_kernels_beside_half_precision_images(way):
    tensors, conv_args = make_inputs(*CASES['1x3'])
    tensors['x'] = tensors['x'].bfloat16()
    results = check(tensors, conv_args, tolerance=2e-2)  # the images have 8 bits of mantissa
    assert results['y'].dtype == results['x'].dtype == torch.bfloat16
    assert results['weight'].dtype == torch.float32


@runs_kernels
def test_only_the_gradients_that_are_needed(way):
    from fmd_timm.ops.triton_conv import dynamic_conv2d_triton_backward
    tensors, conv_args = make_inputs(*CASES['1x3'])
    everything, grad_y = triton_results(tensors, conv_args)
    for needed in NAMES:
        grads = dynamic_conv2d_triton_backward(
            grad_y, **tensors, **conv_args, needs=tuple(name == needed for name in NAMES))
        assert [grad is not None for grad in grads] == [name == needed for name in NAMES]
        torch.testing.assert_close(grads[NAMES.index(needed)], everything[needed], rtol=0, atol=0)


@runs_kernels
@pytest.mark.parametrize('case', ['1x1', '1x3'])
def test_an_image_does_not_depend_on_its_batch(case, way):
    tensors, conv_args = make_inputs(*CASES[case])
    together, grad_y = triton_results(tensors, conv_args)
    alone, _ = triton_results(
        {name: t if name == 'weight' else t[1:2] for name, t in tensors.items()}, conv_args, grad_y[1:2])
    for name in set(alone) - {'weight'}:
        torch.testing.assert_close(alone[name], together[name][1:2])


@runs_kernels
@pytest.mark.parametrize('case', ['1x1', '1x3'])
def test_empty_batch_has_the_right_shape_and_zero_gradients(case, way):
    tensors, conv_args = make_inputs(*CASES[case])
    empty = {name: t if name == 'weight' else t[:0] for name, t in tensors.items()}
    results, _ = triton_results(empty, conv_args)
    assert results['y'].shape == (0, *triton_results(tensors, conv_args)[0]['y'].shape[1:])
    assert all(results[name].shape == t.shape and not results[name].any() for name, t in empty.items())


@runs_kernels
@pytest.mark.parametrize('kernel, size', [
    ((1, 3), (6, 6)), ((1, 3), (9, 8)), ((1, 3), (16, 16)), (1, (16, 17)),  # both sizes of fused, both materialised
], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_the_rules(kernel, size, dtype):
    padding = 0 if kernel == 1 else (0, 1)
    tensors, conv_args = make_inputs(3, 3, 33, 66, kernel, 1, padding, 1, size, dtype)
    check(tensors, conv_args, tolerance=1e-5 if dtype == torch.float32 else 2e-2)
