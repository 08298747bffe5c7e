"""Dynamic convolution on CUDA: which algorithms are tried, and in which order.

Not yet measured on a GPU: the order is an estimate from the bandwidth and arithmetic of an H100. The first is always
plain PyTorch (cuDNN and cuBLAS). What is in Triton comes after it, where timing on the user's own GPU may choose it.
"""
from functools import lru_cache
from types import ModuleType

import torch

from . import im2col, per_image, per_kernel
from .case import Case
from .triton_checked import TritonConv

MOST = 3  # algorithms of a case: each is timed
POINTWISE_FROM = 14 * 14  # pixels of the result from which 1x1 kernels are better mixed for each image
TRITON_FROM = 28 * 28  # pixels of the result that earn back the mixing in memory


@lru_cache(maxsize=1024)  # asked for each convolution
def algorithms(question: str, case: Case) -> list:
    """Those that support the case, expected fastest first, at most three.

    Args:
        question: 'forward', 'backward', or 'prepared' for a forward pass in a network prepared for inference.
        case: Of the convolution.
    """
    first, *others = (algorithm for algorithm in _in_pytorch(case) if algorithm.supports(case))
    return [first, *_in_triton(question, case, first), *others][:MOST]


def _in_pytorch(case: Case) -> list[ModuleType]:
    if torch.float64 in (case.dtype, case.weight_dtype):
        return [per_image]  # float64 is for checks
    if case.num_kernels == 1 and not case.has_tap_attn:
        return [per_kernel]  # one kernel for all images: an ordinary convolution
    if case.groups > 1:
        return [per_image]  # a depthwise one is a depthwise convolution of B * C channels
    if case.batch == 1 or case.is_pointwise and (case.out_pixels >= POINTWISE_FROM or case.has_tap_attn):
        return [per_image, per_kernel]  # an ordinary convolution with the mixed kernel, a batch of matrix products
    if case.has_tap_attn:
        return [per_image, im2col]
    return [per_kernel, per_image]


def _in_triton(question: str, case: Case, fallback: ModuleType) -> list[TritonConv]:
    if case.is_pointwise or case.batch == 1 or case.num_kernels == 1 and not case.has_tap_attn:
        return []
    is_large = case.out_pixels >= TRITON_FROM or case.has_tap_attn  # for taps there are no K plain convolutions
    if not is_large or not _has_triton(case.device):
        return []
    channels = case.in_channels if question == 'backward' else case.out_channels
    tiles = (64, 128) if channels >= 128 and case.dtype != torch.float32 else (64,)
    return [tile for tile in (TritonConv(size, fallback) for size in tiles) if tile.supports(case)]


def _has_triton(device: torch.device) -> bool:
    """Before Ampere what Triton makes is very slow, and AMD's GPUs call other things by the same version."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
