"""Networks prepared for inference: BatchNorms folded, kernels laid out for their convolutions, no gradients.

`layers/prepared.py` is what becomes of a dynamic convolution.
"""
import collections
import copy
import logging

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import DynamicConv2d
from .layers.prepared import PreparedConv2d

__all__ = ['prepare_for_inference']

_logger = logging.getLogger(__name__)

# Exactly these classes: a subclass may standardise its weights, or normalise by something else.
_CONVS = nn.Conv2d, Conv2dSame
_NORMS = nn.BatchNorm2d, BatchNormAct2d


def prepare_for_inference(
        model: nn.Module,
        inplace: bool = False,
        example_input: Tensor | None = None,
        kernel_dtype: torch.dtype | None = None,
) -> nn.Module:
    """A network that computes the same in evaluation mode, faster; it can't be trained or set to other temperatures.

    Outputs agree to 1e-5 (relative, float32). Static convolutions are fused with their BatchNorms too. On the CPU,
    dynamic convolutions keep their kernels in another layout too, as large as they are, from their first call. The
    first image of a size takes longer: it times what is fastest here, and some C is compiled (`ops/c_conv.py`). Save
    the weights before: those of the prepared network have other keys.

    Args:
        model: A network, in any dtype and on any device. One that torch.fx can't trace keeps its BatchNorms.
        inplace: Change `model` itself instead of a copy, which frees its memory.
        example_input: Images (B, C, H, W) such as will be classified, to time everything now and not when they come.
        kernel_dtype: torch.int16 to keep the kernels of dynamic convolutions in half the bytes of float32, torch.int8
            in a quarter: as integers, with a scale for each output channel, which are mixed in the dtype of the
            network. Each is right to 1.5e-5 of the largest one of its channel, with int8 to 4e-3. float16 would be
            right to 5e-4 of itself, and have no room for all that folded BatchNorms make of kernels.

    Returns:
        The network in evaluation mode, channels_last, without gradients of its parameters.

    Raises:
        ValueError: A dynamic convolution can't be prepared; names it. Prepare before you quantize. Or kernel_dtype is
            another one.
    """
    model = (model if inplace else copy.deepcopy(model)).eval()
    if isinstance(model, DynamicConv2d):
        model = PreparedConv2d(model, None, kernel_dtype)
    else:
        _prepare_modules(model, kernel_dtype)
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    if example_input is not None:
        with torch.inference_mode():
            model(example_input)
    return model


def _prepare_modules(model: nn.Module, kernel_dtype: torch.dtype | None) -> None:
    modules = dict(model.named_modules())
    for conv_name, norm_name in _followed_by_norm(model):
        conv, norm = modules[conv_name], modules[norm_name]
        is_dynamic = isinstance(conv, DynamicConv2d)
        fused = _prepared(conv_name, conv, norm, kernel_dtype) if is_dynamic else fuse_conv_bn_eval(conv, norm)
        model.set_submodule(conv_name, fused)
        model.set_submodule(norm_name, norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity())
    for name, module in list(model.named_modules()):
        if isinstance(module, DynamicConv2d):  # with no BatchNorm behind it
            model.set_submodule(name, _prepared(name, module, None, kernel_dtype))


def _prepared(
        name: str, conv: DynamicConv2d, norm: nn.BatchNorm2d | None, kernel_dtype: torch.dtype | None,
) -> PreparedConv2d:
    try:
        return PreparedConv2d(conv, norm, kernel_dtype)
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from error


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
        if not (isinstance(conv, DynamicConv2d) or type(conv) in _CONVS):
            return False
        if len(node.users) != 1 or user.op != 'call_module' or times_called[id(conv)] > 1:
            return False
        norm = modules[user.target]
        return (
            type(norm) in _NORMS and norm.track_running_stats and not norm.training
            and times_called[id(norm)] == 1
        )

    return [(node.target, next(iter(node.users)).target) for node in calls if is_foldable(node)]
