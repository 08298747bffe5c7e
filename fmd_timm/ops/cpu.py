"""Dynamic convolution on the CPU: which algorithms are tried, and in which order.

The numbers of pixels are from timings of single convolutions of ResNets (`recipes/bench.py --layers`) on an Intel Xeon
and an AMD EPYC with AVX-512; what holds for AVX2 is from an AMD EPYC. Where they don't fit a machine,
`torch.backends.cudnn.benchmark` finds out (`fastest.py`).
"""
import torch

from . import c_conv, im2col, per_image, per_kernel
from .case import Case

__all__ = ['algorithms']


def algorithms(question: str, case: Case) -> list:
    """Those that support the case, expected fastest first.

    Args:
        question: 'forward', 'backward', or 'prepared' for a forward pass in a network prepared for inference.
        case: Of the convolution.
    """
    direction = 'backward' if question == 'backward' else 'forward'
    if case.num_kernels == 1 and not case.has_tap_attn:
        return [per_kernel]  # one kernel for all images: an ordinary convolution
    if case.is_depthwise:
        order = [per_image]
    elif case.batch >= 32 * case.out_pixels:
        order = [per_kernel, im2col, per_image]
    elif case.out_pixels >= 144 and direction == 'forward' or case.out_pixels >= 500:
        order = [per_image, im2col, per_kernel]
    else:
        order = [im2col, per_image, per_kernel]
    order = [algorithm for algorithm in order if algorithm.supports(case)]
    if (c_conv.differentiates if direction == 'backward' else c_conv.supports)(case):
        vectors = torch.backends.cpu.get_cpu_capability()
        has_vectors = vectors == 'AVX512' or vectors == 'AVX2' and direction == 'backward'
        is_small = case.out_pixels < (500 if case.kernel_size == (1, 1) else 1000)
        # A prepared layer has its kernels laid out for C, and its attention in the same call.
        is_first = question == 'prepared' or has_vectors and is_small
        order.insert(0 if is_first else len(order), c_conv)
    return order
