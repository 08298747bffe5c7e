"""The operator that PyTorch sees, `torch.ops.fmd_timm.dynamic_conv2d`, with its gradients, its shapes and its FLOPs.

It can be called by anybody, with anything: it checks its arguments itself. What `torch.compile` and `torch.export` make
of a network holds for any batch, whichever algorithm runs.
"""
import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from . import cpu, cuda, per_image
from .case import Attention, Case, case_of, empty_as, memory_format, output_size, used_taps
from .fastest import fastest

ARGUMENTS = (
    'Tensor x, Tensor weight, Tensor? kernel_attn, Tensor? in_attn, Tensor? out_attn, Tensor? tap_attn, '
    'int[2] stride, int[2] padding, int[2] dilation, int groups'
)
DTYPES = torch.float32, torch.float64, torch.float16, torch.bfloat16


def algorithms(question: str, case: Case) -> list:
    """Those that support the case, expected fastest first; each device has its order."""
    orders = {'cpu': cpu.algorithms, 'cuda': cuda.algorithms}
    return orders[case.device.type](question, case) if case.device.type in orders else [per_image]


def check(x: Tensor, weight: Tensor, attention: Attention, stride, padding, dilation, groups: int) -> None:
    """Refuse what no convolution can be computed of, or what algorithms would read foreign memory for.

    Raises:
        ValueError: Names the argument, what it is and what was expected.
    """
    for name, t in dict(x=x, weight=weight, **attention._asdict()).items():
        if t is None and name not in ('x', 'weight'):
            continue
        if not isinstance(t, Tensor):
            raise ValueError(f'{name} must be a tensor, got {t}')
        if t.dtype not in DTYPES:
            raise ValueError(f'{name} must be float32, float64, float16 or bfloat16, got {t.dtype}')
        if t.device != x.device:
            raise ValueError(f'{name} must be on {x.device} like x, got {t.device}')
        if t.layout != torch.strided:
            raise ValueError(f'{name} must be a strided tensor, got {t.layout}')
    for name, pair, least in ('stride', stride, 1), ('padding', padding, 0), ('dilation', dilation, 1):
        if len(pair) != 2 or not all(least <= number < 2**31 for number in pair):  # products of two fit 64 bits
            raise ValueError(f'{name} must be two numbers from {least} to 2**31 - 1, got {tuple(pair)}')
    if groups < 1:
        raise ValueError(f'groups must be at least 1, got {groups}')
    if x.ndim != 4 or min(x.shape[1:]) < 1:
        raise ValueError(f'x must have shape (B, C_in, H, W), got {tuple(x.shape)}')
    if weight.ndim != 4 or min(weight.shape) < 1:
        raise ValueError(f'weight must have shape (K * C_out, C_in / groups, kh, kw), got {tuple(weight.shape)}')
    B, I = x.shape[:2]
    if weight.shape[1] * groups != I:
        taken = weight.shape[1] * groups
        raise ValueError(f'weight {tuple(weight.shape)} with groups={groups} takes {taken} channels, got {I}')
    kernel_attn, in_attn, out_attn, tap_attn = attention
    if kernel_attn is not None and (kernel_attn.ndim != 2 or kernel_attn.shape[0] != B):
        raise ValueError(f'kernel_attn must have shape ({B}, K), got {tuple(kernel_attn.shape)}')
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    if K < 1 or weight.shape[0] % (K * groups):
        raise ValueError(f'weight must hold {K} kernels of a multiple of {groups} channels, got {weight.shape[0]} rows')
    O, taps = weight.shape[0] // K, weight.shape[2] * weight.shape[3]
    for name, attn, size in ('in_attn', in_attn, I), ('out_attn', out_attn, O), ('tap_attn', tap_attn, taps):
        if attn is not None and tuple(attn.shape) != (B, size):
            raise ValueError(f'{name} must have shape ({B}, {size}), got {tuple(attn.shape)}')
    if min(_result_size(x, weight, kernel_attn, stride, padding, dilation)[2:]) < 1:
        raise ValueError(
            f'x of {x.shape[2]}x{x.shape[3]} pixels with padding={tuple(padding)} is smaller than a kernel of '
            f'{weight.shape[2]}x{weight.shape[3]} taps with dilation={tuple(dilation)}')


