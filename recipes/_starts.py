"""How an inflated layer may begin: K kernels whose mean is the static one, and a router that tells images apart.

The mixture stays that of the static network as long as kernel_attn is the same for all kernels. With a router that
tells images apart it does so where the kernels are equal.
"""
from collections.abc import Callable

import torch
from _dynamics import entropy
from sklearn.cluster import KMeans
from torch import Tensor

from fmd_timm import FMDConv2d


def gaussian(static: Tensor, num_kernels: int, generator: torch.Generator) -> Tensor:
    """(O, I, kh, kw) -> (K, O, I, kh, kw): Gaussian noise with the deviation of the weights, which sums to 0."""
    noise = static.std() * torch.randn(num_kernels, *static.shape, generator=generator)
    return static + noise - noise.mean(0)


def orthogonal(static: Tensor, num_kernels: int, generator: torch.Generator) -> Tensor:
    """Likewise, the perturbations of two kernels at the same angle for every pair, as the corners of a simplex."""
    basis = torch.linalg.qr(torch.randn(static.numel(), num_kernels, generator=generator))[0].T
    basis = basis - basis.mean(0)
    return static + static.norm() * (basis / basis.norm(dim=1, keepdim=True)).view(num_kernels, *static.shape)


def svd(static: Tensor, num_kernels: int, generator: torch.Generator) -> Tensor:
    """Kernel k has K times every K-th singular value of the static one, beginning with the k-th."""
    left, values, right = torch.linalg.svd(static.flatten(1).double(), full_matrices=False)
    taken = torch.arange(len(values)) % num_kernels == torch.arange(num_kernels)[:, None]
    kernels = (left * (num_kernels * values * taken)[:, None]) @ right
    return kernels.view(num_kernels, *static.shape).to(static.dtype)


KERNELS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = dict(
    gaussian=gaussian, orthogonal=orthogonal, svd=svd)


@torch.no_grad()
def draw_kernels(conv: FMDConv2d, kind: str, generator: torch.Generator) -> None:
    """Give a layer that was inflated other kernels with the same mean, in place.

    A depthwise kernel has one singular value, so it keeps its own where `kind` is 'svd'.
    """
    kernels = conv.weight.unflatten(0, (conv.num_kernels, -1))
    if kind != 'svd' or conv.groups == 1:
        kernels.copy_(KERNELS[kind](kernels.mean(0), conv.num_kernels, generator))


def clusters(features: Tensor, num_kernels: int, seed: int) -> tuple[Tensor, Tensor]:
    """(N, D) -> (K, D) and (K,): logits that are the negative squared distances to K means, up to a common term."""
    centers = torch.as_tensor(KMeans(num_kernels, n_init=5, random_state=seed).fit(features.numpy()).cluster_centers_)
    return centers, -centers.square().sum(1) / 2


def random(features: Tensor, num_kernels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Likewise: random directions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_kernels, features.shape[1], generator=generator), torch.zeros(num_kernels)


ROUTERS: dict[str, Callable[[Tensor, int, int], tuple[Tensor, Tensor]]] = dict(clusters=clusters, random=random)


@torch.no_grad()
def draw_router(conv: FMDConv2d, kind: str, pooled: Tensor, mean_entropy: float, seed: int) -> None:
    """Set the last linear map of the kernel attention so that it tells images apart, in place.

    Args:
        conv: A layer.
        kind: A name in `ROUTERS`.
        pooled: (N, C_in), the images' input of the layer, mean of the pixels.
        mean_entropy: Of kernel_attn over these images, to which the logits are scaled.
        seed: Of what is drawn.
    """
    attention = conv.attention
    hidden = attention.squeeze(pooled)[:, attention.gate_hidden:].relu()
    mean, std = hidden.mean(0), hidden.std(0) + 1e-6
    weight, bias = ROUTERS[kind]((hidden - mean) / std, conv.num_kernels, seed)
    weight, bias = weight / std, bias - weight @ (mean / std)
    logits = hidden @ weight.T + bias
    low, high = 1e-4, 1e4  # the temperature, by bisection: entropy grows with it
    for _ in range(60):
        middle = (low * high)**0.5
        if entropy((logits / middle).softmax(1)).mean() < mean_entropy:
            low = middle
        else:
            high = middle
    attention.kernel.weight.copy_(weight / high)
    attention.kernel.bias.copy_(bias / high)
