"""Dynamic convolution as one convolution with all K kernels, whose results are then mixed.

The same sum as the reference with the mixing moved behind the convolution, which is linear in its kernel. It does K
times the arithmetic of a static convolution but never holds a kernel per image, so it wins where kernels are very large
beside the images, and for a single kernel. Without tap_attn, which differs from image to image; groups > 1 only for
K = 1.
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; tap_attn is None."""
    share = _share(weight, kernel_attn, out_attn, len(x))
    y = _convolve_all(x, weight, in_attn, bias, stride, padding, dilation, groups, share.shape[1])
    return (y * share.to(y.dtype)[..., None, None]).sum(1)


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn (None) and bias; None for what is None."""
    share = _share(weight, kernel_attn, out_attn, len(x))
    # Convolved again: K results for every image are too many to keep from the forward pass.
    y = _convolve_all(x, weight, in_attn, bias, stride, padding, dilation, groups, share.shape[1])
    products = (grad_y[:, None] * y).sum((3, 4), dtype=share.dtype)  # (B, K, O)
    grad_all = (grad_y[:, None] * share.to(grad_y.dtype)[..., None, None]).flatten(1, 2)  # (B, K * O, H', W')
    gated_x = x if in_attn is None else x * in_attn.to(x.dtype)[:, :, None, None]
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_all, gated_x, weight.to(x.dtype), None if bias is None else bias.shape,
        stride, padding, dilation, False, [0, 0], groups, [True, True, bias is not None],
    )
    grad_kernel_attn = grad_in_attn = grad_out_attn = None
    if in_attn is not None:
        grad_in_attn = (grad_x * x).sum((2, 3))
        grad_x = grad_x * in_attn.to(x.dtype)[:, :, None, None]
    if kernel_attn is not None:
        grad_kernel_attn = products.sum(2) if out_attn is None else (products * out_attn[:, None]).sum(2)
    if out_attn is not None:
        grad_out_attn = (products if kernel_attn is None else products * kernel_attn[:, :, None]).sum(1)
    return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, grad_out_attn, None, grad_bias


def _convolve_all(x, weight, in_attn, bias, stride, padding, dilation, groups, K) -> Tensor:
    if in_attn is not None:
        x = x * in_attn.to(x.dtype)[:, :, None, None]
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)  # (B, K * O, H', W')
    return y.unflatten(1, (K, y.shape[1] // K))  # (B, K, O, H', W')


def _share(weight, kernel_attn, out_attn, batch) -> Tensor:
    """Factor of each result, (B, K, O or 1)"""
    share = weight.new_ones(batch, 1, 1) if kernel_attn is None else kernel_attn[:, :, None]
    return share if out_attn is None else share * out_attn[:, None]
