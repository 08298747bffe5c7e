"""Dynamic convolution as one convolution with all K kernels, whose results are then mixed.

The same sum as the reference with the mixing moved behind the convolution, which is linear in its kernel. It does K
times the arithmetic of a static convolution but never holds a kernel per image, so it wins where kernels are very large
beside the images, and for a single kernel. Without tap_attn, which differs from image to image; groups > 1 only for
K = 1.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import by_tap, kernel_rows, patches_of, per_element, sum_patches

POINTWISE = [1, 1], [0, 0], [1, 1], 1  # stride, padding, dilation and groups of a convolution over patches


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`."""
    if tap_attn is not None:
        patches, size = patches_of(_gated(x, in_attn), weight, stride, padding, dilation)
        images = _as_images(patches * per_element(tap_attn, weight).to(x.dtype))
        y = forward(images, _pointwise(weight), kernel_attn, None, out_attn, None, bias, *POINTWISE)
        return y.flatten(2).unflatten(2, size)
    share = _share(weight, kernel_attn, out_attn, len(x))
    y = _convolve_all(x, weight, in_attn, bias, stride, padding, dilation, groups, share.shape[1])
    return (y * share.to(y.dtype)[..., None, None]).sum(1)


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None."""
    if tap_attn is not None:
        patches, _ = patches_of(_gated(x, in_attn), weight, stride, padding, dilation)  # (B, P, R)
        factors = per_element(tap_attn, weight).to(x.dtype)
        grad_images, grad_rows, grad_kernel_attn, _, grad_out_attn, _, grad_bias = backward(
            grad_y.flatten(2)[..., None], _as_images(patches * factors), _pointwise(weight), kernel_attn, None,
            out_attn, None, bias, *POINTWISE)
        grad_patches = grad_images[..., 0].mT
        grad_tap_attn = by_tap((grad_patches * patches).sum(1), weight)
        grad_x, grad_in_attn = _ungated(
            sum_patches(grad_patches * factors, x, weight, stride, padding, dilation), x, in_attn)
        grad_weight = torch.empty_like(weight)
        kernel_rows(grad_weight, None)[0].copy_(grad_rows[..., 0, 0])
        return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, grad_out_attn, grad_tap_attn, grad_bias
    share = _share(weight, kernel_attn, out_attn, len(x))
    # Convolved again: K results for every image are too many to keep from the forward pass.
    y = _convolve_all(x, weight, in_attn, bias, stride, padding, dilation, groups, share.shape[1])
    products = (grad_y[:, None] * y).sum((3, 4), dtype=share.dtype)  # (B, K, O)
    grad_all = (grad_y[:, None] * share.to(grad_y.dtype)[..., None, None]).flatten(1, 2)  # (B, K * O, H', W')
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_all, _gated(x, in_attn), weight.to(x.dtype), None if bias is None else bias.shape,
        stride, padding, dilation, False, [0, 0], groups, [True, True, bias is not None],
    )
    grad_x, grad_in_attn = _ungated(grad_x, x, in_attn)
    grad_kernel_attn = grad_out_attn = None
    if kernel_attn is not None:
        grad_kernel_attn = products.sum(2) if out_attn is None else (products * out_attn[:, None]).sum(2)
    if out_attn is not None:
        grad_out_attn = (products if kernel_attn is None else products * kernel_attn[:, :, None]).sum(1)
    return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, grad_out_attn, None, grad_bias


def _convolve_all(x, weight, in_attn, bias, stride, padding, dilation, groups, K) -> Tensor:
    x = _gated(x, in_attn)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups)  # (B, K * O, H', W')
    return y.unflatten(1, (K, y.shape[1] // K))  # (B, K, O, H', W')


def _share(weight, kernel_attn, out_attn, batch) -> Tensor:
    """Factor of each result, (B, K, O or 1)"""
    share = weight.new_ones(batch, 1, 1) if kernel_attn is None else kernel_attn[:, :, None]
    return share if out_attn is None else share * out_attn[:, None]


def _gated(x: Tensor, in_attn: Tensor | None) -> Tensor:
    return x if in_attn is None else x * in_attn.to(x.dtype)[:, :, None, None]


def _ungated(grad_x: Tensor, x: Tensor, in_attn: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and in_attn from that of the gated x."""
    if in_attn is None:
        return grad_x, None
    return grad_x * in_attn.to(x.dtype)[:, :, None, None], (grad_x * x).sum((2, 3))


def _as_images(patches: Tensor) -> Tensor:
    """(B, P, R) -> (B, R, P, 1)"""
    return patches.mT[..., None]


def _pointwise(weight: Tensor) -> Tensor:
    """(K * O, I, kh, kw) -> (K * O, R, 1, 1)"""
    return kernel_rows(weight, None)[0][..., None, None]
