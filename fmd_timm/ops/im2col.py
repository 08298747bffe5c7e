"""Dynamic convolution as matrix products over the patches of the images, a few output channels at a time.

A tile of output channels is mixed for all images at once, small enough to stay in the cache, and multiplied with the
patches (im2col) before the next one is mixed: each of the K kernels is read once per batch, and no kernel per image is
ever held in memory. The backward pass mixes a tile again, takes the gradient of every image's mixed tile and adds it to
those of the K kernels and of the attention while it is in the cache. It wins where kernels are large beside the images,
which is also where convolutions of single images are slow.
"""
import torch
from torch import Tensor

from .cache import cache_bytes
from .case import Attention, Case, Gradients
from .layout import (
    attention_gradients,
    bank_of,
    gated,
    kernel_rows,
    mix,
    part_of,
    patches_of,
    per_element,
    rows_are_pixels,
    slices,
    sum_patches,
)

NARROWEST = 32  # output channels: narrower matrices are multiplied at half the speed


def supports(case: Case) -> bool:
    return case.groups == 1


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W'), as in `reference.forward`."""
    last = rows_are_pixels(case)
    patches = patches_of(gated(x, attention.in_attn), case)  # (B, P, R)
    if attention.tap_attn is not None:
        patches = patches * per_element(attention.tap_attn, weight).to(x.dtype)
    kernel_attn, bank = bank_of(weight, attention, case)  # (B, K), (K, O, R)
    y = x.new_empty((case.batch, case.out_pixels, case.out_channels) if last else (
        case.batch, case.out_channels, case.out_pixels))
    tiles, memory = _tiles(case, bank, 4 * cache_bytes(), kernel_attn.dtype)
    for tile in tiles:
        kernels = mix(kernel_attn, bank[:, tile], memory).to(x.dtype)  # (B, o, R)
        matrices = (patches, kernels.mT) if last else (kernels, patches.mT)
        if len(tiles) == 1:
            torch.bmm(*matrices, out=y)
        else:  # PyTorch is slow at products whose `out` is a part of a tensor
            y[(..., tile) if last else (slice(None), tile)] = torch.bmm(*matrices)
    y = y.mT if last else y
    y = y.unflatten(2, case.output_size)
    if attention.out_attn is not None:
        y *= attention.out_attn.to(y.dtype)[:, :, None, None]
    return y


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None."""
    grad_x, grad_in_attn = image_gradient(grad_y, x, weight, attention, case)
    grad_weight, gradients = kernel_gradient(grad_y, x, weight, attention, case)
    return grad_x, grad_weight, gradients._replace(in_attn=grad_in_attn)


def image_gradient(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and in_attn."""
    last = rows_are_pixels(case)
    kernel_attn, bank = bank_of(weight, attention, case)  # (B, K), (K, O, R)
    grad_pixels = gated(grad_y, attention.out_attn).flatten(2)  # (B, O, P)
    size = case.batch, case.out_pixels, bank.shape[2]
    grad_patches = x.new_empty(size if last else (size[0], size[2], size[1]))
    tiles, memory = _tiles(case, bank, 4 * cache_bytes(), bank.dtype)
    for tile in tiles:
        matrices = grad_pixels[:, tile].mT, mix(kernel_attn, bank[:, tile], memory).to(x.dtype)
        if not last:
            matrices = matrices[1].mT, matrices[0].mT
        grad_patches.baddbmm_(*matrices, beta=int(tile.start > 0))
    grad_patches = grad_patches if last else grad_patches.mT  # (B, P, R)
    if attention.tap_attn is not None:
        grad_patches *= per_element(attention.tap_attn, weight).to(x.dtype)
    grad_x = sum_patches(grad_patches, x, case)
    if attention.in_attn is None:
        return grad_x, None
    # image by image: the products of a whole batch would be written to memory and read again
    grad_in_attn = torch.stack([(grad_b * x_b).sum((1, 2)) for grad_b, x_b in zip(grad_x, x)])
    grad_x *= attention.in_attn.to(x.dtype)[:, :, None, None]
    return grad_x, grad_in_attn


def kernel_gradient(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> tuple[Tensor, Attention]:
    """Gradients of weight, kernel_attn, out_attn and tap_attn; None for in_attn and for what is None.

    They need no mixed kernel: all come from the products of the gradient of each image's kernel, before its factors,
    with each of the K kernels, by output channel and, if there are factors of the taps, by tap.
    """
    _, in_attn, out_attn, tap_attn = attention
    if tap_attn is not None:
        weight = weight.contiguous(memory_format=torch.channels_last)  # the weights of a tap are a row of a matrix
        case = case._replace(weight_channels_last=True)
    kernel_attn, bank = bank_of(weight, attention, case)  # (B, K), (K, O, R)
    B, K, O, dtype = case.batch, case.num_kernels, case.out_channels, weight.dtype
    out = kernel_attn.new_ones(B, O) if out_attn is None else out_attn
    tap = kernel_attn.new_ones(B, 1) if tap_attn is None else tap_attn
    taps = tap.shape[1]
    gates = out[:, :, None] * tap[:, None]  # (B, O, taps)

    patches = patches_of(gated(x, in_attn), case)  # (B, P, R)
    grad_pixels = grad_y.flatten(2)  # (B, O, P)
    grad_weight = torch.empty_like(weight)
    grad_bank = kernel_rows(grad_weight, K)
    products = kernel_attn.new_empty(O, taps, K, B)
    tiles, memory = _tiles(case, bank, 10 * cache_bytes(), grad_y.dtype)  # for each tile, all patches are read
    for tile in tiles:
        o = tile.stop - tile.start
        G = torch.bmm(grad_pixels[:, tile], patches, out=part_of(memory, B, o, bank.shape[2])).to(dtype)
        rows, bank_rows = G.view(B, o * taps, -1), bank[:, tile].reshape(K, o * taps, -1)
        torch.bmm(bank_rows.transpose(0, 1), rows.permute(1, 2, 0), out=products[tile].flatten(0, 1))
        if out_attn is not None or tap_attn is not None:
            rows *= gates[:, tile].flatten(1)[..., None]
        torch.mm(kernel_attn.T, G.flatten(1), out=grad_bank[:, tile].flatten(1))
    return grad_weight, attention_gradients(products.permute(1, 3, 2, 0), attention)


def _tiles(case: Case, bank: Tensor, size: int, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
    """Ranges of the output channels, and memory for one tile."""
    kernel_bytes = case.batch * bank.shape[2] * bank.element_size()  # of one output channel of all images
    step = size // kernel_bytes // NARROWEST * NARROWEST
    step = min(max(step, NARROWEST), case.out_channels)
    return slices(case.out_channels, step), bank.new_empty(case.batch * step * bank.shape[2], dtype=dtype)
