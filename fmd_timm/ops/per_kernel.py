"""Dynamic convolution as one plain convolution with all K kernels.

The mixing moves out of the kernels, which a convolution is linear in: into the images, K of which lie side by side as
channels, or into K results, which are added up. It does K times the arithmetic of a static convolution but never holds
a kernel per image, so it wins where kernels are large beside the images. With K = 1 it is an ordinary convolution with
the factors of its channels on image and result.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Attention, Case, Gradients, empty_as
from .layout import gated


def supports(case: Case) -> bool:
    return not case.has_tap_attn and (case.groups == 1 or case.num_kernels == 1)


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W'), as in `reference.forward`.

    The form is the one that moves fewer numbers: K images are written and read, K results twice each, and for images
    the kernels must lie side by side.
    """
    kernel_attn, in_attn, out_attn, _ = attention
    if case.batch * case.image_numel + case.kernel_numel <= 2 * case.batch * _result_numel(case):
        y = _convolve(_multiplied(x, kernel_attn, in_attn), _side_by_side(weight, x, case), case)
        return gated(y, out_attn)
    y = _convolve(gated(x, in_attn), weight.to(x.dtype), case)  # (B, K * O, H', W')
    return _added_up(y, kernel_attn, out_attn)


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None.

    out_attn's gradient needs the result, which nobody kept: all K kernels convolve again, as that is still less than to
    take it from a gradient of every image's kernel, at the sizes this file is for. If they do so result by result,
    kernel_attn's gradient comes with it. Without out_attn that one comes from the gradients of the K images instead,
    and nothing is convolved again, unless those are much larger than the results.
    """
    images, results = case.batch * case.image_numel, case.batch * _result_numel(case)
    by_images = images + case.kernel_numel < results if case.has_out_attn else images <= 2 * results
    return (_backward_by_images if by_images else _backward_by_results)(grad_y, x, weight, attention, case)


def _backward_by_images(grad_y, x, weight, attention, case) -> Gradients:
    kernel_attn, in_attn, out_attn, _ = attention
    images, kernels = _multiplied(x, kernel_attn, in_attn), _side_by_side(weight, x, case)
    grad_out_attn = None
    if out_attn is not None:
        grad_out_attn = (grad_y * _convolve(images, kernels, case)).sum((2, 3), dtype=weight.dtype)
    grad_images, grad_kernels = _convolve_backward(gated(grad_y, out_attn), images, kernels, case)
    grad_kernel_attn, grad_in_attn = _of_factors(grad_images, x, kernel_attn, in_attn)
    grad_weight = torch.empty_like(weight)
    _swapped(grad_weight, case).copy_(grad_kernels.unflatten(1, (case.num_kernels, -1)))
    return _added_up(grad_images, kernel_attn, in_attn), grad_weight, Attention(
        grad_kernel_attn, grad_in_attn, grad_out_attn)


def _backward_by_results(grad_y, x, weight, attention, case) -> Gradients:
    kernel_attn, in_attn, out_attn, _ = attention
    images, kernels = gated(x, in_attn), weight.to(x.dtype)
    grad_kernel_attn = grad_out_attn = None
    if kernel_attn is not None or out_attn is not None:
        grad_kernel_attn, grad_out_attn = _of_factors(
            _convolve(images, kernels, case), grad_y, kernel_attn, out_attn)
    grad_images, grad_weight = _convolve_backward(_multiplied(grad_y, kernel_attn, out_attn), images, kernels, case)
    _, grad_in_attn = _of_factors(grad_images, x, None, in_attn)
    return gated(grad_images, in_attn), grad_weight, Attention(grad_kernel_attn, grad_in_attn, grad_out_attn)


def _result_numel(case: Case) -> int:
    return case.out_channels * case.out_pixels


def _convolve(images: Tensor, kernels: Tensor, case: Case) -> Tensor:
    return F.conv2d(images, kernels, None, case.stride, case.padding, case.dilation, case.groups)


def _convolve_backward(grad_y: Tensor, images: Tensor, kernels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad_y, images, kernels, None, case.stride, case.padding, case.dilation, False, [0, 0], case.groups,
        [True, True, False])[:2]


def _multiplied(images: Tensor, kernel_attn: Tensor | None, channel_attn: Tensor | None) -> Tensor:
    """Images (B, C, H, W) -> (B, K * C, H, W), each K times as often and times its factors (B, K) and (B, C)."""
    if kernel_attn is None:
        return gated(images, channel_attn)
    factors = _factors(kernel_attn, channel_attn).to(images.dtype)
    B, K, C = len(images), kernel_attn.shape[1], images.shape[1]
    multiplied = empty_as(images, B, K * C, *images.shape[2:])
    torch.mul(images[:, None], factors[..., None, None], out=multiplied.unflatten(1, (K, C)))
    return multiplied


def _added_up(images: Tensor, kernel_attn: Tensor | None, channel_attn: Tensor | None) -> Tensor:
    """Adjoint of `_multiplied`: (B, K * C, H, W) -> (B, C, H, W)"""
    if kernel_attn is None:
        return gated(images, channel_attn)
    factors = _factors(kernel_attn, channel_attn).to(images.dtype)
    return (images.unflatten(1, (factors.shape[1], -1)) * factors[..., None, None]).sum(1)


def _factors(kernel_attn: Tensor, channel_attn: Tensor | None) -> Tensor:
    """(B, K, C), or (B, K, 1) where all channels have the same."""
    return kernel_attn[:, :, None] if channel_attn is None else kernel_attn[:, :, None] * channel_attn[:, None]


def _of_factors(
        parts: Tensor, whole: Tensor, kernel_attn: Tensor | None, channel_attn: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of kernel_attn (B, K) and channel_attn (B, C), None for what is None.

    They are sums over the products of the K parts (B, K * C, H, W), without factors, with the whole (B, C, H, W).
    """
    if kernel_attn is None and channel_attn is None:
        return None, None
    dtype = (channel_attn if kernel_attn is None else kernel_attn).dtype
    products = (parts.unflatten(1, (-1, whole.shape[1])) * whole[:, None]).sum((3, 4), dtype=dtype)  # (B, K, C)
    of_kernels = products if channel_attn is None else products * channel_attn[:, None]
    of_channels = products if kernel_attn is None else products * kernel_attn[:, :, None]
    return None if kernel_attn is None else of_kernels.sum(2), None if channel_attn is None else of_channels.sum(1)


def _swapped(weight: Tensor, case: Case) -> Tensor:
    """A view (O, K, I / groups, kh, kw) of the kernels (K * O, I / groups, kh, kw)."""
    return weight.unflatten(0, (case.num_kernels, case.out_channels)).transpose(0, 1)


def _side_by_side(weight: Tensor, x: Tensor, case: Case) -> Tensor:
    """The kernels of K images side by side (O, K * I / groups, kh, kw), in the dtype of x."""
    if case.num_kernels == 1:
        return weight.to(x.dtype)
    size = case.out_channels, case.num_kernels * weight.shape[1], *case.kernel_size
    kernels = empty_as(weight, *size, dtype=x.dtype)
    kernels.unflatten(1, (case.num_kernels, -1)).copy_(_swapped(weight, case))
    return kernels
