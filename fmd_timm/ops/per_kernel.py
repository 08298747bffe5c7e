"""Dynamic convolution as one convolution with all K kernels, whose results are then mixed.

The same sum as the reference with the mixing moved behind the convolution, which is linear in its kernel. It does K
times the arithmetic of a static convolution but never holds a kernel per image, so it wins where kernels are very large
beside the images, and for a single kernel.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Attention, Case, Gradients
from .layout import gated


def supports(case: Case) -> bool:
    return not case.has_tap_attn and (case.groups == 1 or case.num_kernels == 1)


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W'), as in `reference.forward`."""
    y = _convolve_all(x, weight, attention, case)
    return (y * _share(weight, attention, case).to(y.dtype)[..., None, None]).sum(1)


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None."""
    kernel_attn, in_attn, out_attn, _ = attention
    share = _share(weight, attention, case)
    # Convolved again: K results for every image are too many to keep from the forward pass.
    y = _convolve_all(x, weight, attention, case)
    products = (grad_y[:, None] * y).sum((3, 4), dtype=share.dtype)  # (B, K, O)
    grad_all = (grad_y[:, None] * share.to(grad_y.dtype)[..., None, None]).flatten(1, 2)  # (B, K * O, H', W')
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_all, gated(x, in_attn), weight.to(x.dtype), None, case.stride, case.padding, case.dilation, False, [0, 0],
        case.groups, [True, True, False],
    )
    return gated(grad_x, in_attn), grad_weight, Attention(
        None if kernel_attn is None else (products if out_attn is None else products * out_attn[:, None]).sum(2),
        None if in_attn is None else (grad_x * x).sum((2, 3)),
        None if out_attn is None else (products if kernel_attn is None else products * kernel_attn[:, :, None]).sum(1),
    )


def _convolve_all(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    images = gated(x, attention.in_attn)
    y = F.conv2d(images, weight.to(x.dtype), None, case.stride, case.padding, case.dilation, case.groups)
    return y.unflatten(1, (case.num_kernels, case.out_channels))  # (B, K, O, H', W')


def _share(weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """Factor of each result, (B, K, O or 1)"""
    kernel_attn, out_attn = attention.kernel_attn, attention.out_attn
    share = weight.new_ones(case.batch, 1, 1) if kernel_attn is None else kernel_attn[:, :, None]
    return share if out_attn is None else share * out_attn[:, None]
