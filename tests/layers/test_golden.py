"""The authors' FMDConv2d and ODConv2d, run in float64 on float32 weights: outputs, gradients and BatchNorm statistics
must agree."""
import pytest
import torch
from inputs import GOLDEN_CASES, check_against_the_authors_code, load_case, make_conv

from fmd_timm import load_authors_state_dict


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('mode', ['eval', 'train'])
@pytest.mark.parametrize('name', GOLDEN_CASES)
def test_layer_equals_the_authors_code(name, mode, dtype, implementation):
    check_against_the_authors_code(name, mode, dtype)


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
