"""Dynamic convolution on the CPU as matrix products over the patches of the images, a few output channels at a time.

A tile of output channels is mixed for all images at once, small enough to stay in the cache, and multiplied with the
patches (im2col) before the next one is mixed: each of the K kernels is read once per batch, and no kernel per image is
ever held in memory. The backward pass mixes a tile again, takes the gradient of every image's mixed tile and adds it to
those of the K kernels and of the attention while it is in the cache. It wins where kernels are large beside the images,
which is also where convolutions of single images are slow.
"""
import torch
from torch import Tensor

from .patches import by_tap, kernel_rows, patches_of, per_element, rows_are_pixels, sum_patches

TILE_BYTES = 4 * 2**20  # of a tile of all mixed kernels; 9 MiB would go back to the system after each call
NARROWEST = 32  # output channels: narrower matrices are multiplied at half the speed


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0, groups = 1."""
    last = rows_are_pixels(x, weight)
    patches, (height, width) = patches_of(_gated(x, in_attn), weight, stride, padding, dilation)
    if tap_attn is not None:
        patches = patches * per_element(tap_attn, weight).to(x.dtype)
    share, bank = _share(weight, kernel_attn, len(x)), kernel_rows(weight, kernel_attn)
    B, O = len(x), bank.shape[1]
    y = x.new_empty((B, height * width, O) if last else (B, O, height * width))
    tiles, mixed = _tiles(share, bank)
    for tile in tiles:
        kernels = _mix(share, bank[:, tile], mixed).to(x.dtype)  # (B, o, R)
        matrices = (patches, kernels.mT) if last else (kernels, patches.mT)
        if len(tiles) == 1:
            torch.bmm(*matrices, out=y)
        else:
            y[(..., tile) if last else (slice(None), tile)] = torch.bmm(*matrices)
    y = (y.mT if last else y).unflatten(2, (height, width))
    if bias is not None:
        y += (share @ bias.reshape(share.shape[1], O)).to(y.dtype)[:, :, None, None]
    if out_attn is not None:
        y *= out_attn.to(y.dtype)[:, :, None, None]
    return y


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None."""
    dtype, last = weight.dtype, rows_are_pixels(x, weight)
    patches, _ = patches_of(_gated(x, in_attn), weight, stride, padding, dilation)  # (B, P, R)
    tapped = patches if tap_attn is None else patches * per_element(tap_attn, weight).to(x.dtype)
    share, bank = _share(weight, kernel_attn, len(x)), kernel_rows(weight, kernel_attn)
    (B, K), O = share.shape, bank.shape[1]
    out = None if out_attn is None else out_attn.to(dtype)
    grad_pixels = grad_y.flatten(2)  # (B, O, P)
    gated_pixels = grad_pixels if out is None else grad_pixels * out.to(grad_y.dtype)[:, :, None]

    grad_patches = x.new_empty(patches.shape if last else patches.mT.shape)  # of the tapped ones
    grad_weight = torch.empty_like(weight)
    grad_bank = kernel_rows(grad_weight, kernel_attn)
    products = share.new_empty(O, B, K)  # of the gradient of each image's kernel with each of the K, by output channel
    tiles, mixed = _tiles(share, bank)
    gradient = torch.empty_like(mixed, dtype=grad_y.dtype)
    for tile in tiles:
        kernels = _mix(share, bank[:, tile], mixed)  # (B, o, R)
        matrices = gated_pixels[:, tile].mT, kernels.to(x.dtype)
        if not last:
            matrices = matrices[1].mT, matrices[0].mT
        grad_patches.baddbmm_(*matrices, beta=int(tile.start > 0))
        # (B, o, R), the gradient of each image's kernel before out_attn
        G = torch.bmm(grad_pixels[:, tile], tapped, out=_part_of(gradient, kernels.shape)).to(dtype)
        torch.bmm(G.transpose(0, 1), bank[:, tile].permute(1, 2, 0), out=products[tile])
        if out is not None:
            G *= out[:, tile, None]
        torch.mm(share.T, G.flatten(1), out=grad_bank[:, tile].flatten(1))

    grad_kernel_attn = grad_in_attn = grad_out_attn = grad_tap_attn = grad_bias = None
    grad_patches = grad_patches if last else grad_patches.mT
    if tap_attn is not None:
        grad_tap_attn = by_tap((grad_patches * patches).sum(1), weight)
        grad_patches *= per_element(tap_attn, weight).to(x.dtype)
    grad_x = sum_patches(grad_patches, x, weight, stride, padding, dilation)
    if bias is not None:
        of_bias = grad_pixels.sum(2, dtype=dtype)  # (B, O)
        products += of_bias.T[:, :, None] * bias.reshape(K, O).T[:, None]
        grad_bias = (share.T @ (of_bias if out is None else of_bias * out)).reshape(-1)
    if kernel_attn is not None:
        grad_kernel_attn = products.sum(0) if out is None else (products * out.T[:, :, None]).sum(0)
    if in_attn is not None:
        # image by image: the products of a whole batch would be written to memory and read again
        grad_in_attn = torch.stack([(grad_b * x_b).sum((1, 2)) for grad_b, x_b in zip(grad_x, x)])
        grad_x *= in_attn.to(x.dtype)[:, :, None, None]
    if out_attn is not None:
        grad_out_attn = (products * share).sum(2).T
    return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, grad_out_attn, grad_tap_attn, grad_bias


def _share(weight: Tensor, kernel_attn: Tensor | None, batch: int) -> Tensor:
    return weight.new_ones(batch, 1) if kernel_attn is None else kernel_attn.to(weight.dtype)


def _gated(x: Tensor, in_attn: Tensor | None) -> Tensor:
    return x if in_attn is None else x * in_attn.to(x.dtype)[:, :, None, None]


def _tiles(share: Tensor, bank: Tensor) -> tuple[list[slice], Tensor]:
    """Ranges of the output channels, and memory for one tile: to allocate it each time costs more than to mix it."""
    B, (_, O, R) = len(share), bank.shape
    step = TILE_BYTES // (B * R * bank.element_size())
    step = min(max(step // NARROWEST * NARROWEST, NARROWEST), O)
    return [slice(start, min(start + step, O)) for start in range(0, O, step)], bank.new_empty(B * step * R)


def _part_of(memory: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return memory[:shape[0] * shape[1] * shape[2]].view(shape)


def _mix(share: Tensor, tile: Tensor, memory: Tensor) -> Tensor:
    """share (B, K), tile (K, o, R) -> mixed kernels (B, o, R) in `memory`"""
    kernels = _part_of(memory, (len(share), *tile.shape[1:]))
    torch.mm(share, tile.flatten(1), out=kernels.flatten(1))
    return kernels
