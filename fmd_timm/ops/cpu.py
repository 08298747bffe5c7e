"""Dynamic convolution on the CPU: which algorithms are tried, and in which order."""
import torch
from torch import Tensor

from . import c_conv, im2col, per_image, per_kernel, reference
from .case import Attention, Case, Gradients

__all__ = ['algorithms']


class both:
    """Of middle-sized images a convolution of a single one is still as fast as one of a batch, the gradient of its
    kernel isn't."""
    supports = staticmethod(im2col.supports)

    @staticmethod
    def backward(grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
        grad_x, grad_in_attn = per_image.image_gradient(grad_y, x, weight, attention, case)
        grad_weight, gradients = im2col.kernel_gradient(grad_y, x, weight, attention, case)
        return grad_x, grad_weight, gradients._replace(in_attn=grad_in_attn)


def algorithms(question: str, case: Case) -> list:
    """Those that support the case, expected fastest first.

    Args:
        question: 'forward', 'backward', or 'prepared' for a forward pass in a network prepared for inference.
        case: Of the convolution.
    """
    if case.num_kernels == 1 and not case.has_tap_attn:
        return [per_kernel]  # one kernel for all images: an ordinary convolution
    if case.is_depthwise:
        order = [reference, per_image]  # a depthwise convolution of B * C channels
    elif case.batch >= 32 * case.out_pixels:
        order = [per_kernel, im2col, per_image]
    elif case.out_pixels >= 500:
        order = [per_image, both, im2col, per_kernel]
    elif case.out_pixels >= 144:
        order = [both, per_image, im2col, per_kernel]
    else:
        order = [im2col, both, per_image, per_kernel]
    direction = 'backward' if question == 'backward' else 'forward'
    order = [algorithm for algorithm in order if hasattr(algorithm, direction) and algorithm.supports(case)]
    if direction == 'forward' and c_conv.supports(case):
        in_c_first = torch.backends.cpu.get_cpu_capability() == 'AVX512' and (
            case.kernel_size != (1, 1) or case.out_pixels < 500)
        order.insert(0 if in_c_first else len(order), c_conv)
    return order
