"""timm's own CondConv networks, such as tf_efficientnet_cc_b0_4e, by the operator of this package."""
import torch
import torch.nn as nn
from timm.layers import CondConv2d, pad_same
from timm.models import register_notrace_module
from torch import Tensor

from ..ops import dynamic_conv2d
from .attention import at_least_float32
from .convert import keep_hooks

__all__ = ['accelerate_condconv']

torch.fx.wrap('dynamic_conv2d')
torch.fx.wrap('pad_same')


@register_notrace_module
class RoutedConv2d(nn.Module):
    """What timm's `CondConv2d` computes: images (B, C_in, H, W) and routing weights (B, K) -> (B, C_out, H', W').

    It holds the very parameters of that layer, in their shapes: `weight` (K, C_out * C_in / groups * kh * kw) and
    `bias` (K, C_out) or None.
    """

    def __init__(self, conv: CondConv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.kernels = conv.num_experts * conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.groups, self.tf_same_padding = conv.groups, conv.dynamic_padding
        self.padding = (0, 0) if conv.dynamic_padding else conv.padding

    def forward(self, x: Tensor, routing_weights: Tensor) -> Tensor:
        if self.tf_same_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return dynamic_conv2d(
            x, self.weight.view(self.kernels), at_least_float32(routing_weights), None, None, None,
            None if self.bias is None else self.bias.view(-1), self.stride, self.padding, self.dilation, self.groups,
        )

    def extra_repr(self) -> str:
        return f'kernels={self.kernels}, stride={self.stride}, groups={self.groups}'


def accelerate_condconv(model: nn.Module) -> list[str]:
    """Let the layers of timm's CondConv networks compute by `fmd_timm.dynamic_conv2d`, in place.

    Outputs agree to 1e-5 (relative, float32). Parameters, their names, the state dict and forward hooks stay.

    timm makes one convolution with B times the groups of a batch. The operator has other ways, and a backward pass of
    its own. It pays in training and for batches, with `channels_last`, and not for single images: README.md has what
    was measured.

    Args:
        model: A network with timm's `CondConv2d` in it, such as `timm.create_model('tf_efficientnet_cc_b0_4e')`.

    Returns:
        The names of the layers.

    Raises:
        ValueError: The network has none, or the weight of one is computed from others, as by pruning.
    """
    convs = {
        name: conv for name, conv in model.named_modules(remove_duplicate=False) if name and type(conv) is CondConv2d}
    if not convs:
        raise ValueError(f"{type(model).__name__} has no CondConv2d of timm's")
    for name, conv in convs.items():
        if 'weight' not in conv._parameters:  # torch.nn.utils.prune and spectral_norm make it of others
            raise ValueError(f'{name} must have its weight as a parameter, got {sorted(dict(conv.named_parameters()))}')
    routed = {conv: RoutedConv2d(conv).train(conv.training) for conv in convs.values()}
    for conv, ours in routed.items():
        keep_hooks(conv, ours)
    for name, conv in convs.items():
        model.set_submodule(name, routed[conv])
    return list(convs)
