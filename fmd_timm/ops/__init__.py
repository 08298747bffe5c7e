"""The operator behind every dynamic convolution.

`reference.py` is the definition; faster implementations have a file each beside it. PyTorch's dispatcher chooses the
device, `cpu.py` and `cuda.py` hold the rules that choose among the device's. PyTorch sees one operator with its
gradients, `torch.ops.fmd_timm.dynamic_conv2d`, which importing this package registers: what `torch.compile` and
`torch.export` make of a network holds for any batch.
"""
import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import cpu, cuda, reference
from .layout import memory_format

__all__ = ['dynamic_conv2d']

ARGUMENTS = (
    'Tensor x, Tensor weight, Tensor? kernel_attn, Tensor? in_attn, Tensor? out_attn, Tensor? tap_attn, Tensor? bias, '
    'int[2] stride, int[2] padding, int[2] dilation, int groups'
)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def dynamic_conv2d(
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor | None,
        in_attn: Tensor | None = None,
        out_attn: Tensor | None = None,
        tap_attn: Tensor | None = None,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
) -> Tensor:
    """Convolve every image with its own mixture of K kernels.

        y_b = out_attn[b] * (conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k)
                             + sum_k kernel_attn[b, k] bias_k)

    Differentiable in every tensor. An attention that is None is 1 everywhere.

    Args:
        x: Images (B, C_in, H, W); B may be 0. Under autocast it is cast to autocast's dtype, and the kernels are mixed
            in the dtype of `weight`.
        weight: The K kernels, one after the other: (K * C_out, C_in / groups, kh, kw).
        kernel_attn: Share of each kernel (B, K); None for a single kernel.
        in_attn: Factor of each input channel (B, C_in).
        out_attn: Factor of each output channel (B, C_out).
        tap_attn: Factor of each kernel tap (B, kh * kw), the same for all channels and kernels.
        bias: The K biases, one after the other: (K * C_out,). Mixed as the kernels are.
        stride: Pixels, as in `torch.nn.functional.conv2d`.
        padding: Pixels of zeros on each side.
        dilation: Pixels between kernel taps.
        groups: Blocked connections from input to output channels.

    Returns:
        (B, C_out, H', W') in the dtype of `x` (autocast's under autocast), channels_last if `x` is.

    Raises:
        ValueError: The shape of an argument does not fit the others; the message names it.
    """
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    if not torch.jit.is_scripting():
        _check_shapes(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, groups)
        if _autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
    return torch.ops.fmd_timm.dynamic_conv2d(
        x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, s, p, d, groups)


def _autocasts(x: Tensor) -> bool:
    if x.is_meta:  # a device without autocast
        return False
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _check_shapes(
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor | None,
        in_attn: Tensor | None,
        out_attn: Tensor | None,
        tap_attn: Tensor | None,
        bias: Tensor | None,
        groups: int,
) -> None:
    if x.ndim != 4:
        raise ValueError(f'x must have shape (B, C_in, H, W), got {tuple(x.shape)}')
    if weight.ndim != 4:
        raise ValueError(f'weight must have shape (K * C_out, C_in / groups, kh, kw), got {tuple(weight.shape)}')
    B, I = x.shape[:2]
    if weight.shape[1] * groups != I:
        taken = weight.shape[1] * groups
        raise ValueError(f'weight {tuple(weight.shape)} with groups={groups} takes {taken} channels, got {I}')
    if kernel_attn is not None and (kernel_attn.ndim != 2 or kernel_attn.shape[0] != B):
        raise ValueError(f'kernel_attn must have shape ({B}, K), got {tuple(kernel_attn.shape)}')
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    if K < 1 or weight.shape[0] % (K * groups):
        raise ValueError(f'weight must hold {K} kernels of a multiple of {groups} channels, got {weight.shape[0]} rows')
    O, taps = weight.shape[0] // K, weight.shape[2] * weight.shape[3]
    for name, attn, size in ('in_attn', in_attn, I), ('out_attn', out_attn, O), ('tap_attn', tap_attn, taps):
        if attn is not None and tuple(attn.shape) != (B, size):
            raise ValueError(f'{name} must have shape ({B}, {size}), got {tuple(attn.shape)}')
    if bias is not None and tuple(bias.shape) != (K * O,):
        raise ValueError(f'bias must have shape ({K * O},), got {tuple(bias.shape)}')


