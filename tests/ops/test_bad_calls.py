"""No call of the operator crashes the process or reads foreign memory: it is right, or refused in words."""
import random

import pytest
import torch

from fmd_timm import dynamic_conv2d
from fmd_timm.ops import reference
from fmd_timm.ops.case import Attention, case_of

TENSORS = 'x', 'weight', 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn'
NUMBERS = -(2**62), -1, 0, 1, 2, 3, 7, 1000, 2**31, 2**62
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn
REFUSALS = ValueError, RuntimeError, TypeError, OverflowError, NotImplementedError


def good_call(rng: random.Random) -> dict:
    """Arguments of a small convolution, some of the sizes that C takes."""
    B, K, groups = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([1, 1, 1, 2])
    I, O = groups * rng.choice([1, 3, 16, 32]), groups * rng.choice([1, 5, 32])
    kh, kw = rng.choice([(1, 1), (3, 3), (1, 3), (5, 5)])
    shapes = dict(
        x=(B, I, rng.randint(1, 9), rng.randint(1, 9)), weight=(K * O, I // groups, kh, kw), kernel_attn=(B, K),
        in_attn=(B, I), out_attn=(B, O), tap_attn=(B, kh * kw))
    call = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name in 'in_attn', 'out_attn', 'tap_attn':
        if rng.random() < 0.3:
            call[name] = None
    if rng.random() < 0.5:
        for name in 'x', 'weight':
            call[name] = call[name].to(memory_format=torch.channels_last)
    stride, padding, dilation = ([rng.choice(numbers), rng.choice(numbers)] for numbers in ([1, 2], [0, 1, 2], [1, 2]))
    return dict(call, stride=stride, padding=padding, dilation=dilation, groups=groups)


def spoil(call: dict, rng: random.Random) -> None:
    """Change one argument into something that may not fit."""
    name = rng.choice(list(call))
    value = call[name]
    if name == 'groups':
        call[name] = rng.choice(NUMBERS)
    elif isinstance(value, list):
        value[rng.randrange(len(value))] = rng.choice(NUMBERS)
        if rng.random() < 0.1:
            call[name] = value[:1] if rng.random() < 0.5 else value + value
    elif value is None:
        call[name] = torch.rand(rng.randint(0, 4), rng.randint(0, 40))
    elif value.layout == torch.strided and not value.is_meta:
        kind = rng.choice(['size', 'rank', 'dtype', 'device', 'layout', 'none', 'expanded'])
        if kind == 'size':
            shape = list(value.shape)
            shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 5, 64, 4096])
            call[name] = torch.randn(shape)
        elif kind == 'rank':
            call[name] = value.flatten(rng.randrange(value.ndim)) if rng.random() < 0.5 else value[None]
        elif kind == 'dtype':
            call[name] = value.to(rng.choice(DTYPES))
        elif kind == 'device':
            call[name] = value.to('meta')
        elif kind == 'layout':
            call[name] = value.to_sparse()
        elif kind == 'expanded':
            call[name] = torch.randn(1, *value.shape[1:]).expand(rng.choice([1, 2, 20000]), *value.shape[1:])
        else:
            call[name] = None


def expected(call: dict) -> torch.Tensor:
    """By the definition, in float64."""
    x, weight, *attention = (None if call[name] is None else call[name].double() for name in TENSORS)
    attention = Attention(*attention)
    conv_args = call['stride'], call['padding'], call['dilation'], call['groups']
    return reference.forward(x, weight, attention, case_of(x, weight, attention, *conv_args))


