"""Dynamic convolutions in other counters of FLOPs than PyTorch's, which knows the operator itself.

    FlopCountAnalysis(model, x).set_op_handle(**fmd_timm.flops.FVCORE_HANDLES).total()
    thop.profile(model, inputs=(x,), custom_ops=fmd_timm.flops.THOP_OPS)

Both count a multiplication with its addition as one, as the definition has them: K kernels mixed and one convolution
for every image, whatever algorithm runs.
"""
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .layers import METHODS
from .layers.prepared import PreparedConv2d
from .ops.operator import flops

__all__ = ['FVCORE_HANDLES', 'THOP_OPS']


def _of_operator(inputs: list[torch._C.Value], outputs: list[torch._C.Value]) -> int:
    """Of one call in a traced graph."""
    shapes = [value.type().sizes() if value.isCompleteTensor() else None for value in inputs[:3]]
    return flops(*shapes, out_shape=outputs[0].type().sizes()) // 2


@torch.no_grad()
def _of_layer(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
    """Of one call with its attention, for which thop does not look at the modules inside; as a forward hook."""
    with FlopCounterMode(display=False) as counter:
        module.forward(*inputs)
    module.total_ops += counter.get_total_flops() // 2


FVCORE_HANDLES = {'fmd_timm::dynamic_conv2d': _of_operator}
THOP_OPS = {layer: _of_layer for layer in (*METHODS.values(), PreparedConv2d)}
