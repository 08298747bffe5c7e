"""Dynamic convolution in plain PyTorch: the definition that every other implementation is tested against.

For image b, with K kernels W_k:

    y_b = out_attn[b] * (conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k)
                         + sum_k kernel_attn[b, k] bias_k)

CondConv (arXiv 1904.04971) and DyConv (arXiv 1912.03458) have only kernel_attn, FMDConv (arXiv 2503.17530) adds in_attn
and out_attn, ODConv (ICLR 2022) also tap_attn. The form is the one of the FMDConv and ODConv authors: the mixed kernels
of all images run as one convolution with a group for every image. It holds B kernels in memory, while it runs.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0, any device and floating dtype."""
    B, I, H, W = x.shape
    if kernel_attn is None:
        kernel_attn = weight.new_ones(B, 1)
    if in_attn is not None:
        x = x * in_attn.to(x.dtype)[:, :, None, None]
    kernels = _mix(weight, kernel_attn)  # (B, O, i, taps)
    if tap_attn is not None:
        kernels = kernels * tap_attn.to(weight.dtype)[:, None, None, :]
    kernels = kernels.reshape(-1, *weight.shape[1:]).to(x.dtype)  # (B * O, i, h, w)
    y = F.conv2d(x.reshape(1, B * I, H, W), kernels, None, stride, padding, dilation, groups * B)
    y = y.reshape(B, -1, y.shape[2], y.shape[3])
    if bias is not None:
        y = y + (kernel_attn.to(bias.dtype) @ bias.reshape(kernel_attn.shape[1], -1)).to(y.dtype)[:, :, None, None]
    if out_attn is not None:
        y = y * out_attn.to(y.dtype)[:, :, None, None]
    return y


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None.

    The gradient of image b's kernel, G_b, is taken before out_attn; its products with the rows of the K kernels are all
    that kernel_attn and out_attn need, so that nothing is divided by a gate that may be 0.
    """
    B, I, H, W = x.shape
    dtype = weight.dtype
    share = weight.new_ones(B, 1) if kernel_attn is None else kernel_attn.to(dtype)
    K = share.shape[1]
    bank = weight.reshape(K, weight.shape[0] // K, weight.shape[1], -1)  # (K, O, i, taps)
    out = 1 if out_attn is None else out_attn.to(dtype)[:, :, None, None]  # (B, O, 1, 1)
    taps = 1 if tap_attn is None else tap_attn.to(dtype)[:, None, None, :]  # (B, 1, 1, taps)
    mixed = _mix(weight, share)  # (B, O, i, taps)
    gated_x = x if in_attn is None else x * in_attn.to(x.dtype)[:, :, None, None]

    grad_x, G, _ = torch.ops.aten.convolution_backward(
        grad_y.reshape(1, -1, *grad_y.shape[2:]), gated_x.reshape(1, B * I, H, W),
        (mixed * taps * out).reshape(-1, *weight.shape[1:]).to(x.dtype), None,
        stride, padding, dilation, False, [0, 0], groups * B, [True, True, False],
    )
    grad_x = grad_x.reshape(x.shape)
    G = G.reshape(mixed.shape).to(dtype)
    products = torch.einsum('boit,koit->bko', G * taps, bank)
    grad_bias, of_bias = None, grad_y.sum((2, 3), dtype=dtype)  # (B, O)
    if bias is not None:
        products = products + of_bias[:, None] * bias.reshape(1, K, -1)
        grad_bias = (share.T @ (of_bias if out_attn is None else of_bias * out_attn.to(dtype))).reshape(-1)

    grad_kernel_attn = grad_in_attn = grad_out_attn = grad_tap_attn = None
    if kernel_attn is not None:
        grad_kernel_attn = products.sum(2) if out_attn is None else (products * out_attn.to(dtype)[:, None]).sum(2)
    if in_attn is not None:
        grad_in_attn = (grad_x * x).sum((2, 3))
        grad_x = grad_x * in_attn.to(x.dtype)[:, :, None, None]
    if out_attn is not None:
        grad_out_attn = (products * share[:, :, None]).sum(1)
    if tap_attn is not None:
        grad_tap_attn = (G * out * mixed).sum((1, 2))
    grad_weight = (share.T @ (G * taps * out).reshape(B, -1)).reshape(weight.shape)
    return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, grad_out_attn, grad_tap_attn, grad_bias


def _mix(weight: Tensor, kernel_attn: Tensor) -> Tensor:
    B, K = kernel_attn.shape
    mixed = kernel_attn.to(weight.dtype) @ weight.reshape(K, -1)
    return mixed.reshape(B, weight.shape[0] // K, weight.shape[1], -1)  # (B, O, i, taps)