def check_call(call: dict, rng: random.Random) -> str:
    tensors = [call[name] for name in TENSORS]
    conv_args = call['stride'], call['padding'], call['dilation'], call['groups']
    try:
        if rng.random() < 0.5:
            y = torch.ops.fmd_timm.dynamic_conv2d(*tensors, *conv_args)
        else:
            y = dynamic_conv2d(*tensors, None, *conv_args)
    except REFUSALS as error:
        assert str(error)
        if rng.random() < 0.3:  # the backward operator can be called with the same
            grad_y = torch.randn(rng.choice([(1, 1, 1, 1), (2, 5, 4, 4)]))
            with pytest.raises(REFUSALS):
                torch.ops.fmd_timm.dynamic_conv2d_backward(grad_y, *tensors, *conv_args)
        return 'refused'
    if y.is_meta or y.numel() == 0:
        return 'empty'
    true = expected(call)
    assert y.shape == true.shape
    tolerance = 1e-4 if call['x'].dtype == call['weight'].dtype == torch.float32 else 3e-2
    assert (y.double() - true).abs().max() <= tolerance * true.abs().max() + 1e-12
    return 'right'


@pytest.mark.parametrize('seed', [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40))])
def test_a_call_is_right_or_refused(seed):
    rng, outcomes = random.Random(seed), []
    torch.manual_seed(seed)
    for _ in range(1000):
        call = good_call(rng)
        for _ in range(rng.choice([0, 1, 1, 2])):
            spoil(call, rng)
        outcomes.append(check_call(call, rng))
    assert outcomes.count('refused') > 200 and outcomes.count('right') > 200


@pytest.mark.parametrize('change, message', [
    (dict(weight=torch.zeros(24, 4096, 3, 3)), 'takes 4096 channels, got 4'),
    (dict(kernel_attn=torch.zeros(1, 4)), r'kernel_attn must have shape \(2, K\), got \(1, 4\)'),
    (dict(stride=[0, 1]), r'stride must be two numbers from 1 to .*, got \(0, 1\)'),
    (dict(padding=[-1, 0]), r'padding must be two numbers from 0 to .*, got \(-1, 0\)'),
    (dict(dilation=[1, 0]), r'dilation must be two numbers from 1 to .*, got \(1, 0\)'),
    (dict(groups=0), 'groups must be at least 1, got 0'),
    (dict(weight=torch.zeros(24, 4, 3, 3, device='meta')), 'weight must be on cpu like x, got meta'),
    (dict(weight=None), 'weight must be a tensor, got None'),
    (dict(x=torch.zeros(2, 4, 7, 5).int()), 'x must be float32, float64, float16 or bfloat16, got torch.int32'),
    (dict(x=torch.zeros(2, 4, 2, 2)), 'x of 2x2 pixels with padding=.0, 0. is smaller than a kernel of 3x3 taps'),
    (dict(in_attn=torch.zeros(2, 4).to_sparse()), 'in_attn must be a strided tensor, got torch.sparse_coo'),
])
def test_the_registered_operator_names_what_does_not_fit(change, message):
    call = dict(
        x=torch.zeros(2, 4, 7, 5), weight=torch.zeros(24, 4, 3, 3), kernel_attn=torch.zeros(2, 4), in_attn=None,
        out_attn=None, tap_attn=None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], groups=1)
    for operator in torch.ops.fmd_timm.dynamic_conv2d, dynamic_conv2d:
        values = list(dict(call, **change).values())
        if operator is dynamic_conv2d:
            values.insert(6, None)  # the bias
        with pytest.raises(ValueError, match=message):
            operator(*values)


def test_the_gradient_of_another_result_is_refused():
    x, weight = torch.zeros(2, 4, 7, 5), torch.zeros(24, 4, 3, 3)
    right = torch.zeros(2, 24, 5, 3)
    for grad_y in torch.zeros(2, 24, 5, 4), right.double(), right.to('meta'):
        with pytest.raises(ValueError, match=r'grad_y must have shape, dtype, device and layout \(\(2, 24, 5, 3\)'):
            torch.ops.fmd_timm.dynamic_conv2d_backward(
                grad_y, x, weight, None, None, None, None, [1, 1], [0, 0], [1, 1], 1)
