"""CondConv: Conditionally Parameterized Convolutions for Efficient Inference (arXiv 1904.04971)."""

import torch
import torch.nn as nn
from timm.models import register_notrace_module
from torch import Tensor

from .attention import Attention, DynamicAttention
from .dynamic_conv import DynamicConv2d
from .folded import FoldedAttention, linear_map

__all__ = ['CondConv2d', 'CondConvAttention']


class CondConvAttention(DynamicAttention):
    """Routing of CondConv: kernel_attn = sigmoid(R g + r) for the pooled input g (B, C_in).

    The kernels do not compete: their kernel_attn does not sum to 1. There is no squeeze and no temperature.

    Args:
        in_channels: C_in.
        out_channels: Not used, nor is `kernel_size`.
        kernel_size: See above.
        num_kernels: K. One kernel has its kernel_attn too.
    """
    last_layers = 'kernel',

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            device=None,
            dtype=None,
    ):
        super().__init__(num_kernels)
        self.squeeze = nn.Identity()
        self.kernel = nn.Linear(in_channels, num_kernels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as TensorFlow's and timm's CondConv networks do: uniform in +-1 / sqrt(C_in + K), zero bias."""
        bound = 1 / (self.kernel.in_features + self.kernel.out_features) ** 0.5
        nn.init.uniform_(self.kernel.weight, -bound, bound)
        nn.init.zeros_(self.kernel.bias)

    def fold(self) -> FoldedAttention:
        return FoldedAttention(None, None, linear_map(self.kernel), competes=False)

    def attend(self, pooled: Tensor) -> Attention:
        return torch.sigmoid(self.as_logits(self.kernel(self.squeeze(pooled)))), None, None, None


@register_notrace_module
class CondConv2d(DynamicConv2d):
    """CondConv: kernel_attn is the sigmoid of a linear map, see `CondConvAttention`.

    Args: those of `DynamicConv2d`. The paper has K = 8 kernels; the default is 4 as in the other methods.
    """
    method, suffix, arxiv = 'CondConv', 'cond', '1904.04971'
    attention_layer = CondConvAttention