def _output_size(x, weight, kernel_attn, stride, padding, dilation) -> tuple[int, int, int, int]:
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.shape[0], weight.shape[0] // K, height, width


@torch.library.custom_op('fmd_timm::dynamic_conv2d', mutates_args=(), schema=f'({ARGUMENTS}) -> Tensor')
def _forward(x, *args):
    return _forward_by(reference, x, *args)


@_forward.register_kernel('cpu')
def _(x, *args):
    return _forward_by(cpu, x, *args)


@_forward.register_kernel('cuda')
def _(x, *args):
    return _forward_by(cuda, x, *args)


def _forward_by(implementation, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, *conv_args) -> Tensor:
    if x.shape[0] == 0:
        size = _output_size(x, weight, kernel_attn, *conv_args[:3])
        return x.new_empty(size).contiguous(memory_format=memory_format(x))
    # x has autocast's dtype by now; the mixing, a matmul, is to keep that of the kernels.
    with torch.autocast(x.device.type, enabled=False):
        y = implementation.forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, *conv_args)
    return y.contiguous(memory_format=memory_format(x))


@_forward.register_fake
def _(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups):
    size = _output_size(x, weight, kernel_attn, stride, padding, dilation)
    return x.new_empty(size).contiguous(memory_format=memory_format(x))


# The gradient of an argument that is None is an empty tensor: an operator can't return None.
@torch.library.custom_op(
    'fmd_timm::dynamic_conv2d_backward', mutates_args=(),
    schema=f'(Tensor grad_y, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
)
def _backward(grad_y, *args):
    return _backward_by(reference, grad_y, *args)


@_backward.register_kernel('cpu')
def _(grad_y, *args):
    return _backward_by(cpu, grad_y, *args)


@_backward.register_kernel('cuda')
def _(grad_y, *args):
    return _backward_by(cuda, grad_y, *args)


def _backward_by(implementation, grad_y, *args) -> tuple[Tensor, ...]:
    x, tensors = args[0], args[:7]
    if x.shape[0] == 0:
        return tuple(x.new_empty(0) if t is None else torch.zeros_like(t) for t in tensors)
    with torch.autocast(x.device.type, enabled=False):
        gradients = implementation.backward(grad_y, *args)
    return tuple(x.new_empty(0) if t is None else _laid_out_as(g, t) for g, t in zip(gradients, tensors))


@_backward.register_fake
def _(grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups):
    tensors = x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in tensors)


def _laid_out_as(gradient: Tensor, tensor: Tensor) -> Tensor:
    """In the dtype and strides of the tensor, which DistributedDataParallel expects of a parameter's gradient."""
    like = torch.empty_like(tensor)
    if gradient.dtype == like.dtype and gradient.stride() == like.stride():
        return gradient
    return like.copy_(gradient)


def _save_inputs(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.conv_args = inputs[7:]


def _differentiate(ctx, grad_y):
    gradients = torch.ops.fmd_timm.dynamic_conv2d_backward(grad_y, *ctx.saved_tensors, *ctx.conv_args)
    wanted = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad))
    return *wanted, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save_inputs)


@register_flop_formula(torch.ops.fmd_timm.dynamic_conv2d)
def _flops(x_shape, weight_shape, kernel_attn_shape, *args, out_shape=None, **kwargs) -> int:
    """Of the definition, whatever implementation runs: K kernels mixed and one convolution for every image."""
    K = 1 if kernel_attn_shape is None else kernel_attn_shape[1]
    B, O, height, width = out_shape
    kernel = O * weight_shape[1] * weight_shape[2] * weight_shape[3]
    mixing = 0 if K == 1 else K * kernel
    return 2 * B * (mixing + kernel * height * width)
