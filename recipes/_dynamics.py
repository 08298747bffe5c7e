"""Is a dynamic network dynamic?  What the attention of each layer does over images."""
import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import torch
from _data import LabelledImages
from torch import Tensor, nn

from fmd_timm import DynamicConv2d

MOST_IMAGES = 1024  # whose attention a record sums up


class AttentionStatistics:
    """The attention of one layer over all images that passed it.

    Args:
        conv: The layer.
    """

    def __init__(self, conv: DynamicConv2d):
        self.conv = conv
        self.images = 0
        self.sums: list[Tensor | None] = []  # of kernel_attn (1, K), in_attn, out_attn and tap_attn, in float64
        self.squares: list[Tensor | None] = []
        self.entropies = 0.0  # summed over the images

    def add(self, attention: tuple[Tensor | None, ...]) -> None:
        """Count the images of a batch, whose attention is (B, K), (B, C_in), (B, C_out) and (B, kh * kw) or None."""
        attention = [None if attn is None else attn.detach().cpu().double() for attn in attention]  # MPS has no float64
        sums = [None if attn is None else attn.sum(0, keepdim=True) for attn in attention]
        squares = [None if attn is None else attn.square().sum(0, keepdim=True) for attn in attention]
        if self.images:
            sums, squares = (
                [None if new is None else new + old for new, old in zip(*pair)]
                for pair in ((sums, self.sums), (squares, self.squares)))
        self.sums, self.squares = sums, squares
        self.images += len(next(attn for attn in attention if attn is not None))
        if attention[0] is not None:
            self.entropies += entropy(attention[0]).sum().item()

    def means(self) -> list[Tensor | None]:
        """The mean of each factor over the images, (1, K), (1, C_in), (1, C_out) and (1, kh * kw), float64."""
        return [None if total is None else total / self.images for total in self.sums]

    def kernel_entropy(self) -> float | None:
        """Mean entropy of kernel_attn over log K: 1 where every image mixes all kernels equally, 0 where it takes one.

        CondConv's attention, which does not sum to 1, is divided by its sum. None where there is one kernel.
        """
        return None if self.sums[0] is None else self.entropies / self.images

    def usage_entropy(self) -> float | None:
        """The same of the mean kernel_attn: 0 where all images take the same kernel. Never below `kernel_entropy`."""
        return None if self.sums[0] is None else entropy(self.means()[0]).item()

    def gate_std(self) -> float | None:
        """Standard deviation of a gate over the images, mean of all gates; None where the method has none."""
        deviations = [
            (square / self.images - mean.square()).clamp(min=0).sqrt()
            for square, mean in zip(self.squares[1:], self.means()[1:]) if mean is not None]
        return torch.cat(deviations, 1).mean().item() if deviations else None

    def kernel_distance(self) -> float:
        """How far a kernel is from the mean of the K kernels, over the norm of that mean; mean of the kernels."""
        kernels = self.conv.weight.detach().cpu().double().unflatten(0, (self.conv.num_kernels, -1)).flatten(1)
        mean = kernels.mean(0)
        return ((kernels - mean).norm(dim=1).mean() / mean.norm()).item()


def entropy(kernel_attn: Tensor) -> Tensor:
    """(B, K) -> (B,): that of each row, over log K."""
    shares = kernel_attn / kernel_attn.sum(1, keepdim=True)
    # A share of 0 has an infinite slope, which makes every gradient NaN
    logs = shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
    return -(shares * logs).sum(1) / math.log(shares.shape[1])


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, AttentionStatistics]]:
    """While it is open, the attention of every dynamic convolution is counted; yields them by the layers' names."""
    convs = {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv2d)}
    statistics = {name: AttentionStatistics(conv) for name, conv in convs.items()}
    with ExitStack() as stack:
        for layer in statistics.values():
            hook = layer.conv.attention.register_forward_hook(lambda module, images, out, layer=layer: layer.add(out))
            stack.callback(hook.remove)
        yield statistics


@contextmanager
def averaged(statistics: dict[str, AttentionStatistics], kernels_only: bool = False) -> Iterator[None]:
    """While it is open, all images have the mean attention that was counted: the network is a static one.

    Args:
        statistics: Of a model, see `watched`.
        kernels_only: Only kernel_attn is the mean, and the gates stay those of the image.
    """
    with ExitStack() as stack:
        for layer in statistics.values():
            means = layer.means()
            if kernels_only:
                means[1:] = [None] * len(means[1:])

            def replace(module, images, attention, means=means):
                return tuple(
                    attn if mean is None else mean.to(attn).expand_as(attn) for attn, mean in zip(attention, means))

            stack.callback(layer.conv.attention.register_forward_hook(replace).remove)
        yield


def summarized(statistics: dict[str, AttentionStatistics]) -> dict[str, float | None]:
    """Three numbers of a network for its record, medians of its layers; None of what its method does not have."""
    numbers = {}
    for name in 'kernel_entropy', 'gate_std', 'kernel_distance':
        values = [getattr(layer, name)() for layer in statistics.values()]
        numbers[name] = median(values) if values and None not in values else None
    return numbers


@torch.inference_mode()
def observe(
        network: nn.Module, images: LabelledImages, normalize: nn.Module, batch: int) -> dict[str, AttentionStatistics]:
    """The attention of each layer over at most `MOST_IMAGES` of a split, evenly spread, which are read here.

    Args:
        network: It stays as it is: its copy is not compiled.
        images: With the transform of validation.
        normalize: uint8 images -> the network's input, on its device.
        batch: Images at a time.
    """
    network = copy.deepcopy(network).eval()
    device, places = next(network.parameters()).device, images.sample(MOST_IMAGES)
    with watched(network) as statistics:
        for first in range(0, len(places) if statistics else 0, batch):
            read = [images.transform(images.read(place)[0]) for place in places[first:first + batch]]
            network(normalize(torch.stack(read).to(device)))
    return statistics


def kernel_means(statistics: dict[str, AttentionStatistics]) -> dict[str, list[float]]:
    """The mean kernel_attn of each layer that has more than one kernel."""
    return {name: layer.means()[0][0].tolist() for name, layer in statistics.items() if layer.sums[0] is not None}


def check_dynamic(network: nn.Module, what: str) -> None:
    """Refuse a network that has no dynamic convolution; `what` is its name in the error."""
    if not any(isinstance(module, DynamicConv2d) for module in network.modules()):
        raise SystemExit(f'{what} has no dynamic convolution')
