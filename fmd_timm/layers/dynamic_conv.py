"""Dynamic convolutions as layers: a bank of K kernels, an attention that says how to mix them, one operator."""

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import register_notrace_module
from torch import Tensor

from ..ops import dynamic_conv2d
from .attention import FMDAttention

__all__ = ['FMDConv2d']


def _explicit_padding(
        padding: str | int | tuple[int, int],
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
) -> tuple[int, int]:
    if padding == 'valid':
        return 0, 0
    if padding == 'same':
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation)]
        if stride != (1, 1) or any(t % 2 for t in total):
            raise ValueError(f"padding='same' needs stride 1 and odd kernels, got {kernel_size=}, {stride=}")
        return total[0] // 2, total[1] // 2
    if isinstance(padding, str):
        raise ValueError(f"padding must be 'same', 'valid' or pixels, got {padding!r}")
    return to_2tuple(padding)


@register_notrace_module  # its attention depends on the batch: a leaf for timm's torch.fx extraction
class FMDConv2d(nn.Module):
    """FMDConv (arXiv 2503.17530): a drop-in for `nn.Conv2d` whose kernel is mixed from K kernels for every image.

    Attention over the input channels, the kernels and the output channels: see `FMDAttention` for the equations,
    `fmd_timm.ops.dynamic_conv2d` for the operator. (B, C_in, H, W) -> (B, C_out, H', W') in the dtype of the input.

    The K kernels are one parameter `weight` (K * C_out, C_in / groups, kh, kw), kernel k in rows k * C_out and on, and
    the biases `bias` (K * C_out,): four dimensions, so that `model.to(memory_format=torch.channels_last)` works.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: Pixels, one number or (height, width).
        stride: Pixels.
        padding: Pixels of zeros on each side, 'same' (stride 1, odd kernels) or 'valid'.
        dilation: Pixels between kernel taps.
        groups: Blocked connections from input to output channels. Depthwise (groups = C_in = C_out) has no out_attn.
        bias: K biases, mixed as the kernels are.
        num_kernels: K. 4 as in the paper.
        reduction: Width of the gates' hidden layer, max(int(C_in * reduction), 16). 1/16 as in the paper.
        kernel_ratio: Width of the kernel attention's hidden layer, int(C_in * kernel_ratio) + 1. 1/4 as in the paper.

    Raises:
        ValueError: A size is below 1, or groups does not divide the channels.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int | tuple[int, int],
            stride: int | tuple[int, int] = 1,
            padding: str | int | tuple[int, int] = 0,
            dilation: int | tuple[int, int] = 1,
            groups: int = 1,
            bias: bool = True,
            num_kernels: int = 4,
            reduction: float = 1 / 16,
            kernel_ratio: float = 1 / 4,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        for name, size in dict(
                in_channels=in_channels, out_channels=out_channels, groups=groups, num_kernels=num_kernels).items():
            if size < 1:
                raise ValueError(f'{name} must be at least 1, got {size}')
        for name, value in dict(reduction=reduction, kernel_ratio=kernel_ratio).items():
            if value < 0:
                raise ValueError(f'{name} must not be negative, got {value}')
        if in_channels % groups or out_channels % groups:
            raise ValueError(f'groups must divide {in_channels=} and {out_channels=}, got {groups}')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = to_2tuple(kernel_size)
        self.stride = to_2tuple(stride)
        self.dilation = to_2tuple(dilation)
        self.padding = _explicit_padding(padding, self.kernel_size, self.stride, self.dilation)
        self.groups = groups
        self.num_kernels = num_kernels

        depthwise = groups == in_channels == out_channels
        self.weight = nn.Parameter(
            torch.empty(num_kernels * out_channels, in_channels // groups, *self.kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(num_kernels * out_channels, **dd)) if bias else None
        self.attention = FMDAttention(
            in_channels, None if depthwise else out_channels, num_kernels, reduction, kernel_ratio, **dd)
        self._reset_kernels()

    @classmethod
    def like(cls, conv: nn.Conv2d, **kwargs) -> 'FMDConv2d':
        """A dynamic convolution, newly initialised, with the sizes, device and dtype of `conv`.

        Args:
            conv: The static convolution it is to stand in for.
            **kwargs: Arguments of the constructor, over those read from `conv`.
        """
        if conv.padding_mode != 'zeros':
            raise ValueError(f'a dynamic convolution pads with zeros, got padding_mode={conv.padding_mode!r}')
        args = dict(
            in_channels=conv.in_channels, out_channels=conv.out_channels, kernel_size=conv.kernel_size,
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
            bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
        )
        return cls(**dict(args, **kwargs))

    def reset_parameters(self) -> None:
        """Initialise as the authors do: Kaiming normal for each of the K kernels, zero biases, new attention."""
        self._reset_kernels()
        self.attention.reset_parameters()

    def _reset_kernels(self) -> None:
        for kernel in self.weight.chunk(self.num_kernels):  # together they would be taken for K times the fan-out
            nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        kernel_attn, in_attn, out_attn = self.attention(x)
        tap_attn: Tensor | None = None
        return dynamic_conv2d(
            x, self.weight, kernel_attn, in_attn, out_attn, tap_attn, self.bias,
            self.stride, self.padding, self.dilation, self.groups,
        )

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, '
            f'num_kernels={self.num_kernels}'
        )
