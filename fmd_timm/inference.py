"""Networks prepared for inference: BatchNorms folded, kernels laid out for their convolutions, no gradients.

A BatchNorm behind a dynamic convolution scales its output channels, as does each of the K kernels: the scale goes into
the kernels, the shift stays an addition, since the gates would multiply it. The BatchNorm of the attention goes into
the squeeze in front of it.
"""
import collections
import copy
import logging
from types import ModuleType
from typing import NamedTuple

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, pad_same
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import DynamicConv2d
from .layers.folded import norm_as_affine
from .ops import c_conv, dynamic_conv2d, mixed_bias
from .ops.case import Attention, case_of
from .ops.fastest import fastest
from .ops.operator import algorithms, check, convolve, is_plain

__all__ = ['prepare_for_inference']

_logger = logging.getLogger(__name__)

TIMED_SIZES = 8  # of images, per layer: in a service that gets images of every size, each would be slow the first time


def prepare_for_inference(
        model: nn.Module, inplace: bool = False, example_input: Tensor | None = None) -> nn.Module:
    """A network that computes the same in evaluation mode, faster; it can't be trained or set to other temperatures.

    Outputs agree to 1e-5 (relative, float32). Static convolutions are fused with their BatchNorms too. On the CPU,
    dynamic convolutions keep their kernels in another layout too, as large as they are, from their first call. The
    first image of a size takes longer: it times what is fastest here, and some C is compiled (`ops/c_conv.py`). Save
    the weights before: those of the prepared network have other keys.

    Args:
        model: A network, in any dtype and on any device. One that torch.fx can't trace keeps its BatchNorms.
        inplace: Change `model` itself instead of a copy, which frees its memory.
        example_input: Images (B, C, H, W) such as will be classified, to time everything now and not when they come.

    Returns:
        The network in evaluation mode, channels_last, without gradients of its parameters.

    Raises:
        ValueError: A dynamic convolution can't be prepared; names it. Prepare before you quantize.
    """
    model = (model if inplace else copy.deepcopy(model)).eval()
    if isinstance(model, DynamicConv2d):
        model = PreparedConv2d(model)
    else:
        _prepare_modules(model)
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    if example_input is not None:
        with torch.inference_mode():
            model(example_input)
    return model


