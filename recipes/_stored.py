"""Networks whose weights are kept in fewer bytes than the float32 that they are computed with."""
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fmd_timm.layers.prepared import PreparedConv2d


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


def store_kernels_int8(network: nn.Module) -> nn.Module:
    """The kernels of a prepared network's dynamic convolutions, in place."""
    for module in network.modules():
        if isinstance(module, PreparedConv2d):
            module.keep_kernels(torch.int8)
    return network


STORED = {  # by --weights
    'fp32': lambda network: network, 'fp16': HalfStored,
    'int8': lambda network: HalfStored(store_kernels_int8(network)),  # attention and classifier are many bytes, too
    'int8-static': store_kernels_int8,  # a quantiser, which reads no computed kernels, does the rest
}
