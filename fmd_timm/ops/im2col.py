"""Dynamic convolution on the CPU as matrix products over the patches of the images, a few output channels at a time.

A tile of output channels is mixed for all images at once, small enough to stay in the cache, and multiplied with the
patches (im2col) before the next one is mixed: each of the K kernels is read once per batch, and no kernel per image is
ever held in memory. The backward pass mixes a tile again, takes the gradient of every image's mixed tile and adds it to
those of the K kernels and of the attention while it is in the cache. It wins where kernels are large beside the images,
which is also where convolutions of single images are slow.
"""
import torch
from torch import Tensor

from .layout import kernel_rows, patches_of, per_element, rows_are_pixels, sum_patches

TILE_BYTES = 4 * 2**20  # of a tile of all mixed kernels; 9 MiB would go back to the system after each call
NARROWEST = 32  # output channels: narrower matrices are multiplied at half the speed
GRADIENT_BYTES = 10 * 2**20  # of a tile of the gradients of all mixed kernels: for each one, all patches are read


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0, groups = 1."""
    last = rows_are_pixels(x, weight)
    patches, (height, width) = patches_of(_gated(x, in_attn), weight, stride, padding, dilation)
    if tap_attn is not None:
        patches = patches * per_element(tap_attn, weight).to(x.dtype)
    share, bank = _share(weight, kernel_attn, len(x)), kernel_rows(weight, kernel_attn)
    B, O = len(x), bank.shape[1]
    y = x.new_empty((B, height * width, O) if last else (B, O, height * width))
    tiles, mixed = _tiles(share, bank, TILE_BYTES)
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
    attention, conv_args = (kernel_attn, in_attn, out_attn, tap_attn), (stride, padding, dilation)
    grad_x, grad_in_attn = image_gradient(grad_y, x, weight, *attention, *conv_args)
    grad_weight, grad_kernel_attn, *others = kernel_gradient(grad_y, x, weight, *attention, bias, *conv_args)
    return grad_x, grad_weight, grad_kernel_attn, grad_in_attn, *others


def image_gradient(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, stride, padding, dilation,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and in_attn."""
    last = rows_are_pixels(x, weight)
    share, bank = _share(weight, kernel_attn, len(x)), kernel_rows(weight, kernel_attn)
    grad_pixels = grad_y.flatten(2)  # (B, O, P)
    if out_attn is not None:
        grad_pixels = grad_pixels * out_attn.to(grad_y.dtype)[:, :, None]
    size = len(x), grad_pixels.shape[2], bank.shape[2]
    grad_patches = x.new_empty(size if last else (size[0], size[2], size[1]))
    tiles, mixed = _tiles(share, bank, TILE_BYTES)
    for tile in tiles:
        matrices = grad_pixels[:, tile].mT, _mix(share, bank[:, tile], mixed).to(x.dtype)
        if not last:
            matrices = matrices[1].mT, matrices[0].mT
        grad_patches.baddbmm_(*matrices, beta=int(tile.start > 0))
    grad_patches = grad_patches if last else grad_patches.mT  # (B, P, R)
    if tap_attn is not None:
        grad_patches *= per_element(tap_attn, weight).to(x.dtype)
    grad_x = sum_patches(grad_patches, x, weight, stride, padding, dilation)
    if in_attn is None:
        return grad_x, None
    # image by image: the products of a whole batch would be written to memory and read again
    grad_in_attn = torch.stack([(grad_b * x_b).sum((1, 2)) for grad_b, x_b in zip(grad_x, x)])
    grad_x *= in_attn.to(x.dtype)[:, :, None, None]
    return grad_x, grad_in_attn


