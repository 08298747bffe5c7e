"""The attention of a dynamic convolution: what the four methods have in common.

An attention turns the images into factors for the kernels, the channels and the kernel taps. The methods differ in it
alone, and each has a file with its attention and its layer:

    cond_conv.py  CondConv  arXiv 1904.04971  kernels (sigmoid)
    dy_conv.py    DyConv    arXiv 1912.03458  kernels (softmax)
    od_conv.py    ODConv    arXiv 2209.07947  kernels (softmax), input channels, output channels, kernel taps (sigmoid)
    fmd_conv.py   FMDConv   arXiv 2503.17530  kernels (softmax), input channels, output channels (sigmoid)

They compute what the authors' codes do, with two differences. Linear maps of the same input are one `nn.Linear`, so
that the attention costs few operations. A training batch of one image uses the running statistics of the BatchNorm
instead of failing.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ['DynamicAttention', 'PooledBatchNorm']

# kernel_attn (B, K), in_attn (B, C_in), out_attn (B, C_out), tap_attn (B, kh * kw); None is 1 everywhere
Attention = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# They ask for the dtype of their input, which torch.fx can't know: it records the calls.
torch.fx.wrap('at_least_float32')
torch.fx.wrap('pool')


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def pool(x: Tensor) -> Tensor:
    """Mean over the pixels, (B, C, H, W) -> (B, C), in the dtype of `x`.

    The gradient of a sum is expanded without being written, where that of `mean` is written as large as the images.
    float16 is the exception: it is summed in float32, since 65536 pixels of ones would overflow.
    """
    total = x.sum((2, 3), dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    return (total / (x.shape[2] * x.shape[3])).to(x.dtype)


def check_ratios(**ratios: float) -> None:
    for name, value in ratios.items():
        if value < 0:
            raise ValueError(f'{name} must not be negative, got {value}')


def draw_(weight: Tensor) -> None:
    """Kaiming normal by the fan-out. On the meta device, where nothing is drawn, PyTorch would take a millisecond."""
    if not weight.is_meta:
        nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')


class PooledBatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` for pooled features (B, C, 1, 1) that a single image can train, too.

    One pooled value has no variance. A training batch of 0 or 1 images is normalised with the running statistics, where
    there are any, and does not change them.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.running_mean is not None and (not self.training or x.shape[0] < 2):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        # From here on as in nn.BatchNorm2d, whose forward TorchScript can't call: it has no super().
        momentum = 0.0
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean, var = (self.running_mean, self.running_var) if self.track_running_stats else (None, None)
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, momentum, self.eps)


class DynamicAttention(nn.Module):
    """Base class: images (B, C_in, H, W) -> (kernel_attn, in_attn, out_attn, tap_attn) of `fmd_timm.dynamic_conv2d`.

    The four are (B, K), (B, C_in), (B, C_out) and (B, kh * kw), or None where the method has no such factor. They are
    float32 also under autocast and in half-precision models, and float64 in float64 models.

    The methods are constructed from the sizes of the convolution, in_channels, out_channels (None where out_attn is not
    wanted), kernel_size (height, width) and num_kernels, and from widths of their own. Each has its `attend`.

    Args:
        num_kernels: K.
    """
    last_layers: tuple[str, ...] = ()  # names of the linear maps in front of sigmoid and softmax

    def __init__(self, num_kernels: int):
        super().__init__()
        self.num_kernels = num_kernels

    def reset_parameters(self) -> None:
        """Initialise as the method's authors do, temperatures 1."""
        raise NotImplementedError(f'{type(self).__name__} has no rule for its initial values')

    def fold(self) -> nn.Module:
        """What computes the same in evaluation mode, at these temperatures, in fewer operations."""
        return self

    @torch.no_grad()
    def make_constant(self) -> None:
        """Zero the last linear maps: kernel_attn is then equal for all kernels, and every gate is sigmoid(0) = 1/2.

        At any temperature. The attention of `fmd_timm.inflate` starts so, and learns from there.
        """
        for name in self.last_layers:
            layer = getattr(self, name)
            layer.weight.zero_()
            layer.bias.zero_()

    def forward(self, x: Tensor) -> Attention:
        return self.attend(pool(x))

    def attend(self, pooled: Tensor) -> Attention:
        """The attention for pooled images (B, C_in)."""
        raise NotImplementedError(f'{type(self).__name__} has no attention')

    def as_logits(self, y: Tensor, temperature: Tensor | None = None) -> Tensor:
        """The output of a last linear map for sigmoid or softmax: at least float32, divided by the temperature."""
        logits = at_least_float32(y)
        return logits if temperature is None else logits / at_least_float32(temperature)

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}'