def _prepare_modules(model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for conv_name, norm_name in _followed_by_norm(model):
        conv, norm = modules[conv_name], modules[norm_name]
        is_dynamic = isinstance(conv, DynamicConv2d)
        fused = _prepared(conv_name, conv, norm) if is_dynamic else fuse_conv_bn_eval(conv, norm)
        model.set_submodule(conv_name, fused)
        model.set_submodule(norm_name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    for name, module in list(model.named_modules()):
        if isinstance(module, DynamicConv2d):  # with no BatchNorm behind it
            model.set_submodule(name, _prepared(name, module))


def _prepared(name: str, conv: DynamicConv2d, norm: nn.BatchNorm2d | None = None) -> 'PreparedConv2d':
    try:
        return PreparedConv2d(conv, norm)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


class _Made(NamedTuple):
    """What a prepared layer made of its parameters."""
    state: list[tuple[int, int]]  # where they were and which version they had
    memory: list[Tensor]  # keeps theirs, so that no other parameter gets it
    layer: c_conv.Layer | None
    algorithms: dict[tuple, ModuleType]  # that are the fastest, by the shape and layout of the images and the threads


class PreparedConv2d(nn.Module):
    """A dynamic convolution for inference together with the BatchNorm behind it.

    On the CPU it times, for the first few sizes of images, what is fastest here (`ops/fastest.py`): attention and
    convolution as one call into C, which has its own layout of the kernels, or one of the algorithms of PyTorch. Other
    devices, gradients, autocast, tracing and compilation go through the operator.

    Args:
        conv: The layer, whose attention becomes this one's.
        norm: The BatchNorm in evaluation mode, if there is one.

    Raises:
        ValueError: The attention of the layer was replaced, by quantization for instance.
    """

    def __init__(self, conv: DynamicConv2d, norm: nn.BatchNorm2d | None = None):
        super().__init__()
        self.num_kernels = conv.num_kernels
        self.kernel_size, self.tf_same_padding = conv.kernel_size, conv.tf_same_padding
        self.conv_args = conv.stride, conv.padding, conv.dilation, conv.groups
        weight, bias, self.shift = conv.weight.detach(), conv.bias, None
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
            x.dtype == self.weight.dtype in (torch.float32, torch.float64) and x.device.type == 'cpu' and x.ndim == 4
            and x.numel() > 0 and is_plain(x, *parameters) and not self.weight.is_inference()
        )

    def _by_operator(self, x: Tensor) -> Tensor:
        attention = self.attention(x)
        y = dynamic_conv2d(self._padded(x), self.weight, *attention, self.bias, *self.conv_args)
        return y if self.shift is None else y + self.shift.to(y.dtype)[:, None, None]

    def _by(self, algorithm: ModuleType, x: Tensor, layer: c_conv.Layer | None) -> Tensor:
        if algorithm is c_conv:
            return layer(x)
        attention = Attention(*(self.attention(x) if layer is None else layer.attend(x)))
        y = convolve(self._padded(x), self.weight, attention, *self.conv_args, algorithm)
        if self.bias is not None:
            y += mixed_bias(self.bias, attention.kernel_attn, attention.out_attn)[:, :, None, None]
        return y if self.shift is None else y.add_(self.shift[:, None, None])

    def _fastest(self, x: Tensor, made: '_Made') -> ModuleType:
        """The algorithm for images of this size; that of C stands for attention and convolution in one call."""
        *_, groups = self.conv_args
        if x.shape[1] != groups * self.weight.shape[1]:
            raise ValueError(f'x must have shape (B, {groups * self.weight.shape[1]}, H, W), got {tuple(x.shape)}')
        padded, attention = self._padded(x), Attention(*self.attention(x))
        check(padded, self.weight, attention, *self.conv_args)
        case = case_of(padded, self.weight, attention, *self.conv_args)
        case = case._replace(channels_last=True, weight_channels_last=True)  # C copies what is laid out otherwise
        in_c = made.layer is not None and made.layer.convolves
        candidates = [algorithm for algorithm in algorithms('prepared', case) if in_c or algorithm is not c_conv]
        return fastest(
            'prepared', case, candidates, lambda tried: self._by(tried, x, made.layer),
            may_time=len(made.algorithms) < TIMED_SIZES)

    def _in_c(self) -> c_conv.Layer | None:
        """The attention in C, and the convolution too unless it has a bias or TensorFlow's padding."""
        attention = self.attention
        if attention.kernel_weight is None or self.weight.dtype != torch.float32 or not c_conv.is_available():
            return None
        maps = [None if weight is None else (weight, bias) for weight, bias in (
            (attention.squeeze_weight, attention.squeeze_bias), (attention.gates_weight, attention.gates_bias),
            (attention.kernel_weight, attention.kernel_bias))]
        *pairs, groups = self.conv_args
        is_convolved = (
            groups == 1 and self.bias is None and not self.tf_same_padding
            and c_conv.takes(self.weight, self.num_kernels))
        return c_conv.Layer(
            *maps, attention.competes, attention.gate_sizes, groups * self.weight.shape[1],
            self.weight if is_convolved else None, self.shift, *pairs)

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


class _Tracer(torch.fx.Tracer):
    """Goes no deeper than convolutions and BatchNorms."""

    def __init__(self):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (DynamicConv2d, nn.modules.batchnorm._BatchNorm, *get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, module_qualified_name)


def _followed_by_norm(model: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution whose result goes into a BatchNorm and nowhere else, and of that BatchNorm."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a network does with its input that a symbol can't
        _logger.warning(f'{type(model).__name__} keeps its BatchNorms, torch.fx can\'t trace it: {error}')
        return []
    calls = [node for node in graph.nodes if node.op == 'call_module']
    modules = dict(model.named_modules(remove_duplicate=False))
    times_called = collections.Counter(id(modules[node.target]) for node in calls)

    def is_foldable(node: torch.fx.Node) -> bool:
        conv, user = modules[node.target], next(iter(node.users), None)
        if not (isinstance(conv, DynamicConv2d) or type(conv) is nn.Conv2d):
            return False
        if len(node.users) != 1 or user.op != 'call_module' or times_called[id(conv)] > 1:
            return False
        norm = modules[user.target]
        return (
            type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and norm.track_running_stats and not norm.training
            and times_called[id(norm)] == 1
        )

    return [(node.target, next(iter(node.users)).target) for node in calls if is_foldable(node)]