def kernel_gradient(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation,
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, kernel_attn, out_attn, tap_attn and bias; None for what is None.

    They need no mixed kernel: all come from the products of the gradient of each image's kernel, before its factors,
    with each of the K kernels, by output channel and, if there are factors of the taps, by tap.
    """
    if tap_attn is not None:
        weight = weight.contiguous(memory_format=torch.channels_last)  # the weights of a tap are a row of a matrix
    dtype = weight.dtype
    share, bank = _share(weight, kernel_attn, len(x)), kernel_rows(weight, kernel_attn)
    (B, K), (_, O, R) = share.shape, bank.shape
    out = share.new_ones(B, O) if out_attn is None else out_attn.to(dtype)
    tap = share.new_ones(B, 1) if tap_attn is None else tap_attn.to(dtype)
    gates = out[:, :, None] * tap[:, None]  # (B, O, taps)
    taps = tap.shape[1]

    patches, _ = patches_of(_gated(x, in_attn), weight, stride, padding, dilation)  # (B, P, R)
    grad_pixels = grad_y.flatten(2)  # (B, O, P)
    grad_weight = torch.empty_like(weight)
    grad_bank = kernel_rows(grad_weight, kernel_attn)
    products = share.new_empty(O, taps, K, B)
    tiles, memory = _tiles(share, bank, GRADIENT_BYTES, grad_y.dtype)
    for tile in tiles:
        o = tile.stop - tile.start
        G = torch.bmm(grad_pixels[:, tile], patches, out=_part_of(memory, (B, o, R))).to(dtype)
        rows, bank_rows = G.view(B, o * taps, -1), bank[:, tile].reshape(K, o * taps, -1)
        torch.bmm(bank_rows.transpose(0, 1), rows.permute(1, 2, 0), out=products[tile].flatten(0, 1))
        if out_attn is not None or tap_attn is not None:
            rows *= gates[:, tile].flatten(1)[..., None]
        torch.mm(share.T, G.flatten(1), out=grad_bank[:, tile].flatten(1))

    grad_kernel_attn = grad_out_attn = grad_tap_attn = grad_bias = None
    by_channel = torch.einsum('otkb,bt->okb', products, tap)
    if bias is not None:
        of_bias = grad_pixels.sum(2, dtype=dtype)  # (B, O)
        by_channel += torch.einsum('bo,ko->okb', of_bias, bias.reshape(K, O))
        grad_bias = (share.T @ (of_bias * out)).reshape(-1)
    if kernel_attn is not None:
        grad_kernel_attn = torch.einsum('okb,bo->bk', by_channel, out)
    if out_attn is not None:
        grad_out_attn = torch.einsum('okb,bk->bo', by_channel, share)
    if tap_attn is not None:
        grad_tap_attn = torch.einsum('otkb,bk,bo->bt', products, share, out)
    return grad_weight, grad_kernel_attn, grad_out_attn, grad_tap_attn, grad_bias


def _share(weight: Tensor, kernel_attn: Tensor | None, batch: int) -> Tensor:
    return weight.new_ones(batch, 1) if kernel_attn is None else kernel_attn.to(weight.dtype)


def _gated(x: Tensor, in_attn: Tensor | None) -> Tensor:
    return x if in_attn is None else x * in_attn.to(x.dtype)[:, :, None, None]


def _tiles(share: Tensor, bank: Tensor, size: int, dtype: torch.dtype | None = None) -> tuple[list[slice], Tensor]:
    """Ranges of the output channels, and memory for one tile: to allocate it each time costs more than to mix it."""
    B, (_, O, R) = len(share), bank.shape
    step = size // (B * R * bank.element_size())
    step = min(max(step // NARROWEST * NARROWEST, NARROWEST), O)
    tiles = [slice(start, min(start + step, O)) for start in range(0, O, step)]
    return tiles, bank.new_empty(B * step * R, dtype=dtype)


def _part_of(memory: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return memory[:shape[0] * shape[1] * shape[2]].view(shape)


def _mix(share: Tensor, tile: Tensor, memory: Tensor) -> Tensor:
    """share (B, K), tile (K, o, R) -> mixed kernels (B, o, R) in `memory`"""
    kernels = _part_of(memory, (len(share), *tile.shape[1:]))
    torch.mm(share, tile.flatten(1), out=kernels.flatten(1))
    return kernels
