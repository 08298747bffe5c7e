"""Dynamic convolution in plain PyTorch: the definition that every algorithm and its gradients are tested against.

For image b, with K kernels W_k:

    y_b = out_attn[b] * conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k)

CondConv (arXiv 1904.04971) and DyConv (arXiv 1912.03458) have only kernel_attn, FMDConv (arXiv 2503.17530) adds in_attn
and out_attn, ODConv (ICLR 2022) also tap_attn. The form is the one of the FMDConv and ODConv authors: the mixed kernels
of all images run as one convolution with a group for every image.
"""
import torch.nn.functional as F
from torch import Tensor

from .case import Attention, Case
from .layout import bank_of, gated


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W') for images x (B, I, H, W) and kernels (K * O, I / groups, kh, kw); B > 0.

    The attention is in the dtype of `weight`, which may be another than that of the images.
    """
    kernel_attn, _ = bank_of(weight, attention, case)
    kernels = (kernel_attn @ weight.reshape(case.num_kernels, -1)).reshape(-1, *weight.shape[1:])  # (B * O, i, kh, kw)
    if attention.tap_attn is not None:
        kernels = kernels * attention.tap_attn.repeat_interleave(case.out_channels, 0).view(-1, 1, *case.kernel_size)
    images = gated(x, attention.in_attn).reshape(1, -1, *x.shape[2:])
    y = F.conv2d(
        images, kernels.to(x.dtype), None, case.stride, case.padding, case.dilation, case.groups * case.batch)
    return gated(y.reshape(case.batch, case.out_channels, *y.shape[2:]), attention.out_attn)
