"""ODConv: Omni-Dimensional Dynamic Convolution (ICLR 2022, arXiv 2209.07947)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from .attention import Attention, DynamicAttention, PooledBatchNorm, check_ratios, draw_
from .dynamic_conv import DynamicConv2d
from .folded import FoldedAttention, linear_map

__all__ = ['ODConv2d', 'ODConvAttention']


class ODConvAttention(DynamicAttention):
    """The four attentions of ODConv.

    For the pooled input g (B, C_in), with A, F, S, V the parts of `heads`, in this order:

        h = relu(BN(R g)),  in_attn = sigmoid((A h + a) / T),  out_attn = sigmoid((F h + f) / T),
        tap_attn = sigmoid((S h + s) / T),  kernel_attn = softmax((V h + v) / T)

    ODConv has one temperature T for all four, the buffer `kernel_temperature` of shape (1,), saved with the weights.

    Args:
        in_channels: C_in.
        out_channels: C_out; None where out_attn is not wanted (depthwise convolutions: it would equal in_attn).
        kernel_size: Height and width. A kernel of one tap has no tap_attn.
        num_kernels: K. One kernel has no kernel attention and no parameters for it.
        reduction: h is max(int(C_in * reduction), 16) wide, as in the authors' code.

    Raises:
        ValueError: reduction is negative.
    """
    kernel_temperature: Tensor
    last_layers = 'heads',

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_kernels)
        check_ratios(reduction=reduction)
        self.in_channels = in_channels
        self.out_channels = out_channels or 0
        self.num_taps = kernel_size[0] * kernel_size[1] if kernel_size != (1, 1) else 0
        self.hidden = max(int(in_channels * reduction), 16)
        self.sizes = [in_channels, self.out_channels, self.num_taps, num_kernels if num_kernels > 1 else 0]

        self.squeeze = nn.Linear(in_channels, self.hidden, bias=False, **dd)
        self.bn = PooledBatchNorm(self.hidden, **dd)
        self.heads = nn.Linear(self.hidden, sum(self.sizes), **dd)
        self.register_buffer('kernel_temperature', torch.ones(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do: Kaiming normal with each part's own fan-out, zero biases, temperature 1."""
        for part in self.squeeze.weight, *self.heads.weight.split(self.sizes):
            if part.numel() > 0:
                draw_(part)
        nn.init.zeros_(self.heads.bias)
        self.bn.reset_parameters()
        nn.init.ones_(self.kernel_temperature)

    def fold(self) -> FoldedAttention:
        weight, bias = linear_map(self.heads, temperature=self.kernel_temperature)
        gates, kernel = zip(*(part.split([sum(self.sizes[:3]), self.sizes[3]]) for part in (weight, bias)))
        return FoldedAttention(
            linear_map(self.squeeze, norm=self.bn), gates, kernel if self.num_kernels > 1 else None,
            gate_sizes=self.sizes[:3])

    def attend(self, pooled: Tensor) -> Attention:
        hidden = self.bn(self.squeeze(pooled)[:, :, None, None]).flatten(1).relu()
        logits = self.as_logits(self.heads(hidden), self.kernel_temperature)
        taps_at = self.in_channels + self.out_channels
        kernels_at = taps_at + self.num_taps
        gates = torch.sigmoid(logits[:, :kernels_at])
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            kernel_attn = F.softmax(logits[:, kernels_at:], dim=1)
        out_attn: Tensor | None = None
        if self.out_channels > 0:
            out_attn = gates[:, self.in_channels:taps_at]
        tap_attn: Tensor | None = None
        if self.num_taps > 0:
            tap_attn = gates[:, taps_at:]
        return kernel_attn, gates[:, :self.in_channels], out_attn, tap_attn


@register_notrace_module
class ODConv2d(DynamicConv2d):
    """ODConv: attention over kernels, input and output channels and kernel taps, see `ODConvAttention`.

    Args: those of `DynamicConv2d` (K = 4 is the authors' "4x"), and `reduction`, the hidden layer's width relative to
    C_in, at least 16 (1/16 as in the paper).
    """
    method, suffix, arxiv = 'ODConv', 'od', '2209.07947'
    attention_layer = ODConvAttention
