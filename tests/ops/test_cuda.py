"""The rules for CUDA and what happens without Triton; test_triton.py runs the algorithms they choose."""
import warnings
from pathlib import Path

import processes
import pytest
import torch

from fmd_timm.ops import cuda, reference

PLAIN = dict(B=128, I=256, O=256, K=4, kernel=3, size=14, stride=1, groups=1, taps=False, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch):
    monkeypatch.setattr(cuda, '_triton_failed', False)
    cuda._warn.cache_clear()


@pytest.mark.parametrize('change, forward, backward', [
    (dict(), 'fused', 'fused'),
    (dict(stride=2, size=28), 'fused', 'fused'),
    (dict(I=64, O=64, size=56), 'materialised', 'materialised'),
    (dict(I=64, O=64, size=56, taps=True), 'materialised', 'materialised'),
    (dict(I=64, kernel=1, size=56), 'pointwise', 'pointwise'),
    (dict(I=60, kernel=1, size=56), 'pointwise', 'pointwise'),
    (dict(I=64, kernel=1, size=112, stride=2), 'materialised', 'materialised'),
    (dict(I=512, O=512, size=7), 'per_kernel', 'fused'),  # backward, dense convolves three times
    (dict(I=512, O=512, size=7, taps=True), 'fused', 'fused'),
    (dict(B=1), 'single', 'reference'),
    (dict(B=1, size=7, taps=True), 'single', 'reference'),
    (dict(B=2), 'per_kernel', 'per_kernel'),  # too little work for a kernel of its own
    (dict(B=2, taps=True), 'fused', 'fused'),
    (dict(K=1), 'per_kernel', 'per_kernel'),
    (dict(K=1, taps=True), 'fused', 'fused'),
    (dict(K=8), 'fused', 'fused'),
    (dict(K=9), 'unsupported', 'unsupported'),
    (dict(I=255), 'unsupported', 'unsupported'),
    (dict(O=12, size=64), 'unsupported', 'unsupported'),
    (dict(groups=2), 'unsupported', 'unsupported'),
    (dict(groups=256), 'reference', 'reference'),
    (dict(dtype=torch.float16), 'fused', 'fused'),
    (dict(dtype=torch.float64), 'reference', 'reference'),
    (dict(dtype=torch.float32), 'fused', 'fused'),
    (dict(size=2**15, B=2), 'unsupported', 'unsupported'),  # offsets in an image beyond 32 bits
], ids=str)
def test_rules(change, forward, backward):
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert (chosen(change, False), chosen(change, True)) == (forward, backward)


def test_tf32_goes_to_cudnn():
    assert chosen(dict(dtype=torch.float32), False) == 'per_kernel'  # PyTorch's default for convolutions
    assert chosen(dict(dtype=torch.float32, taps=True), False) == 'fused'


def chosen(change, backward):
    case = dict(PLAIN, **change)
    B, I, K, O, kernel, size, stride = (case[name] for name in ('B', 'I', 'K', 'O', 'kernel', 'size', 'stride'))

    def empty(*shape):
        return torch.empty(shape, dtype=case['dtype'], device='meta')

    return cuda.choose(
        empty(B, I, size, size), empty(K * O, I // case['groups'], kernel, kernel), empty(B, K),
        empty(B, kernel**2) if case['taps'] else None, (stride, stride), (kernel // 2, kernel // 2),
        (size // stride)**2, case['groups'], backward)


def small_inputs(K=2, groups=1, pixels=4):
    torch.manual_seed(0)
    tensors = dict(
        x=torch.randn(2, 8, pixels, pixels), weight=torch.randn(K * 8, 8 // groups, 3, 3), kernel_attn=torch.rand(2, K),
        in_attn=torch.rand(2, 8), out_attn=torch.rand(2, 8), tap_attn=torch.rand(2, 9), bias=torch.randn(K * 8))
    return tensors, dict(stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=groups)


def assert_falls_back_with_one_warning(tensors, conv_args, message):
    with pytest.warns(UserWarning, match=message) as caught:
        for _ in range(2):
            y = cuda.forward(**tensors, **conv_args)
            gradients = cuda.backward(torch.ones_like(y), **tensors, **conv_args)
    assert len(caught) == 1
    torch.testing.assert_close(y, reference.forward(**tensors, **conv_args))
    expected = reference.backward(torch.ones_like(y), **tensors, **conv_args)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, value)


@pytest.mark.parametrize('change', [dict(groups=2), dict(K=9)], ids=str)
@pytest.mark.parametrize('taps', [False, True])
def test_an_unsupported_shape_falls_back_with_one_warning(change, taps):
    tensors, conv_args = small_inputs(**change)
    tensors = tensors if taps else dict(tensors, tap_attn=None)
    assert_falls_back_with_one_warning(tensors, conv_args, 'take groups = 1 or depthwise')


@pytest.mark.parametrize('name', ['CompilationError', 'OutOfResources'])
def test_a_kernel_that_does_not_compile_falls_back_with_one_warning(name, monkeypatch):
    pytest.importorskip('triton')
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from fmd_timm.ops import triton_conv
    error = {
        'CompilationError': CompilationError(None, None, 'a message'), 'OutOfResources': OutOfResources(9, 8, 'memory'),
    }[name]

    def fail(*args):
        raise error

    monkeypatch.setattr(triton_conv, 'convolve', fail)
    assert_falls_back_with_one_warning(*small_inputs(), f'Triton fails.*{name}')


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('full'), torch.AcceleratorError('illegal access')])
def test_an_error_that_is_not_of_triton_is_not_hidden(error, monkeypatch):
    pytest.importorskip('triton')
    from fmd_timm.ops import triton_conv

    def fail(*args):
        raise error

    monkeypatch.setattr(triton_conv, 'convolve', fail)
    tensors, conv_args = small_inputs()
    with pytest.raises(type(error)), warnings.catch_warnings():
        warnings.simplefilter('error')
        cuda.forward(**tensors, **conv_args)


def test_without_triton_everything_works_with_one_warning():
    script = (
        'import sys; sys.modules["triton"] = None\n'
        'import test_cuda\n'
        'test_cuda.assert_falls_back_with_one_warning(*test_cuda.small_inputs(), "Triton fails.*triton")\n'
    )
    run = processes.run('-c', script, cwd=Path(__file__).parent)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize('name', ['dynamic_conv2d', 'dynamic_conv2d_backward'])
def test_pytorch_dispatches_cuda_tensors_here(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'fmd_timm::{name}', 'CUDA')