def _result_size(x, weight, kernel_attn, stride, padding, dilation) -> tuple[int, int, int, int]:
    height, width = map(output_size, x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return x.shape[0], weight.shape[0] // (1 if kernel_attn is None else kernel_attn.shape[1]), height, width


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """PyTorch would drop the tangents of an operator that has no rule for them, without a word.

    Raises:
        NotImplementedError: A tensor has a tangent.
    """
    if forward_ad._current_level >= 0:
        if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError('dynamic_conv2d has no forward-mode derivative: use the backward pass')


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but the result is wanted: no gradient, no graph, no other dtype, no tensor without memory.

    Then the operator can be left out: PyTorch's dispatcher takes as long as a small convolution.
    """
    # First, because a compiler can't follow what comes after it.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not isinstance(x, Tensor):
        return False
    for t in x, *others:
        if t is not None and (
                type(t) not in (Tensor, Parameter) or t.is_neg() or t.requires_grad and torch.is_grad_enabled()):
            return False
    return not (
        is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
    )


def convolve(
        x: Tensor, weight: Tensor, attention: Attention, stride, padding, dilation, groups: int, algorithm=None,
) -> Tensor:
    """The result of the operator for checked arguments, B > 0; by the fastest algorithm where none is named."""
    case, weight, attention, _ = _narrowed(x, weight, attention, stride, padding, dilation, groups)
    if algorithm is None:
        algorithm = fastest(
            'forward', case, algorithms('forward', case), lambda tried: tried.forward(x, weight, attention, case))
    return algorithm.forward(x, weight, attention, case).contiguous(memory_format=memory_format(x))


def _narrowed(
        x, weight, attention, stride, padding, dilation, groups,
) -> tuple[Case, Tensor, Attention, tuple[slice, slice] | None]:
    """The case with the taps alone that meet the images, its kernels and attention, and which taps (None for all).

    The attention is in the dtype of the kernels, which are mixed in it. Those that are integers, which only prepared
    layers have, are mixed in that of the images.
    """
    dtype = weight.dtype if weight.is_floating_point() else x.dtype
    attention = Attention(*(t if t is None else t.to(dtype).contiguous() for t in attention))
    taps, stride, padding, dilation = zip(*map(used_taps, x.shape[2:], weight.shape[2:], stride, padding, dilation))
    if all(t.stop - t.start == size for t, size in zip(taps, weight.shape[2:])):
        return case_of(x, weight, attention, stride, padding, dilation, groups), weight, attention, None
    if attention.tap_attn is not None:
        by_tap = attention.tap_attn.unflatten(1, weight.shape[2:])
        attention = attention._replace(tap_attn=by_tap[(slice(None), *taps)].flatten(1).contiguous())
    weight = weight[(..., *taps)].contiguous(memory_format=memory_format(weight))
    return case_of(x, weight, attention, stride, padding, dilation, groups), weight, attention, taps


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Under autocast x has its dtype by now; the mixing, a matmul, is to keep that of the kernels."""
    if x.device.type != 'meta' and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, *conv_args) -> Tensor:
    """The operator without the dispatcher, where `is_plain`."""
    attention = Attention(kernel_attn, in_attn, out_attn, tap_attn)
    check(x, weight, attention, *conv_args)
    if x.shape[0] == 0:
        return _empty_result(x, weight, kernel_attn, conv_args)
    with _without_autocast(x):
        return convolve(x, weight, attention, *conv_args)


_forward = torch.library.custom_op(
    'fmd_timm::dynamic_conv2d', forward, mutates_args=(), schema=f'({ARGUMENTS}) -> Tensor')


@_forward.register_fake
def fake(x, weight, kernel_attn, in_attn, out_attn, tap_attn, *conv_args):
    """A result that is not computed: its size, dtype and layout alone."""
    check(x, weight, Attention(kernel_attn, in_attn, out_attn, tap_attn), *conv_args)
    return _empty_result(x, weight, kernel_attn, conv_args)


