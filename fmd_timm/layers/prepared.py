"""A dynamic convolution prepared for inference, with the BatchNorm behind it: fewer operations, the fastest algorithm.

A BatchNorm behind a dynamic convolution scales its output channels, as does each of the K kernels: the scale goes into
the kernels, the shift stays an addition, since the gates would multiply it. The BatchNorm of the attention goes into
the squeeze in front of it.
"""
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor

from ..ops import c_conv, dynamic_conv2d, mixed_bias, per_image
from ..ops.case import Attention, case_of, empty_as
from ..ops.fastest import fastest
from ..ops.layout import slices
from ..ops.operator import algorithms, check, convolve, is_plain
from .attention import at_least_float32
from .folded import norm_as_affine

__all__ = ['PreparedConv2d']

INTEGERS = torch.int16, torch.int8
POINTWISE = (1, 1), (1, 1), (0, 0), (1, 1), 1  # size, stride, padding, dilation, groups: products of two matrices

TIMED_SIZES = 8  # of images, per layer: in a service that gets images of every size, each would be slow the first time


class _Made(NamedTuple):
    """What a prepared layer made of its parameters."""
    state: list[tuple[int, int]]  # where they were and which version they had
    memory: list[Tensor]  # keeps theirs, so that no other parameter gets it
    layer: c_conv.Layer | None
    algorithms: dict[tuple, ModuleType]  # that are the fastest, by the shape and layout of the images and the threads


