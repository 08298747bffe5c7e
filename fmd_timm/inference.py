"""Networks prepared for inference: BatchNorms folded, kernels laid out for their convolutions, no gradients.

A BatchNorm behind a dynamic convolution scales its output channels, as does each of the K kernels: the scale goes into
the kernels, the shift stays an addition, since the gates would multiply it. The BatchNorm of the attention goes into
the squeeze in front of it.
"""
import collections
import copy
import logging

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, pad_same
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import DynamicConv2d
from .layers.folded import FoldedAttention, norm_as_affine
from .ops import c_conv, cpu, dynamic_conv2d, prepared

__all__ = ['prepare_for_inference']

_logger = logging.getLogger(__name__)


def prepare_for_inference(model: nn.Module, inplace: bool = False) -> nn.Module:
    """A network that computes the same in evaluation mode, faster; it can't be trained or set to other temperatures.

    Outputs agree to 1e-5 (relative, float32). Static convolutions are fused with their BatchNorms too. On the CPU,
    dynamic convolutions keep their kernels in another layout too, as large as they are, from their first call, and some
    C is compiled then (`ops/c_conv.py`). Save the weights before: those of the prepared network have other keys.

    Args:
        model: A network, in any dtype and on any device. One that torch.fx can't trace keeps its BatchNorms.
        inplace: Change `model` itself instead of a copy, which frees its memory.

    Returns:
        The network in evaluation mode, channels_last, without gradients of its parameters.
    """
    model = (model if inplace else copy.deepcopy(model)).eval()
    modules = dict(model.named_modules())
    for conv_name, norm_name in _followed_by_norm(model):
        conv, norm = modules[conv_name], modules[norm_name]
        is_dynamic = isinstance(conv, DynamicConv2d)
        model.set_submodule(conv_name, PreparedConv2d(conv, norm) if is_dynamic else fuse_conv_bn_eval(conv, norm))
        model.set_submodule(norm_name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    for name, module in list(model.named_modules()):
        if isinstance(module, DynamicConv2d):  # with no BatchNorm behind it
            model.set_submodule(name, PreparedConv2d(module))
    return model.requires_grad_(False).to(memory_format=torch.channels_last)


class PreparedConv2d(nn.Module):
    """A dynamic convolution for inference together with the BatchNorm behind it.

    Args:
        conv: The layer, whose attention becomes this one's.
        norm: The BatchNorm in evaluation mode, if there is one.
    """

    def __init__(self, conv: DynamicConv2d, norm: nn.BatchNorm2d | None = None):
        super().__init__()
        self.num_kernels = conv.num_kernels
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups, self.tf_same_padding = conv.dilation, conv.groups, conv.tf_same_padding
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
        self._forget_banks()

    def forward(self, x: Tensor) -> Tensor:
        is_plain = _is_plain(x, self.weight)
        if is_plain and (self._native is not None or self._has_native()):
            if self._native is None:
                self._native = self._as_native()
            is_native = self._is_native(x)
            if is_native and len(x) == 1:
                return self._native(x)
            attention = self._native.attend(x) if len(x) == 1 else self.attention(x)
            if is_native:
                return self._native.convolve(x, *attention)
        else:
            attention = self.attention(x)
        if self.tf_same_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        conv_args = self.stride, self.padding, self.dilation
        if not is_plain:
            y = dynamic_conv2d(x, self.weight, *attention, self.bias, *conv_args, self.groups)
            return y if self.shift is None else y + self.shift.to(y.dtype)[:, None, None]
        if self._is_product(x):
            if self._transposed is None:
                self._transposed = prepared.transposed(self.weight, self.num_kernels)
            return prepared.forward(x, self._transposed, self.weight, *attention, self.bias, self.shift, *conv_args)
        # without the operator's dispatch, which takes 30 us
        y = cpu.forward(x, self.weight, *attention, self.bias, *conv_args, self.groups)
        return y if self.shift is None else y.add_(self.shift[:, None, None])

    def _has_native(self) -> bool:
        """Whether the attention at least can be computed in C."""
        return (
            isinstance(self.attention, FoldedAttention) and c_conv.takes(self.weight, self.num_kernels)
            and c_conv.is_available()
        )

    def _as_native(self) -> c_conv.Layer:
        attention = self.attention
        maps = [None if weight is None else (weight, bias) for weight, bias in (
            (attention.squeeze_weight, attention.squeeze_bias), (attention.gates_weight, attention.gates_bias),
            (attention.kernel_weight, attention.kernel_bias))]
        is_convolved = self.groups == 1 and self.bias is None and not self.tf_same_padding
        return c_conv.Layer(
            *maps, attention.competes, attention.gate_sizes, self.groups * self.weight.shape[1],
            self.weight if is_convolved else None, self.shift, self.stride, self.padding, self.dilation)

    def _is_native(self, x: Tensor) -> bool:
        """Whether the convolution is fastest in C too: timed as the rules in `ops/cpu.py`, which serve other cases."""
        if self.kernel_size == (1, 1):
            return self._native.convolves and x[0].numel() < (500_000 if len(x) == 1 else 250_000)
        return self._native.convolves and x[0, 0].numel() > 1  # of which only one tap is more than padding

    def _is_product(self, x: Tensor) -> bool:
        """The same for matrix products with transposed kernels."""
        pixels = x.shape[2] * x.shape[3] // (self.stride[0] * self.stride[1])  # of the result
        if self.groups > 1 or self.num_kernels == 1 or len(x) >= 32 * pixels:
            return False
        return self.kernel_size == (1, 1) or 9 <= pixels < 400  # in smaller images some taps meet padding alone

    def _forget_banks(self) -> None:
        self._transposed = self._native = None  # the kernels laid out anew, made when they are needed

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _transposed=None, _native=None)

    def _apply(self, fn, recurse: bool = True):
        self._forget_banks()  # the weights may change, as below
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args):
        self._forget_banks()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f'num_kernels={self.num_kernels}, kernel_size={self.kernel_size}, stride={self.stride}'


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing but the result is wanted: no gradient, no graph, no other dtype, no tensor without memory."""
    return type(x) is Tensor and x.dtype == weight.dtype in (torch.float32, torch.float64) and not (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != 'cpu'
        or x.shape[0] == 0 or x.requires_grad and torch.is_grad_enabled() or torch.is_autocast_enabled('cpu')
    )


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
