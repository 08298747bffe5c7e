"""Dynamic convolution on the CPU by two algorithms: kernels' gradients as matrix products, all else image by image.

Between large images, where convolutions of single images are fast in both directions, and small ones, where they are in
none: a convolution of a single image is still as fast as one of a batch, but the gradient of its kernel isn't.
"""
from torch import Tensor

from . import im2col, per_image
from .per_image import forward

__all__ = ['forward', 'backward']


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None. groups = 1."""
    attention, conv_args = (kernel_attn, in_attn, out_attn, tap_attn), (stride, padding, dilation)
    grad_x, grad_in_attn = per_image.image_gradient(grad_y, x, weight, *attention, *conv_args, groups)
    grad_weight, grad_kernel_attn, *others = im2col.kernel_gradient(grad_y, x, weight, *attention, bias, *conv_args)
    return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, *others
