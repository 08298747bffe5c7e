"""Dynamic convolution in plain PyTorch: the definition that every other algorithm is tested against.

For image b, with K kernels W_k:

    y_b = out_attn[b] * conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k)

CondConv (arXiv 1904.04971) and DyConv (arXiv 1912.03458) have only kernel_attn, FMDConv (arXiv 2503.17530) adds in_attn
and out_attn, ODConv (ICLR 2022) also tap_attn. The form is the one of the FMDConv and ODConv authors: the mixed kernels
of all images run as one convolution with a group for every image. It holds B kernels in memory, while it runs.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Attention, Case, Gradients
from .layout import gated, kernel_attn_of


def supports(case: Case) -> bool:
    return True


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W') for images x (B, I, H, W) and kernels (K * O, I / groups, kh, kw); B > 0.

    The attention is in the dtype of `weight`, which may be another than that of the images.
    """
    kernels = _times_taps(_mixed(weight, attention, case), attention)
    kernels = kernels.reshape(-1, *weight.shape[1:]).to(x.dtype)  # (B * O, i, kh, kw)
    images = gated(x, attention.in_attn).reshape(1, -1, *x.shape[2:])
    y = F.conv2d(images, kernels, None, case.stride, case.padding, case.dilation, case.groups * case.batch)
    return gated(y.reshape(case.batch, case.out_channels, *y.shape[2:]), attention.out_attn)


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None.

    The gradient of image b's kernel, G_b, is taken before out_attn; its products with the rows of the K kernels are all
    that kernel_attn and out_attn need, so that nothing is divided by a gate that may be 0.
    """
    B, K, O = case.batch, case.num_kernels, case.out_channels
    _, in_attn, out_attn, tap_attn = attention
    kernel_attn = kernel_attn_of(attention, weight, case)
    mixed = _mixed(weight, attention, case)  # (B, O, i, taps)
    out = 1 if out_attn is None else out_attn[:, :, None, None]
    grad_x, G, _ = torch.ops.aten.convolution_backward(
        grad_y.reshape(1, -1, *grad_y.shape[2:]), gated(x, in_attn).reshape(1, -1, *x.shape[2:]),
        (_times_taps(mixed, attention) * out).reshape(-1, *weight.shape[1:]).to(x.dtype), None,
        case.stride, case.padding, case.dilation, False, [0, 0], case.groups * B, [True, True, False],
    )
    grad_x, G = grad_x.reshape(x.shape), G.reshape(mixed.shape).to(weight.dtype)
    gated_G = _times_taps(G, attention)
    products = torch.einsum('boit,koit->bko', gated_G, weight.reshape(K, O, -1, mixed.shape[3]))
    gradients = Attention(
        None if attention.kernel_attn is None else (products * (1 if out_attn is None else out_attn[:, None])).sum(2),
        None if in_attn is None else (grad_x * x).sum((2, 3)),
        None if out_attn is None else (products * kernel_attn[:, :, None]).sum(1),
        None if tap_attn is None else (G * out * mixed).sum((1, 2)),
    )
    grad_weight = (kernel_attn.T @ (gated_G * out).reshape(B, -1)).reshape(weight.shape)
    return gated(grad_x, in_attn), grad_weight, gradients


def _mixed(weight: Tensor, attention: Attention, case: Case) -> Tensor:
    mixed = kernel_attn_of(attention, weight, case) @ weight.reshape(case.num_kernels, -1)
    return mixed.reshape(case.batch, case.out_channels, weight.shape[1], -1)  # (B, O, i, taps)


def _times_taps(kernels: Tensor, attention: Attention) -> Tensor:
    return kernels if attention.tap_attn is None else kernels * attention.tap_attn[:, None, None, :]
