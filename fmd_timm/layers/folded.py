"""The attention for inference: its BatchNorm and its temperatures are part of linear maps."""

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, at_least_float32, pool

__all__ = ['FoldedAttention', 'linear_map', 'norm_as_affine']

Map = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)


class FoldedAttention(nn.Module):
    """Any of the four attentions for inference, in few operations: each costs some 20 us on a CPU.

    Args:
        squeeze: Weight (out, in) and bias in front of the ReLU; None where the method has neither.
        gates: The same in front of the sigmoids, None without gates.
        kernel: The same in front of the softmax over the kernels, None for one kernel.
        gate_sizes: How many of the gates are in_attn, out_attn and tap_attn.
        hidden_sizes: How much of what is squeezed goes into `gates` and how much into `kernel`; None is all into both.
        competes: Whether kernel_attn is a softmax, not sigmoids.
    """

    def __init__(
            self,
            squeeze: Map | None,
            gates: Map | None,
            kernel: Map | None,
            gate_sizes: list[int] | None = None,
            hidden_sizes: list[int] | None = None,
            competes: bool = True,
    ):
        super().__init__()
        self.gate_sizes, self.hidden_sizes, self.competes = gate_sizes or [0, 0, 0], hidden_sizes, competes
        for name, weight_and_bias in ('squeeze', squeeze), ('gates', gates), ('kernel', kernel):
            weight, bias = weight_and_bias or (None, None)
            self.register_parameter(f'{name}_weight', None if weight is None else nn.Parameter(weight))
            self.register_parameter(f'{name}_bias', None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Attention:
        hidden = pool(x)
        if self.squeeze_weight is not None:
            hidden = F.linear(hidden, self.squeeze_weight, self.squeeze_bias).relu_()
        of_gates = of_kernel = hidden
        if self.hidden_sizes is not None:
            of_gates, of_kernel = hidden.split(self.hidden_sizes, 1)
        kernel_attn, gates = None, (None, None, None)
        if self.kernel_weight is not None:
            logits = at_least_float32(F.linear(of_kernel, self.kernel_weight, self.kernel_bias))
            kernel_attn = logits.softmax(1) if self.competes else logits.sigmoid_()
        if self.gates_weight is not None:
            logits = at_least_float32(F.linear(of_gates, self.gates_weight, self.gates_bias))
            gates = logits.sigmoid_().split(self.gate_sizes, 1)
            gates = [gate if size else None for gate, size in zip(gates, self.gate_sizes)]
        return kernel_attn, *gates


def linear_map(linear: nn.Linear, norm: nn.Module | None = None, temperature: Tensor | None = None) -> Map:
    """Weight and bias of a linear map and of what follows it.

    Args:
        linear: The map.
        norm: The BatchNorm behind its first rows, if there is one.
        temperature: What divides its result, if anything does.
    """
    if type(linear) is not nn.Linear:
        kind = f'{type(linear).__module__}.{type(linear).__name__}'
        raise ValueError(
            f'its attention must have torch.nn.Linear, got {kind}: prepare the network before it is quantized')
    weight = linear.weight.detach().clone()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().clone()
    if norm is not None:
        scale, shift = norm_as_affine(norm)
        weight[:len(scale)] *= scale[:, None]
        bias[:len(shift)] = shift
    if temperature is not None:
        weight, bias = weight / temperature, bias / temperature
    return weight, bias


def norm_as_affine(norm: nn.Module) -> Map:
    """Scale (C,) and shift (C,) of the channels by a BatchNorm in evaluation mode.

    Args:
        norm: An `nn.BatchNorm2d` or what stands in for one: `nn.SyncBatchNorm`, torchvision's `FrozenBatchNorm2d`.

    Raises:
        ValueError: It has no running statistics.
    """
    if getattr(norm, 'running_mean', None) is None or norm.running_var is None:
        raise ValueError(
            f'{type(norm).__name__} has no running_mean and running_var: it normalises with the statistics of its '
            'input, which is no fixed scale and shift')
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach()
