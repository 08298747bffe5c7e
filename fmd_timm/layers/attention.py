"""The attention of FMDConv (arXiv 2503.17530): pooled features -> weights of kernels and channels.

Differs from the authors' code in form only: both squeezes are one linear map and both gates another, so that the branch
costs few launches, and a training batch of one image uses the running statistics of the BatchNorm instead of failing.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['FMDAttention', 'set_temperature']


class PooledBatchNorm(nn.BatchNorm1d):
    """BatchNorm over pooled features (B, C) that uses its running statistics for a training batch of 0 or 1 images.

    One pooled value has no variance. Statistics over more images than one process has (`nn.SyncBatchNorm`) are still
    possible: `convert_sync_batchnorm` replaces this module as any other BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        use_batch = False
        if self.training and x.shape[0] > 1:  # a branch: batch_norm takes no symbolic bool (torch.compile)
            use_batch = True
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, use_batch, self.momentum, self.eps)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class FMDAttention(nn.Module):
    """Attention over the input channels, the K kernels and the output channels.

    For the pooled input g (B, C_in), with R and V1 the two parts of `squeeze`, A and F those of `gates`:

        h = relu(BN(R g)),  in_attn = sigmoid((A h + a) / gate_temperature),
        out_attn = sigmoid((F h + f) / gate_temperature),
        kernel_attn = softmax((V2 relu(V1 g) + v) / kernel_temperature)

    Both temperatures are buffers of shape (1,), saved with the weights; `set_temperature` changes them.

    Args:
        in_channels: C_in.
        out_channels: C_out; None where out_attn is not wanted (depthwise convolutions: it would equal in_attn).
        num_kernels: K. One kernel has no kernel attention and no parameters for it.
        reduction: h is max(int(C_in * reduction), 16) wide, as in the authors' code.
        kernel_ratio: V1 g is int(C_in * kernel_ratio) + 1 wide (K wide for images, C_in = 3), as in the authors' code.
    """
    kernel_temperature: Tensor
    gate_temperature: Tensor

    def __init__(
            self,
            in_channels: int,
            out_channels: int | None,
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            kernel_ratio: float = 1 / 4,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels or 0
        self.num_kernels = num_kernels
        self.gate_hidden = max(int(in_channels * reduction), 16)
        self.kernel_hidden = 0
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
                nn.init.kaiming_normal_(part, mode='fan_out', nonlinearity='relu')
        for bias in biases:
            nn.init.zeros_(bias)
        self.bn.reset_parameters()
        nn.init.ones_(self.kernel_temperature)
        nn.init.ones_(self.gate_temperature)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """x (B, C_in, H, W) -> kernel_attn (B, K) or None, in_attn (B, C_in), out_attn (B, C_out) or None.

        The attention is float32 also under autocast and in half-precision models (float64 in float64 models).
        """
        squeezed = self.squeeze(x.mean((2, 3)))  # (B, gate_hidden + kernel_hidden)
        hidden = self.bn(squeezed[:, :self.gate_hidden]).relu()
        gates = torch.sigmoid(_at_least_float32(self.gates(hidden)) / _at_least_float32(self.gate_temperature))
        out_attn: Tensor | None = None
        if self.out_channels > 0:
            out_attn = gates[:, self.in_channels:]
        kernel_attn: Tensor | None = None
        if self.num_kernels > 1:
            logits = self.kernel(squeezed[:, self.gate_hidden:].relu())
            kernel_attn = F.softmax(_at_least_float32(logits) / _at_least_float32(self.kernel_temperature), dim=1)
        return kernel_attn, gates[:, :self.in_channels], out_attn

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}'


def set_temperature(model: nn.Module, kernel: float | None = None, gate: float | None = None) -> None:
    """Set the temperatures of every dynamic convolution in `model`, in place.

    High temperatures make the attention uniform, so that all kernels learn; 1 is what training ends at.

    Args:
        model: A network, a layer or a wrapper of one (DDP, EMA).
        kernel: Temperature of the softmax over the kernels; None leaves it.
        gate: Temperature of the sigmoids over the channels; None leaves it.

    Raises:
        ValueError: A temperature is not positive and finite, or `model` has no dynamic convolution.
    """
    for name, value in ('kernel', kernel), ('gate', gate):
        if value is not None and not 0 < value < float('inf'):
            raise ValueError(f'{name} temperature must be positive and finite, got {value}')
    attentions = [module for module in model.modules() if isinstance(module, FMDAttention)]
    if not attentions:
        raise ValueError(f'{type(model).__name__} has no dynamic convolution to set a temperature of')
    for attention in attentions:
        if kernel is not None:
            attention.kernel_temperature.fill_(kernel)
        if gate is not None:
            attention.gate_temperature.fill_(gate)
