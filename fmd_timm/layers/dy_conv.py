"""DyConv: Dynamic Convolution: Attention over Convolution Kernels (arXiv 1912.03458)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from .attention import Attention, DynamicAttention, check_ratios, draw_
from .dynamic_conv import DynamicConv2d
from .folded import FoldedAttention, linear_map

__all__ = ['DyConv2d', 'DyConvAttention']


class DyConvAttention(DynamicAttention):
    """Attention over the kernels.

    For the pooled input g (B, C_in):  kernel_attn = softmax((V2 relu(V1 g) + v) / kernel_temperature).

    The temperature is a buffer of shape (1,), saved with the weights; `set_temperature` changes it.

    Args:
        in_channels: C_in.
        out_channels: Not used, nor is `kernel_size`.
        kernel_size: See above.
        num_kernels: K. One kernel has no attention and no parameters for it.
        kernel_ratio: V1 g is max(int(C_in * kernel_ratio), K) wide. 1/4 as in the paper.

    Raises:
        ValueError: kernel_ratio is negative.
    """
    kernel_temperature: Tensor

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            kernel_ratio: float = 1 / 4,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_kernels)
        check_ratios(kernel_ratio=kernel_ratio)
        self.kernel_hidden = max(int(in_channels * kernel_ratio), num_kernels) if num_kernels > 1 else 0
        self.squeeze, self.kernel = nn.Identity(), nn.Identity()
        if num_kernels > 1:
            self.last_layers = 'kernel',
            self.squeeze = nn.Linear(in_channels, self.kernel_hidden, bias=False, **dd)
            self.kernel = nn.Linear(self.kernel_hidden, num_kernels, **dd)
        self.register_buffer('kernel_temperature', torch.ones(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal with each map's fan-out, zero bias, temperature 1, as FMDConv's kernel attention."""
        if self.num_kernels > 1:
            for layer in self.squeeze, self.kernel:
                draw_(layer.weight)
            nn.init.zeros_(self.kernel.bias)
        nn.init.ones_(self.kernel_temperature)

    def fold(self) -> FoldedAttention:
        if self.num_kernels == 1:
            return FoldedAttention(None, None, None)
        return FoldedAttention(
            linear_map(self.squeeze), None, linear_map(self.kernel, temperature=self.kernel_temperature))

    def attend(self, pooled: Tensor) -> Attention:
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            logits = self.kernel(self.squeeze(pooled).relu())
            kernel_attn = F.softmax(self.as_logits(logits, self.kernel_temperature), dim=1)
        return kernel_attn, None, None, None


@register_notrace_module
class DyConv2d(DynamicConv2d):
    """Dynamic Convolution: kernel_attn is a softmax with a temperature, see `DyConvAttention`.

    Args: those of `DynamicConv2d` (K = 4 as in the paper), and `kernel_ratio`, the hidden layer's width relative to
    C_in (1/4 as in the paper). The paper trains with temperature 30, lowered to 1 in the first 10 epochs.
    """
    method, suffix, arxiv = 'DyConv', 'dy', '1912.03458'
    attention_layer = DyConvAttention
