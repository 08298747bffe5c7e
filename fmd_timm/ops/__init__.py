"""The operator behind every dynamic convolution.

`reference.py` is its definition, and each algorithm has a file of its own. `cpu.py` and `cuda.py` say which ones are
tried in which order, `fastest.py` takes one; other devices have `per_image.py` alone. Importing this package registers
the operator with PyTorch.
"""
import torch
from torch import Tensor

from . import operator  # registers it
from .decomposition import decompose, decompositions

__all__ = ['decompositions', 'dynamic_conv2d', 'mixed_bias']


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
        ValueError: An argument is of the wrong shape, dtype, device or range; the message names it.
    """
    s, p, d = _pair(stride), _pair(padding), _pair(dilation)
    if torch.jit.is_scripting():
        y = torch.ops.fmd_timm.dynamic_conv2d(
            x, weight, kernel_attn, in_attn, out_attn, tap_attn, s, p, d, groups)
    else:
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
            rows = tuple(weight.shape[:1])
            raise ValueError(f'bias must have shape {rows}, got {tuple(bias.shape)}; and be float, got {bias.dtype}')
        if isinstance(x, Tensor) and _autocasts(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        tensors = x, weight, kernel_attn, in_attn, out_attn, tap_attn
        operator.refuse_forward_mode(*tensors)
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # by TorchScript, which reads no table
            run = decompose
        else:
            run = operator.forward if operator.is_plain(*tensors) else torch.ops.fmd_timm.dynamic_conv2d
        y = run(*tensors, s, p, d, groups)
    if bias is None:
        return y
    return y + mixed_bias(bias, kernel_attn, out_attn).to(y.dtype)[:, :, None, None]


def mixed_bias(bias: Tensor, kernel_attn: Tensor | None, out_attn: Tensor | None) -> Tensor:
    """(B or 1, C_out), times out_attn. Not a product of matrices: autocast would make that half-precision."""
    mixed = bias[None]
    if kernel_attn is not None:
        mixed = (kernel_attn.to(bias.dtype)[:, :, None] * bias.reshape(kernel_attn.shape[1], -1)).sum(1)
    return mixed if out_attn is None else mixed * out_attn.to(bias.dtype)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f'stride, padding and dilation must each be one number or two, got {value}')
    return value[0], value[1]


def _autocasts(x: Tensor) -> bool:
    if x.is_meta:  # a device without autocast
        return False
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
