"""The layer of all dynamic convolutions: K kernels, an attention that says how to mix them, one operator."""

import torch
import torch.nn as nn
from timm.layers import Conv2dSame, pad_same, to_2tuple
from torch import Tensor

from ..ops import dynamic_conv2d
from .attention import DynamicAttention, draw_
from .prepared import PreparedConv2d

__all__ = ['DynamicConv2d']

# They check the sizes of the images, which torch.fx can't know: it records the calls.
torch.fx.wrap('dynamic_conv2d')
torch.fx.wrap('pad_same')


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


class DynamicConv2d(nn.Module):
    """A drop-in for `nn.Conv2d` whose kernel is mixed from K kernels for every image.

    The base of the four methods, which differ in their attention alone: use `CondConv2d`, `DyConv2d`, `ODConv2d` or
    `FMDConv2d`. The operator is `fmd_timm.dynamic_conv2d`. (B, C_in, H, W) -> (B, C_out, H', W') in the dtype of the
    input.

    timm's torch.fx extraction goes by the class: each method registers its own as a leaf, because the attention depends
    on the batch.

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
        num_kernels: K.
        **attention_args: Widths of the attention: see the named forms.

    Raises:
        ValueError: A size is below 1, or groups does not divide the channels.
    """
    method: str  # what papers and cards call it
    suffix: str  # of the names of its models
    arxiv: str  # number of its paper
    attention_layer: type[DynamicAttention]

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
            device=None,
            dtype=None,
            **attention_args,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        for name, size in dict(
                in_channels=in_channels, out_channels=out_channels, groups=groups, num_kernels=num_kernels).items():
            if size < 1:
                raise ValueError(f'{name} must be at least 1, got {size}')
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
        # What `like` says of the static convolution, and the arguments that it was given but for device and dtype.
        self.tf_same_padding, self.like_args = False, {}

        depthwise = groups == in_channels == out_channels
        self.weight = nn.Parameter(
            torch.empty(num_kernels * out_channels, in_channels // groups, *self.kernel_size, **dd))
        self.bias = nn.Parameter(torch.empty(num_kernels * out_channels, **dd)) if bias else None
        self.attention = self.attention_layer(
            in_channels, None if depthwise else out_channels, self.kernel_size, num_kernels, **attention_args, **dd)
        self._reset_kernels()

    @classmethod
    def like(cls, conv: nn.Conv2d, **kwargs) -> 'DynamicConv2d':
        """A dynamic convolution, newly initialised, with the sizes, device and dtype of `conv`.

        Args:
            conv: The static convolution it is to stand in for, an `nn.Conv2d` or timm's `Conv2dSame` (TensorFlow's
                padding, which depends on the size of the image).
            **kwargs: Arguments of the constructor, over those read from `conv`. None is the same as none given.

        Raises:
            ValueError: `conv` is of another class, which may compute something else, or does not pad with zeros.
        """
        if type(conv) not in (nn.Conv2d, Conv2dSame):
            raise ValueError(f'only nn.Conv2d and Conv2dSame can be made dynamic, got {type(conv).__name__}')
        if conv.padding_mode != 'zeros':
            raise ValueError(f'a dynamic convolution pads with zeros, got padding_mode={conv.padding_mode!r}')
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        args = dict(
            in_channels=conv.in_channels, out_channels=conv.out_channels, kernel_size=conv.kernel_size,
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
            bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype,
        )
        dynamic = cls(**dict(args, **kwargs))
        dynamic.tf_same_padding = isinstance(conv, Conv2dSame) and 'padding' not in kwargs
        dynamic.like_args = {name: value for name, value in kwargs.items() if name not in ('device', 'dtype')}
        return dynamic

    def reset_parameters(self) -> None:
        """Initialise as the authors do: Kaiming normal for each of the K kernels, zero biases, new attention."""
        self._reset_kernels()
        self.attention.reset_parameters()

    def _reset_kernels(self) -> None:
        for kernel in self.weight.chunk(self.num_kernels):  # together they would be taken for K times the fan-out
            draw_(kernel)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        kernel_attn, in_attn, out_attn, tap_attn = self.attention(x)
        if self.tf_same_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return dynamic_conv2d(
            x, self.weight, kernel_attn, in_attn, out_attn, tap_attn, self.bias,
            self.stride, self.padding, self.dilation, self.groups,
        )

    def fuse(self) -> PreparedConv2d:
        """The layer prepared for inference, which timm's `reparameterize_model` puts in its place.

        The BatchNorm behind it stays as it is. `prepare_for_inference` folds it too.
        """
        return PreparedConv2d(self)

    def extra_repr(self) -> str:
        padding = 'same as TensorFlow' if self.tf_same_padding else self.padding
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, '
            f'num_kernels={self.num_kernels}'
        )
