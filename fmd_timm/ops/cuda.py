"""Dynamic convolution on CUDA: the rules that choose its algorithm, and what the algorithms in Triton share.

Not yet measured on a GPU: every number in the rules is an estimate from the bandwidth and arithmetic of an H200.
"""
import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from . import per_kernel, reference

__all__ = ['choose', 'forward', 'backward']

MATERIALISE_ABOVE = 250  # output pixels from which a mixed kernel costs less to write and read than to mix repeatedly
DENSE_UP_TO = 64  # output pixels at which K convolutions by cuDNN cost as much as mixing repeatedly
FEW_RESULTS = 2**20  # numbers in the result below which the programs of a Triton kernel leave half of the GPU idle
DTYPES = torch.float32, torch.bfloat16, torch.float16
PYTORCH = {'reference': reference, 'per_kernel': per_kernel}  # the others need Triton

_triton_failed = False


def choose(x, weight, kernel_attn, tap_attn, stride, padding, out_pixels: int, groups, backward: bool) -> str:
    """The first rule that fits images with `out_pixels` = H' * W' results per channel.

    'reference': one grouped convolution by cuDNN.
    'per_kernel': one convolution with all K kernels by cuDNN, `per_kernel.py`.
    'single': the mixed kernel of the only image, then cuDNN.
    'pointwise': mixed kernels, then cuBLAS, `pointwise.py`.
    'materialised', 'fused': `triton_conv.py` for the images, `triton_weight_grad.py` for the kernels.
    'unsupported': a fallback to 'per_kernel' or 'reference', with a warning.
    """
    B, I = x.shape[:2]
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    O = weight.shape[0] // K
    if x.dtype not in DTYPES:
        return 'reference'  # float64 is for checks
    if K == 1 and tap_attn is None:
        return 'per_kernel'  # one kernel for all images: an ordinary convolution
    if groups > 1 and weight.shape[1] == 1:
        return 'reference'  # a depthwise convolution of B * C channels
    if groups > 1 or K > 8 or max(weight.numel(), x.numel() // B, O * out_pixels) >= 2**30:  # offsets of 32 bits
        return 'unsupported'
    if x.dtype == torch.float32 and tap_attn is None and torch.backends.cudnn.conv.fp32_precision == 'tf32':
        return 'per_kernel'  # the kernels in Triton multiply float32 in full, slower than K convolutions in TF32
    if B == 1:
        return 'reference' if backward else 'single'
    if B * O * out_pixels < FEW_RESULTS and tap_attn is None:
        return 'per_kernel'
    pointwise = tuple(weight.shape[2:]) == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    if out_pixels > MATERIALISE_ABOVE and pointwise:
        return 'pointwise'
    if I % 8 or O % 8:  # rows of channels that start anywhere: the compiler spills registers
        return 'unsupported'
    if out_pixels > MATERIALISE_ABOVE:
        return 'materialised'
    if out_pixels <= DENSE_UP_TO and tap_attn is None and not backward:  # backward it would convolve three times
        return 'per_kernel'
    return 'fused'


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0."""
    tensors = x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias
    out_pixels = 1
    for size, taps, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation):
        out_pixels *= (size + 2 * p - d * (taps - 1) - 1) // s + 1
    algorithm = choose(x, weight, kernel_attn, tap_attn, stride, padding, out_pixels, groups, backward=False)
    if algorithm not in PYTORCH:
        y = _by_triton(_triton_forward, algorithm, *tensors, stride, padding, dilation)
        if y is not None:
            return y
        algorithm = _fallback(kernel_attn, tap_attn, out_pixels, groups)
    return PYTORCH[algorithm].forward(*tensors, stride, padding, dilation, groups)


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None."""
    tensors = x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias
    out_pixels = grad_y.shape[2] * grad_y.shape[3]
    algorithm = choose(x, weight, kernel_attn, tap_attn, stride, padding, out_pixels, groups, backward=True)
    if algorithm not in PYTORCH:
        gradients = _by_triton(_triton_backward, algorithm, grad_y, *tensors, stride, padding, dilation)
        if gradients is not None:
            return gradients
        algorithm = _fallback(kernel_attn, tap_attn, out_pixels, groups)
    return PYTORCH[algorithm].backward(grad_y, *tensors, stride, padding, dilation, groups)


def _fallback(kernel_attn, tap_attn, out_pixels: int, groups: int) -> str:
    """Up to 122 pixels K convolutions move fewer bytes than a mixed kernel for every image, by the estimates above."""
    return 'per_kernel' if groups == 1 and tap_attn is None and out_pixels <= 122 else 'reference'


def _by_triton(function, algorithm: str, *args):
    """The result, or None where Triton can't give it."""
    global _triton_failed
    if algorithm == 'unsupported':
        _warn(
            'its kernels for CUDA take groups = 1 or depthwise, up to 8 kernels and channels in multiples of 8, '
            'other convolutions run slower')
        return None
    if _triton_failed:
        return None
    try:
        with torch.cuda.device_of(args[0]):
            return function(algorithm, *args)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # Triton that is missing or of another version, a GPU it can't compile for, no compiler for its launchers, ...
    except Exception as error:
        _triton_failed = True
        _warn(f'Triton fails, it runs slower without from now on ({type(error).__name__}: {error})')
        return None


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(f'dynamic_conv2d: {message}', stacklevel=2)


def _triton_forward(algorithm, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, *conv_args) -> Tensor:
    from . import pointwise, triton_conv, triton_mix  # here, so that all else works without Triton
    x, weight = _channels_last(x), _channels_last(weight)
    attns = _attentions(x, kernel_attn, in_attn, out_attn, tap_attn)
    kernel_attn, in_attn, out_attn, tap_attn = attns
    mixed_bias = None if bias is None else kernel_attn @ bias.float().reshape(kernel_attn.shape[1], -1)  # (B, O)
    if algorithm == 'single':
        kernel = triton_mix.mix_kernels(weight, *attns, x.dtype)[0].permute(0, 3, 1, 2)  # (O, I, kh, kw), channels_last
        if mixed_bias is not None:
            mixed_bias = (mixed_bias if out_attn is None else mixed_bias * out_attn)[0].to(x.dtype)
        return F.conv2d(x, kernel, mixed_bias, *conv_args)
    if algorithm == 'pointwise':
        return pointwise.forward(x, weight, *attns, mixed_bias)
    return triton_conv.convolve(x, weight, *attns, mixed_bias, *conv_args, algorithm == 'materialised')


def _triton_backward(
        algorithm, grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, *conv_args,
) -> tuple[Tensor | None, ...]:
    from . import pointwise, triton_conv, triton_weight_grad
    grad_y, x, weight = _channels_last(grad_y), _channels_last(x), _channels_last(weight)
    attns = share, _, out_gate, _ = _attentions(x, kernel_attn, in_attn, out_attn, tap_attn)
    if algorithm == 'pointwise':
        grad_x, grad_weight, grad_share, grad_in, grad_out, grad_taps = pointwise.backward(grad_y, x, weight, *attns)
    else:
        grad_x, grad_in = triton_conv.image_gradient(
            grad_y, x, weight, *attns, *conv_args, algorithm == 'materialised')
        grad_weight, grad_share, grad_out, grad_taps = triton_weight_grad.weight_gradient(
            grad_y, x, weight, *attns, *conv_args)
    grad_bias = None
    if bias is not None:
        bank = bias.float().reshape(share.shape[1], -1)  # (K, O)
        of_bias = grad_y.sum((2, 3), dtype=torch.float32)  # (B, O)
        if out_gate is not None:
            grad_out = grad_out + share @ bank * of_bias
            of_bias = of_bias * out_gate
        grad_share = grad_share + of_bias @ bank.T
        grad_bias = (share.T @ of_bias).flatten()
    return grad_x, grad_weight, None if kernel_attn is None else grad_share, grad_in, grad_out, grad_taps, grad_bias


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _attentions(x: Tensor, kernel_attn: Tensor | None, *others: Tensor | None) -> list[Tensor | None]:
    """Contiguous and in float32, and kernel_attn never None."""
    attns = x.new_ones(len(x), 1) if kernel_attn is None else kernel_attn, *others
    return [None if t is None else t.float().contiguous() for t in attns]
