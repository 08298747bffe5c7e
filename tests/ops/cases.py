"""Inputs of single algorithms, what they give by name, and the reference in float64."""
import torch

from fmd_timm.ops import reference
from fmd_timm.ops.case import Attention, case_of


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def make_inputs(
        B, K, I, O, kernel, stride, padding, dilation, size, groups=1, dtype=torch.float32, weight_dtype=None,
        without=('tap_attn',), device='cpu'):
    """x, weight, attention and case; without `kernel_attn` it is a single kernel."""
    K = 1 if 'kernel_attn' in without else K
    h, w = pair(kernel)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, weight_dtype or dtype)

    gates = dict(
        kernel_attn=normal(B, K).softmax(1), in_attn=normal(B, I).sigmoid(), out_attn=normal(B, O).sigmoid(),
        tap_attn=normal(B, h * w).sigmoid())
    attention = Attention(**{name: None if name in without else gate for name, gate in gates.items()})
    x, weight = normal(B, I, *size).to(dtype), normal(K * O, I // groups, h, w)
    return x, weight, attention, case_of(x, weight, attention, *map(pair, (stride, padding, dilation)), groups)


def random_like(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def run(algorithm, x, weight, attention, case, grad_y=None):
    """The result and the gradients, by name."""
    y = algorithm.forward(x, weight, attention, case)
    grad_y = random_like(y) if grad_y is None else grad_y
    grad_x, grad_weight, gradients = algorithm.backward(grad_y, x, weight, attention, case)
    return dict(y=y, x=grad_x, weight=grad_weight, **gradients._asdict())


def run_reference(x, weight, attention, case, grad_y=None):
    """The same by the reference, in float64."""
    grad_y = random_like(x.new_empty(case.batch, case.out_channels, *case.output_size)) if grad_y is None else grad_y
    attention = Attention(*(t if t is None else t.double() for t in attention))
    inputs = x.double(), weight.double(), attention, case
    grad_x, grad_weight, gradients = differentiate_reference(grad_y.double(), *inputs)
    return dict(y=reference.forward(*inputs), x=grad_x, weight=grad_weight, **gradients._asdict())


def differentiate_reference(grad_y, x, weight, attention, case):
    """What `backward` of an algorithm gives, by PyTorch."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, *attention)]
    y = reference.forward(*leaves[:2], Attention(*leaves[2:]), case)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y))
    grad_x, grad_weight, *others = (t if t is None else next(gradients) for t in leaves)
    return grad_x, grad_weight, Attention(*others)


def assert_near(found, exact, tolerance):
    """Within a share of the norm of each tensor; NaN is not."""
    assert found.keys() <= exact.keys()
    for name, got in found.items():
        if exact[name] is None:
            assert got is None, name
            continue
        assert got.shape == exact[name].shape, name
        error, size = (got.double() - exact[name]).norm(), exact[name].norm()  # 0 if all taps see padding alone
        assert error <= tolerance * size, f'{name} is off by {error / size:.1e}'
