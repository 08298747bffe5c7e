"""Dynamic convolution on the CPU as matrix products over the patches of the images, a few output channels at a time.

A tile of output channels is mixed for all images at once, small enough to stay in the cache, and multiplied with the
patches (im2col) before the next one is mixed: each of the K kernels is read once per batch, and no kernel per image is
ever held in memory. The backward pass mixes a tile again, takes the gradient of every image's mixed tile and adds it to
those of the K kernels and of the attention while it is in the cache. It wins where kernels are large beside the images,
which is also where convolutions of single images are slow.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

TILE_BYTES = 4 * 2**20  # of a tile of all mixed kernels; memory of 9 MiB is handed back to the system after each call
NARROWEST = 32  # output channels: narrower matrices are multiplied at half the speed


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0, groups = 1."""
    last = _rows_are_pixels(x, weight)
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
    dtype, last = weight.dtype, _rows_are_pixels(x, weight)
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


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def kernel_rows(weight: Tensor, kernel_attn: Tensor | None) -> Tensor:
    """The K kernels (K, O, R) with the R = I * taps weights of an output channel in the order they have in memory."""
    K = 1 if kernel_attn is None else kernel_attn.shape[1]
    rows = weight.permute(0, 2, 3, 1) if is_channels_last(weight) else weight
    return rows.reshape(K, weight.shape[0] // K, -1)


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


def per_element(tap_attn: Tensor, weight: Tensor) -> Tensor:
    """tap_attn (B, taps) -> (B, 1, R), the factor of each element of a row of the kernels"""
    I = weight.shape[1]
    return (tap_attn.repeat_interleave(I, 1) if is_channels_last(weight) else tap_attn.repeat(1, I))[:, None]


def by_tap(of_elements: Tensor, weight: Tensor) -> Tensor:
    """Adjoint of `per_element`: (B, R) -> (B, taps)"""
    I = weight.shape[1]
    if is_channels_last(weight):
        return of_elements.unflatten(1, (-1, I)).sum(2)
    return of_elements.unflatten(1, (I, -1)).sum(1)


def patches_of(x, weight, stride, padding, dilation) -> tuple[Tensor, tuple[int, int]]:
    """x (B, I, H, W) -> what each output pixel sees (B, P, R), R in the order of the kernels; height and width of P"""
    windows = _windows(_padded(x, weight, padding), weight, stride, dilation)  # (B, I, kh, kw, H', W')
    size = windows.shape[4], windows.shape[5]
    if _rows_are_pixels(x, weight):
        return windows.permute(0, 4, 5, 2, 3, 1).reshape(len(x), size[0] * size[1], -1), size
    return windows.reshape(len(x), -1, size[0] * size[1]).mT, size


def sum_patches(grad_patches, x, weight, stride, padding, dilation) -> Tensor:
    """Adjoint of `patches_of`: (B, P, R) -> (B, I, H, W)"""
    grad_padded = torch.zeros_like(_padded(x, weight, padding))
    windows = _windows(grad_padded, weight, stride, dilation)
    B, I, kh, kw, height, width = windows.shape
    if _rows_are_pixels(x, weight):
        parts = grad_patches.reshape(B, height, width, kh, kw, I).permute(0, 5, 3, 4, 1, 2)
    else:
        parts = grad_patches.mT.reshape(windows.shape)
    if kh * kw == 1 and list(stride) == [1, 1] and grad_padded.shape == x.shape:
        return parts[:, :, 0, 0]
    for i in range(kh):
        for j in range(kw):
            windows[:, :, i, j] += parts[:, :, i, j]
    return grad_padded[:, :, padding[0]:padding[0] + x.shape[2], padding[1]:padding[1] + x.shape[3]]


def _rows_are_pixels(x: Tensor, weight: Tensor) -> bool:
    """Whether the patches are laid out pixel by pixel, as in channels_last, which 1x1 kernels don't tell."""
    return is_channels_last(x if weight.shape[2:] == (1, 1) else weight)


def _padded(x: Tensor, weight: Tensor, padding) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last if _rows_are_pixels(x, weight) else torch.contiguous_format)
    return F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x


def _windows(padded: Tensor, weight: Tensor, stride, dilation) -> Tensor:
    """A view (B, I, kh, kw, H', W') of the padded images (B, I, H, W)."""
    size = [
        (padded.shape[2 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]
    b, c, h, w = padded.stride()
    return padded.as_strided(
        (*padded.shape[:2], *weight.shape[2:], *size),
        (b, c, dilation[0] * h, dilation[1] * w, stride[0] * h, stride[1] * w), padded.storage_offset(),
    )
