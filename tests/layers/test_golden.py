"""The authors' FMDConv2d and ODConv2d, run in float64 on float32 weights: outputs, gradients and BatchNorm statistics
must agree."""
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmd_timm import FMDConv2d, ODConv2d, load_authors_state_dict, set_temperature

GOLDEN = Path(__file__).parent / 'golden'
CASES = sorted(path.stem for path in GOLDEN.glob('*.json'))
RTOL = {torch.float64: 1e-9, torch.float32: 1e-4}


def load_case(name):
    meta = json.loads((GOLDEN / f'{name}.json').read_text())
    return meta, load_file(GOLDEN / f'{name}.safetensors')


def make_conv(case, dtype):
    sizes = (
        case['in_planes'], case['out_planes'], case['kernel_size'], case['stride'], case['padding'], case['dilation'],
        case['groups'],
    )
    args = dict(num_kernels=case['kernel_num'], reduction=case['reduction'], dtype=dtype)
    if case['kind'] == 'od':
        return ODConv2d(*sizes, bias=False, **args)  # theirs has no bias
    return FMDConv2d(*sizes, case['bias'], kernel_ratio=case['ratio'], **args)


def load_theirs(conv, tensors, prefix):
    theirs = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    load_authors_state_dict(conv, theirs)


def assert_close(actual, expected, dtype):
    """Relative to the largest value: rounding leaves small differences of large numbers without relative accuracy."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    assert error < RTOL[dtype], f'relative error {error:.1e}'


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('name', CASES)
def test_layer_equals_the_authors_code(name, mode, dtype, implementation):
    meta, golden = load_case(name)
    if 'raises' in meta['modes'][mode]:
        pytest.skip('the authors code raises on this case (a training batch of one image); ours has its own test')
    conv = make_conv(meta['case'], dtype)
    load_theirs(conv, golden, 'state.')
    set_temperature(conv, kernel=meta['temperature']['kernel'], gate=meta['temperature']['sigmoid'])
    conv.train(mode == 'train')

    x = golden['input'].to(dtype).requires_grad_()
    y = conv(x)
    (y * golden['probe'].to(dtype)).sum().backward()

    assert_close(y, golden[f'{mode}.output'], dtype)
    assert_close(x.grad, golden[f'{mode}.grad_input'], dtype)
    if mode == 'train':
        for buffer in 'running_mean', 'running_var':
            assert_close(getattr(conv.attention.bn, buffer), golden[f'train.buffer.attention.bn.{buffer}'], dtype)
    # The same conversion as for the weights puts the authors' gradients in our order; buffers have none.
    gradients = {key: t for key, t in golden.items() if key.startswith(f'{mode}.grad.')}
    for buffer in 'running_mean', 'running_var', 'num_batches_tracked':
        gradients[f'{mode}.grad.attention.bn.{buffer}'] = golden[f'state.attention.bn.{buffer}']
    expected = make_conv(meta['case'], torch.float64)
    load_theirs(expected, gradients, f'{mode}.grad.')
    for parameter, gradient in zip(conv.parameters(), expected.parameters(), strict=True):
        assert_close(parameter.grad, gradient.detach(), dtype)


def test_missing_and_unexpected_keys_are_named_and_nothing_is_loaded():
    meta, golden = load_case('fmd_3x3')
    state = {key.removeprefix('state.'): tensor for key, tensor in golden.items() if key.startswith('state.')}
    conv = make_conv(meta['case'], torch.float32)
    before = {key: tensor.clone() for key, tensor in conv.state_dict().items()}
    state['attention.fcc.weight'] = state.pop('attention.fc.weight')
    with pytest.raises(ValueError, match=r"missing keys \['attention.fc.weight'\].*\['attention.fcc.weight'\]"):
        load_authors_state_dict(conv, state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in conv.state_dict().items())


def test_a_wrong_shape_is_named():
    meta, golden = load_case('fmd_3x3')
    state = {key.removeprefix('state.'): tensor for key, tensor in golden.items() if key.startswith('state.')}
    conv = make_conv(dict(meta['case'], kernel_num=2), torch.float32)
    with pytest.raises(ValueError, match=r'weight is \(4, 24, 16, 3, 3\), expected \(2, 24, 16, 3, 3\)'):
        load_authors_state_dict(conv, state)
