"""Dynamic convolution on the CPU for inference, by kernels that were laid out for it beforehand.

Matrix products over the patches of the images, as in `im2col.py`, but of transposed kernels (R, O), which multiply
a quarter faster where there are few patches. A tile is some of the R rows of all mixed kernels; the products of one
tile after the other are summed up in the result.
"""
import torch
from torch import Tensor

from .im2col import TILE_BYTES
from .layout import kernel_rows, patches_of, per_element

__all__ = ['forward', 'transposed']


def transposed(weight: Tensor, num_kernels: int) -> Tensor:
    """The K kernels (K * O, I, kh, kw) as a bank (K, R, O)"""
    return kernel_rows(weight, None)[0].unflatten(0, (num_kernels, -1)).mT.contiguous()


def forward(
        x, bank, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, shift, stride, padding, dilation,
) -> Tensor:
    """`fmd_timm.ops.dynamic_conv2d` for B > 0 and groups = 1, with a shift (O,) added in the end if there is one.

    `bank` is `transposed(weight, K)`. The result is channels_last.
    """
    B, (K, R, O) = len(x), bank.shape
    is_pointwise = R == x.shape[1]
    # The gate goes where there are fewer numbers to multiply.
    gates_kernels = in_attn is not None and is_pointwise and R * O <= 2 * x[0].numel()
    images = x if in_attn is None or gates_kernels else x * in_attn[:, :, None, None]
    patches, size = patches_of(images, weight, stride, padding, dilation)  # (B, P, R)
    if tap_attn is not None:
        patches = patches * per_element(tap_attn, weight)
    share = x.new_ones(B, 1) if kernel_attn is None else kernel_attn
    y = x.new_empty(B, patches.shape[1], O)
    step = min(max(TILE_BYTES // (B * O * x.element_size()), 1), R)
    memory = x.new_empty(B * step * O)
    for start in range(0, R, step):
        rows = slice(start, min(start + step, R))
        mixed = memory[:B * (rows.stop - start) * O].view(B, -1, O)
        torch.mm(share, bank[:, rows].flatten(1), out=mixed.flatten(1))
        if gates_kernels:
            mixed *= in_attn[:, rows, None]
        if start:
            y.baddbmm_(patches[:, :, rows], mixed)
        else:
            torch.bmm(patches[:, :, rows], mixed, out=y)
    if bias is not None:
        y += (share @ bias.view(K, O))[:, None]
    if out_attn is not None and shift is not None:
        torch.addcmul(shift, y, out_attn[:, None], out=y)
    elif out_attn is not None:
        y *= out_attn[:, None]
    elif shift is not None:
        y += shift
    return y.mT.unflatten(2, size)
