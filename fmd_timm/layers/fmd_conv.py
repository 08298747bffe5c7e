"""FMDConv: Fast Multi-Attention Dynamic Convolution via Speed-Accuracy Trade-off (arXiv 2503.17530)."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor

from .attention import Attention, DynamicAttention, PooledBatchNorm, check_ratios, draw_
from .dynamic_conv import DynamicConv2d
from .folded import FoldedAttention, linear_map

__all__ = ['FMDAttention', 'FMDConv2d']


class FMDAttention(DynamicAttention):
    """Attention over the input channels, the K kernels and the output channels.

    For the pooled input g (B, C_in), with R and V1 the two parts of `squeeze`, A and F those of `gates`:

        h = relu(BN(R g)),  in_attn = sigmoid((A h + a) / gate_temperature),
        out_attn = sigmoid((F h + f) / gate_temperature),
        kernel_attn = softmax((V2 relu(V1 g) + v) / kernel_temperature)

    Both temperatures are buffers of shape (1,), saved with the weights; `set_temperature` changes them.

    Args:
        in_channels: C_in.
        out_channels: C_out; None where out_attn is not wanted (depthwise convolutions: it would equal in_attn).
        kernel_size: Not used.
        num_kernels: K. One kernel has no kernel attention and no parameters for it.
        reduction: h is max(int(C_in * reduction), 16) wide, as in the authors' code.
        kernel_ratio: V1 g is int(C_in * kernel_ratio) + 1 wide (K wide for images, C_in = 3), as in the authors' code.

    Raises:
        ValueError: reduction or kernel_ratio is negative.
    """
    kernel_temperature: Tensor
    gate_temperature: Tensor

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            kernel_size: tuple[int, int],
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            kernel_ratio: float = 1 / 4,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(num_kernels)
        check_ratios(reduction=reduction, kernel_ratio=kernel_ratio)
        self.in_channels = in_channels
        self.out_channels = out_channels or 0
        self.gate_hidden = max(int(in_channels * reduction), 16)
        self.kernel_hidden = 0
        self.last_layers = ('gates', 'kernel') if num_kernels > 1 else ('gates',)
        if num_kernels > 1:
            self.kernel_hidden = num_kernels if in_channels == 3 else int(in_channels * kernel_ratio) + 1

        # nn.Linear, not nn.Conv2d: timm's init_weights re-initialises every nn.Conv2d it finds
        self.squeeze = nn.Linear(in_channels, self.gate_hidden + self.kernel_hidden, bias=False, **dd)
        self.bn = PooledBatchNorm(self.gate_hidden, **dd)
        self.gates = nn.Linear(self.gate_hidden, in_channels + self.out_channels, **dd)
        self.kernel = nn.Linear(self.kernel_hidden, num_kernels, **dd) if num_kernels > 1 else nn.Identity()
        self.register_buffer('kernel_temperature', torch.ones(1, **dd))
        self.register_buffer('gate_temperature', torch.ones(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors do: Kaiming normal with each part's own fan-out, zero biases, temperatures 1."""
        parts = [
            *self.squeeze.weight.split([self.gate_hidden, self.kernel_hidden]),
            *self.gates.weight.split([self.in_channels, self.out_channels]),
        ]
        biases = [self.gates.bias]
        if self.num_kernels > 1:
            parts.append(self.kernel.weight)
            biases.append(self.kernel.bias)
        for part in parts:
            if part.numel() > 0:
                draw_(part)
        for bias in biases:
            nn.init.zeros_(bias)
        self.bn.reset_parameters()
        nn.init.ones_(self.kernel_temperature)
        nn.init.ones_(self.gate_temperature)

    def fold(self) -> FoldedAttention:
        return FoldedAttention(
            linear_map(self.squeeze, norm=self.bn),
            linear_map(self.gates, temperature=self.gate_temperature),
            linear_map(self.kernel, temperature=self.kernel_temperature) if self.num_kernels > 1 else None,
            gate_sizes=[self.in_channels, self.out_channels, 0],
            hidden_sizes=[self.gate_hidden, self.kernel_hidden],
        )

    def attend(self, pooled: Tensor) -> Attention:
        squeezed = self.squeeze(pooled)  # (B, gate_hidden + kernel_hidden)
        hidden = self.bn(squeezed[:, :self.gate_hidden, None, None]).flatten(1).relu()
        gates = torch.sigmoid(self.as_logits(self.gates(hidden), self.gate_temperature))
        out_attn: Tensor | None = None
        if self.out_channels > 0:
            out_attn = gates[:, self.in_channels:]
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            logits = self.kernel(squeezed[:, self.gate_hidden:].relu())
            kernel_attn = F.softmax(self.as_logits(logits, self.kernel_temperature), dim=1)
        return kernel_attn, gates[:, :self.in_channels], out_attn, None


@register_notrace_module
class FMDConv2d(DynamicConv2d):
    """FMDConv: attention over kernels, input and output channels, see `FMDAttention`.

    Args: those of `DynamicConv2d` (K = 4 as in the paper), `reduction`, the width of the gates' hidden layer relative
    to C_in (1/16 as in the paper, at least 16 channels), and `kernel_ratio`, that of the kernel attention's hidden
    layer, which has int(C_in * kernel_ratio) + 1 channels (1/4 as in the paper).
    """
    method, suffix, arxiv = 'FMDConv', 'fmd', '2503.17530'
    attention_layer = FMDAttention
