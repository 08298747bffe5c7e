"""Dynamic convolution in plain PyTorch: the definition that every other implementation is tested against.

For image b, with K kernels W_k:

    y_b = out_attn[b] * (conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k)
                         + sum_k kernel_attn[b, k] bias_k)

CondConv (arXiv 1904.04971) and DyConv (arXiv 1912.03458) have only kernel_attn, FMDConv (arXiv 2503.17530) adds in_attn
and out_attn, ODConv (ICLR 2022) also tap_attn. The form is the one of the FMDConv and ODConv authors: the mixed kernels
of all images run as one convolution with a group for every image. It holds B kernels in memory.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_conv2d_reference(
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor | None,
        in_attn: Tensor | None,
        out_attn: Tensor | None,
        tap_attn: Tensor | None,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`, unchecked; any device and floating dtype."""
    B, I, H, W = x.shape
    if in_attn is not None:
        x = x * in_attn.to(x.dtype)[:, :, None, None]

    if kernel_attn is None:
        kernel_attn = torch.ones(B, 1, device=weight.device, dtype=weight.dtype)
    K = kernel_attn.shape[1]
    O, (i, h, w) = weight.shape[0] // K, weight.shape[1:]
    mixed = kernel_attn.to(weight.dtype) @ weight.reshape(K, -1)  # (B, O * i * h * w)
    if tap_attn is not None:
        mixed = mixed.reshape(B, O * i, h * w) * tap_attn.to(weight.dtype)[:, None, :]
    mixed = mixed.reshape(B, O, i, h, w).to(x.dtype)

    if B > 0:
        x = x.reshape(1, B * I, H, W)
        y = F.conv2d(x, mixed.reshape(B * O, i, h, w), None, stride, padding, dilation, groups * B)
        y = y.reshape(B, O, y.shape[2], y.shape[3])
    else:  # no groups then; any kernel gives the shape, and the empty sum keeps every gradient defined
        y = F.conv2d(x, mixed.sum(0), None, stride, padding, dilation, groups)
    if bias is not None:
        y = y + (kernel_attn.to(bias.dtype) @ bias.reshape(K, O)).to(y.dtype)[:, :, None, None]
    if out_attn is not None:
        y = y * out_attn.to(y.dtype)[:, :, None, None]
    return y