def _empty_result(x, weight, kernel_attn, conv_args) -> Tensor:
    return empty_as(x, *_result_size(x, weight, kernel_attn, *conv_args[:3]))


# The gradient of an argument that is None is an empty tensor: an operator can't return None.
@torch.library.custom_op(
    'fmd_timm::dynamic_conv2d_backward', mutates_args=(),
    schema=f'(Tensor grad_y, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _backward(grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, *conv_args):
    attention = Attention(kernel_attn, in_attn, out_attn, tap_attn)
    _check_backward(grad_y, x, weight, attention, conv_args)
    tensors = x, weight, *attention
    if x.shape[0] == 0:
        return tuple(x.new_empty(0) if t is None else torch.zeros_like(t) for t in tensors)
    with _without_autocast(x):
        gradients = _differentiate(grad_y, x, weight, attention, conv_args)
    return tuple(x.new_empty(0) if t is None else _laid_out_as(g, t) for g, t in zip(gradients, tensors))


def _check_backward(grad_y, x, weight, attention, conv_args) -> None:
    check(x, weight, attention, *conv_args)
    size = _result_size(x, weight, attention.kernel_attn, *conv_args[:3])
    found = tuple(grad_y.shape), grad_y.dtype, grad_y.device, grad_y.layout
    expected = size, x.dtype, x.device, x.layout
    if found != expected:
        raise ValueError(f'grad_y must have shape, dtype, device and layout {expected}, got {found}')


@_backward.register_fake
def _(grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, *conv_args):
    attention = Attention(kernel_attn, in_attn, out_attn, tap_attn)
    _check_backward(grad_y, x, weight, attention, conv_args)
    tensors = x, weight, *attention
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in tensors)


def _differentiate(grad_y, x, weight, attention, conv_args) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and the four of the attention."""
    case, used, used_attention, taps = _narrowed(x, weight, attention, *conv_args)
    algorithm = fastest(
        'backward', case, algorithms('backward', case),
        lambda tried: tried.backward(grad_y, x, used, used_attention, case))
    grad_x, grad_weight, gradients = algorithm.backward(grad_y, x, used, used_attention, case)
    if taps is None:
        return grad_x, grad_weight, *gradients
    whole = torch.zeros_like(weight)
    whole[(..., *taps)] = grad_weight
    if attention.tap_attn is not None:
        of_taps = weight.new_zeros(attention.tap_attn.shape)
        of_taps.unflatten(1, weight.shape[2:])[(slice(None), *taps)] = gradients.tap_attn.unflatten(1, case.kernel_size)
        gradients = gradients._replace(tap_attn=of_taps)
    return grad_x, whole, *gradients


def _laid_out_as(gradient: Tensor, tensor: Tensor) -> Tensor:
    """In the dtype and strides of the tensor, which DistributedDataParallel expects of a parameter's gradient."""
    like = torch.empty_like(tensor)
    if gradient.dtype == like.dtype and gradient.stride() == like.stride():
        return gradient
    return like.copy_(gradient)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.conv_args = inputs[6:]


def _autograd(ctx, grad_y):
    gradients = torch.ops.fmd_timm.dynamic_conv2d_backward(grad_y, *ctx.saved_tensors, *ctx.conv_args)
    wanted = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad))
    return *wanted, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_save_inputs)


def flops(x_shape, weight_shape, kernel_attn_shape, *args, out_shape=None, **kwargs) -> int:
    """Of the definition, whatever algorithm runs: K kernels mixed and one convolution for every image."""
    K = 1 if kernel_attn_shape is None else kernel_attn_shape[1]
    B, O, height, width = out_shape
    kernel = O * weight_shape[1] * weight_shape[2] * weight_shape[3]
    mixing = 0 if K == 1 else K * kernel
    return 2 * B * (mixing + kernel * height * width)


register_flop_formula(torch.ops.fmd_timm.dynamic_conv2d)(flops)
