"""K kernels in oneDNN's own layout, mixed there: convolutions that needn't reorder the kernel of every image first.

oneDNN reorders the kernel of a convolution on every call, which for a mixed kernel can't be done beforehand. But mixing
is linear and elementwise, so the K kernels are reordered once and mixed in that layout, into memory that is kept. This
takes operators of PyTorch that inductor uses for its own frozen graphs; they are not public, hence `is_available`.
"""
import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


class PackedConv:
    """Convolutions of images of one size, each with its own mixed kernel. float32, channels_last, groups = 1.

    Not for two threads at once: they would mix into the same memory.

    Args:
        weight: The K kernels (K * C_out, C_in, kh, kw).
        num_kernels: K.
        size: Height and width of the image.
        stride: Pixels.
        padding: Pixels.
        dilation: Pixels.
    """

    def __init__(self, weight: Tensor, num_kernels: int, size: tuple[int, int], stride, padding, dilation):
        self.conv_args = list(padding), list(stride), list(dilation), 1
        image = [1, weight.shape[1], *size]
        packed = [
            torch._C._nn.mkldnn_reorder_conv2d_weight(kernel.contiguous().to_mkldnn(), *self.conv_args, image)
            for kernel in weight.chunk(num_kernels)
        ]
        self.bank = torch.stack([_elements(kernel) for kernel in packed])  # (K, N and padding)
        self.kernel = packed[0]
        self.mixed = _elements(self.kernel)[None]  # the same memory

    def __call__(self, x: Tensor, kernel_attn: Tensor) -> Tensor:
        """x (B, C_in, H, W), kernel_attn (B, K) -> (B, C_out, H', W')"""
        y = None
        for b in range(len(x)):
            torch.mm(kernel_attn[b:b + 1], self.bank, out=self.mixed)
            y_b = torch.ops.mkldnn._convolution_pointwise(
                x[b:b + 1], self.kernel, None, *self.conv_args, 'none', [], '')
            if len(x) == 1:
                return y_b
            if y is None:
                y = torch.empty((len(x), *y_b.shape[1:]), memory_format=torch.channels_last)
            y[b:b + 1] = y_b
        return y


def _elements(packed: Tensor) -> Tensor:
    """The memory of an opaque tensor of oneDNN as a float32 vector; valid as long as that tensor is."""
    address, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.float32)


@cache
def is_available() -> bool:
    """Whether this build of PyTorch has these operators, and they compute what a convolution does."""
    x, weight = torch.arange(2 * 16 * 25.).reshape(2, 16, 5, 5).sin()[:1], torch.arange(32 * 16 * 9.).cos()
    weight = weight.reshape(32, 16, 3, 3)
    share = torch.tensor([[0.3, 0.7]])
    try:
        y = PackedConv(weight, 2, (5, 5), (1, 1), (1, 1), (1, 1))(x, share)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    expected = F.conv2d(x, 0.3 * weight[:16] + 0.7 * weight[16:], padding=1)
    return torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