class PreparedConv2d(nn.Module):
    """A dynamic convolution for inference together with the BatchNorm behind it.

    On the CPU it times, for the first few sizes of images, what is fastest here (`ops/fastest.py`): attention and
    convolution as one call into C, which has its own layout of the kernels, attention and kernels in C and convolutions
    by PyTorch, or one of the algorithms of PyTorch. Other devices, gradients, autocast, tracing and compilation go
    through the operator.

    Args:
        conv: The `DynamicConv2d`, whose attention becomes this one's.
        norm: The BatchNorm in evaluation mode, if there is one.
        kernel_dtype: torch.int16 or torch.int8 to keep the K kernels as integers, which `scale`, the largest number of
            each output channel, makes floats of again; a single kernel stays as it is. None keeps them as they are.

    Raises:
        ValueError: The attention of the layer was replaced, by quantization for instance; kernel_dtype is another one,
            or the kernels are to be integers and are not finite.
    """

    def __init__(
            self, conv: nn.Module, norm: nn.BatchNorm2d | None = None, kernel_dtype: torch.dtype | None = None):
        super().__init__()
        self.num_kernels = conv.num_kernels
        self.kernel_size, self.tf_same_padding = conv.kernel_size, conv.tf_same_padding
        self.conv_args = conv.stride, conv.padding, conv.dilation, conv.groups
        weight, bias, self.scale, self.shift = conv.weight.detach(), conv.bias, None, None
        if norm is not None:
            scale, shift = norm_as_affine(norm)
            self.shift = nn.Parameter(shift)
            scale = scale.repeat(conv.num_kernels)
            weight = weight * scale[:, None, None, None]
            bias = None if bias is None else bias * scale
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        self.attention = conv.attention.fold()
        self._made: _Made | None = None
        if kernel_dtype is not None:
            self.keep_kernels(kernel_dtype)

    def keep_kernels(self, dtype: torch.dtype) -> None:
        """As `kernel_dtype` of the constructor says."""
        if dtype not in INTEGERS:
            raise ValueError(f'kernel_dtype must be torch.int16, torch.int8 or None, got {dtype}')
        if self.num_kernels > 1:
            weight, scale = _as_integers(self.weight, self.num_kernels, dtype)
            self.weight, self.scale = nn.Parameter(weight, requires_grad=False), nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        parameters = *self._parameters.values(), *self.attention._parameters.values()
        if not self._is_plain(x, parameters):
            return self._by_operator(x)
        # Changes of a parameter are seen, except through `.data` in the same memory: PyTorch keeps no note of those.
        state = [(t.data_ptr(), t._version) for t in parameters if t is not None]
        made = self._made
        if made is None or made.state != state:
            memory = [t.detach() for t in parameters if t is not None]
            made = self._made = _Made(state, memory, self._in_c(), {})
        key = x.shape, x.is_contiguous(memory_format=torch.channels_last), torch.get_num_threads()
        algorithm = made.algorithms.get(key)
        if algorithm is None:
            algorithm = made.algorithms[key] = self._fastest(x, made)
        return self._by(algorithm, x, made.layer)

    def _is_plain(self, x: Tensor, parameters: tuple[Tensor | None, ...]) -> bool:
        """Whether its own ways are open: on the CPU, where changes of the parameters are seen."""
        return (
            x.dtype == self._dtype in (torch.float32, torch.float64) and x.device.type == 'cpu' and x.ndim == 4
            and x.numel() > 0 and is_plain(x, *parameters) and not self.weight.is_inference()
        )

    @property
    def _dtype(self) -> torch.dtype:
        return (self.weight if self.scale is None else self.scale).dtype

    def _by_operator(self, x: Tensor) -> Tensor:
        attention, weight = Attention(*self.attention(x)), self.weight
        if self.scale is not None:  # numbers up to 1, which stay finite in float16
            weight = (weight * (1 / torch.iinfo(weight.dtype).max)).to(self.scale.dtype)
        y = dynamic_conv2d(self._padded(x), weight, *_scaled(attention, self.scale), None, *self.conv_args)
        if self.bias is not None:
            y = y + mixed_bias(self.bias, attention.kernel_attn, attention.out_attn).to(y.dtype)[:, :, None, None]
        return y if self.shift is None else y + self.shift.to(y.dtype)[:, None, None]

    def _by(self, algorithm: ModuleType, x: Tensor, layer: c_conv.Layer | None) -> Tensor:
        if algorithm is c_conv:
            return layer(x)
        if algorithm is per_image and layer is not None and layer.mixes and self.bias is None:
            return self._each_by_its_kernel(x, layer)
        attention = Attention(*(self.attention(x) if layer is None else layer.attend(x)))
        y = convolve(self._padded(x), self.weight, _scaled(attention, self._unit()), *self.conv_args, algorithm)
        if self.bias is not None:
            y += mixed_bias(self.bias, attention.kernel_attn, attention.out_attn)[:, :, None, None]
        return y if self.shift is None else y.add_(self.shift[:, None, None])

    def _each_by_its_kernel(self, x: Tensor, layer: c_conv.Layer) -> Tensor:
        """As `per_image`, with kernels that C mixes: all that a static convolution doesn't do is one call into C."""
        if len(x) == 1:
            return F.conv2d(self._padded(x), layer.mixed(x)[0], self.shift, *self.conv_args)
        if (self.kernel_size, *self.conv_args) == POINTWISE:
            return self._each_times_its_kernel(x, layer)
        images, y = self._padded(x).split(1), None
        for part in slices(len(x), layer.images_at_once):
            for b, kernel in enumerate(layer.mixed(x[part]), part.start):
                result = F.conv2d(images[b], kernel, self.shift, *self.conv_args)
                y = empty_as(result, len(x), *result.shape[1:]) if y is None else y
                y[b:b + 1] = result  # the next takes the same memory
        return y

    def _each_times_its_kernel(self, x: Tensor, layer: c_conv.Layer) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, P, I)
        y = x.new_zeros(*pixels.shape[:2], len(self.weight) // self.num_kernels)
        if self.shift is not None:
            y.copy_(self.shift)
        for part in slices(len(x), layer.images_at_once):
            y[part].baddbmm_(pixels[part], layer.mixed(x[part])[..., 0, 0].mT)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _unit(self) -> Tensor | None:
        """What an integer 1 stands for in each output channel (O,), where kernels are integers."""
        return None if self.scale is None else self.scale / torch.iinfo(self.weight.dtype).max

    def _fastest(self, x: Tensor, made: '_Made') -> ModuleType:
        """The algorithm for images of this size; that of C stands for attention and convolution in one call."""
        *_, groups = self.conv_args
        if x.shape[1] != groups * self.weight.shape[1]:
            raise ValueError(f'x must have shape (B, {groups * self.weight.shape[1]}, H, W), got {tuple(x.shape)}')
        padded, attention = self._padded(x), _scaled(Attention(*self.attention(x)), self._unit())
        check(padded, x.new_empty(1).expand(self.weight.shape), attention, *self.conv_args)
        case = case_of(padded, self.weight, attention, *self.conv_args)
        case = case._replace(channels_last=True, weight_channels_last=True)  # C copies what is laid out otherwise
        candidates = [algorithm for algorithm in algorithms('prepared', case) if algorithm is not c_conv]
        if made.layer is not None and made.layer.convolves and (case.is_depthwise or c_conv.supports(case)):
            candidates.insert(0, c_conv)
        return fastest(
            'prepared', case, candidates, lambda tried: self._by(tried, x, made.layer),
            may_time=len(made.algorithms) < TIMED_SIZES)

    def _in_c(self) -> c_conv.Layer | None:
        """The attention in C, and the convolution too unless it has a bias or TensorFlow's padding."""
        attention = self.attention
        if attention.kernel_weight is None or self._dtype != torch.float32 or not c_conv.is_available():
            return None
        maps = [None if weight is None else (weight, bias) for weight, bias in (
            (attention.squeeze_weight, attention.squeeze_bias), (attention.gates_weight, attention.gates_bias),
            (attention.kernel_weight, attention.kernel_bias))]
        *pairs, groups = self.conv_args
        is_convolved = (
            self.bias is None and not self.tf_same_padding and c_conv.takes(self.weight, self.num_kernels, groups))
        return c_conv.Layer(
            *maps, attention.competes, attention.gate_sizes, groups * self.weight.shape[1],
            self.weight, is_convolved, self._unit(), self.shift, *pairs)

    def _padded(self, x: Tensor) -> Tensor:
        stride, _, dilation, _ = self.conv_args
        return pad_same(x, self.kernel_size, stride, dilation) if self.tf_same_padding else x

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _made=None)

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            'a prepared network can not be scripted: use torch.jit.trace or torch.export, or script the network it was '
            'prepared from')

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}, kernel_size={self.kernel_size}, stride={self.conv_args[0]}'


def _scaled(attention: Attention, scale: Tensor | None) -> Attention:
    """The attention whose result is `scale` (O,) times that of another, which None leaves as it is."""
    if scale is None:
        return attention
    if attention.out_attn is None:
        return attention._replace(out_attn=scale.expand(attention.kernel_attn.shape[0], -1))
    return attention._replace(out_attn=scale * attention.out_attn)


def _as_integers(weight: Tensor, num_kernels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The kernels (K * O, I, kh, kw) as integers, and the largest magnitude of each output channel (O,).

    A channel has their whole range whatever its size, of which folded BatchNorms leave any: float16 would overflow, or
    round small ones more.
    """
    weight = weight.detach()
    largest = weight.unflatten(0, (num_kernels, -1)).abs().amax((0, 2, 3, 4))
    if not largest.isfinite().all():
        raise ValueError(f'its kernels must be finite to be kept as {dtype}')
    smallest = torch.finfo(torch.float32).tiny  # a channel of zeros stays one
    of_rows = at_least_float32(largest).clamp(min=smallest).repeat(num_kernels)[:, None, None, None]
    return (weight / of_rows * torch.iinfo(dtype).max).round().to(dtype), largest
