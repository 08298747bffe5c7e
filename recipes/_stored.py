"""Networks whose weights are kept in fewer bytes than the float32 that they are computed with."""
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fmd_timm import dynamic_conv2d
from fmd_timm.layers.prepared import PreparedConv2d

LARGEST_INT8 = 127


class HalfStored(nn.Module):
    """A network whose weights are kept in float16, and computed with in float32. Biases stay as they are."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = [network]  # not a submodule, whose float32 weights would be kept too
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        self.names = list(tensors)
        self.tensors = nn.ParameterList(
            nn.Parameter(t.half() if t.ndim > 1 and t.dtype == torch.float32 else t, requires_grad=False)
            for t in tensors.values())

    def forward(self, images: Tensor) -> Tensor:
        tensors = {
            name: t.float() if t.dtype == torch.float16 else t for name, t in zip(self.names, self.tensors)}
        return functional_call(self.network[0], tensors, (images,))


class Int8Conv2d(nn.Module):
    """A prepared dynamic convolution whose kernels are kept in int8, with a scale for each output channel.

    The K kernels of a channel have the same scale. So they are mixed without it, and out_attn has it.
    """

    def __init__(self, conv: PreparedConv2d):
        super().__init__()
        largest = conv.weight.unflatten(0, (conv.num_kernels, -1)).abs().amax((0, 2, 3, 4))
        scale = torch.where(largest > 0, largest / LARGEST_INT8, 1)  # (O,)
        of_rows = scale.repeat(conv.num_kernels)
        self.register_buffer('scale', scale)
        self.register_buffer('weight', (conv.weight / of_rows[:, None, None, None]).round().to(torch.int8))
        self.register_buffer('bias', None if conv.bias is None else conv.bias / of_rows)
        self.shift, self.attention, self.pad, self.conv_args = conv.shift, conv.attention, conv._padded, conv.conv_args

    def forward(self, x: Tensor) -> Tensor:
        kernel_attn, in_attn, out_attn, tap_attn = self.attention(x)
        out_attn = self.scale.expand(x.shape[0], -1) if out_attn is None else out_attn * self.scale
        y = dynamic_conv2d(
            self.pad(x), self.weight.float(), kernel_attn, in_attn, out_attn, tap_attn, self.bias, *self.conv_args)
        return y if self.shift is None else y + self.shift[:, None, None]


def store_kernels_int8(network: nn.Module) -> nn.Module:
    """The kernels of a prepared network's dynamic convolutions, in place."""
    for name, module in list(network.named_modules()):
        if isinstance(module, PreparedConv2d):
            network.set_submodule(name, Int8Conv2d(module))
    return network


STORED = {  # by --weights
    'fp32': lambda network: network, 'fp16': HalfStored, 'int8': store_kernels_int8,
    'int8-static': store_kernels_int8,  # a quantiser, which reads no computed kernels, does the rest
}
