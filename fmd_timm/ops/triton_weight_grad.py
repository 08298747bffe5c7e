"""Gradients of the K kernels and of what mixes them, in Triton, for groups = 1.

One program sees a tile of the K kernels, computes the gradient of each image's mixed kernel there in registers, and
adds it to the K gradients in turn: gradients of the images' kernels never reach memory. The gradients of kernel_attn,
out_attn and tap_attn are inner products of that same tile. No atomics: programs write partial sums that are added
afterwards, so a result repeats bit for bit. Proven in Triton's interpreter and compiled ahead of time for sm_80 and
sm_90; not yet run on a GPU.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_conv import dot, multiplier

# Two for each of the 132 multiprocessors of an H200; how often the work is split by images. An estimate.
PROGRAMS = 264


class GradTile(NamedTuple):
    """What one program computes at a time, for one tap of the K kernels."""
    o: int
    i: int
    m: int  # output pixels that are summed
    warps: int
    stages: int


# As `TILES` of triton_conv.py.
TILES = {
    ('wgmma', False): GradTile(64, 64, 64, 8, 3),
    ('wgmma', True): GradTile(64, 32, 64, 8, 3),
    ('mma', False): GradTile(64, 64, 32, 8, 3),
    ('mma', True): GradTile(64, 32, 64, 8, 3),
    ('fma', False): GradTile(64, 32, 32, 8, 2),
    ('fma', True): GradTile(32, 32, 16, 4, 2),
}


def weight_gradient(
        grad_y: Tensor,
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor,
        in_attn: Tensor | None,
        out_attn: Tensor | None,
        tap_attn: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of weight (its dtype, channels_last), kernel_attn, out_attn and tap_attn (float32).

    Arguments as of `triton_conv.image_gradient`. What a bias adds to the gradients is not among the results.
    """
    B, I, H, W = x.shape
    O, oh, ow = grad_y.shape[1:]
    K, (kh, kw) = kernel_attn.shape[1], weight.shape[2:]
    tile = TILES[multiplier(x), K > 4]
    tiles_i = triton.cdiv(I, tile.i)
    tiles = triton.cdiv(O, tile.o) * tiles_i * kh * kw
    chunk = triton.cdiv(B, triton.cdiv(PROGRAMS, tiles))  # images per program
    chunks = triton.cdiv(B, chunk)
    new = dict(dtype=torch.float32, device=x.device)
    dtype = weight.dtype if chunks == 1 else torch.float32
    dweight = torch.empty(chunks, K * O, kh, kw, I, dtype=dtype, device=x.device)
    dkernel_attn = torch.empty(B, tiles, K, **new)
    dout_attn = None if out_attn is None else torch.empty(B, tiles_i * kh * kw, O, **new)
    dtap_attn = None if tap_attn is None else torch.empty(B, tiles // (kh * kw), kh * kw, **new)
    _weight_grad_kernel[(tiles * chunks,)](
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, dweight, dkernel_attn, dout_attn, dtap_attn,
        B, chunk, I // 8, H, W, O // 8, oh, ow, *padding, triton.cdiv(oh * ow, tile.m),
        K=K, KW=kw, TAPS=kh * kw, STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1],
        BLOCK_O=tile.o, BLOCK_I=tile.i, BLOCK_M=tile.m,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)  # off by default since Triton 3.9
    dweight = dweight[0] if chunks == 1 else dweight.sum(0).to(weight.dtype)
    return (
        dweight.permute(0, 3, 1, 2),
        dkernel_attn.sum(1),
        None if dout_attn is None else dout_attn.sum(1),
        None if dtap_attn is None else dtap_attn.sum(1),
    )


@triton.jit(do_not_specialize=['B', 'CHUNK'])  # the last batch of an epoch is to compile nothing
def _weight_grad_kernel(
        gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, dweight, dkernel_attn, dout_attn, dtap_attn,
        B, CHUNK, I8, H, W, O8, OH, OW, PAD_H, PAD_W, STEPS,
        K: tl.constexpr, KW: tl.constexpr, TAPS: tl.constexpr,
        STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
        BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """One tap of a tile of the K kernels, for a chunk of the images. With the gradient of an image's mixed kernel
    G_b[o, i] = sum_m gy[b, o, m] * x[b, i, the pixel under the tap], all factors of channels and taps left out:

        dweight[k] = sum_b kernel_attn[b, k] * out_attn[b, o] * tap_attn[b, tap] * in_attn[b, i] * G_b
        along[b, k, o] = sum_i in_attn[b, i] * G_b * weight[k], what the gradients of the attentions are made of

    STEPS is the number of BLOCK_M in an image; Triton compiles 1 as a constant, which makes the images one pipeline.
    """
    I, O = I8 * 8, O8 * 8  # so that the compiler knows rows of channels to start where 16 bytes do
    tiles_i = tl.cdiv(I, BLOCK_I)
    tiles = tl.cdiv(O, BLOCK_O) * tiles_i * TAPS
    tile, chunk = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    tap, tile_i, tile_o = tile % TAPS, tile // TAPS % tiles_i, tile // (TAPS * tiles_i)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    offsets = (o[:, None] * TAPS + tap) * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    size = O * TAPS * I
    kernels, grads = (), ()
    for k in tl.static_range(K):
        kernels += (tl.load(weight + k * size + offsets, mask=inside, other=0.0).to(tl.float32),)
        grads += (tl.zeros([BLOCK_O, BLOCK_I], tl.float32),)

    for b in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, B)):
        grad = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for step in range(STEPS):
            m = step * BLOCK_M + tl.arange(0, BLOCK_M)
            h = m // OW * STRIDE_H - PAD_H + tap // KW * DILATION_H
            w = m % OW * STRIDE_W - PAD_W + tap % KW * DILATION_W
            in_gy = m < OH * OW
            in_x = in_gy & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            g = tl.load(
                gy + b * OH * OW * O + m[:, None] * O + o[None, :], mask=in_gy[:, None] & (o < O)[None, :], other=0.0)
            image = tl.load(
                x + b * H * W * I + (h * W + w)[:, None] * I + i[None, :], mask=in_x[:, None] & (i < I)[None, :],
                other=0.0)
            grad = dot(tl.trans(g), image, grad)

        if in_attn is not None:
            grad *= tl.load(in_attn + b * I + i, mask=i < I, other=0.0)[None, :]
        out_factor = tl.full([BLOCK_O], 1.0, tl.float32)
        if out_attn is not None:
            out_factor = tl.load(out_attn + b * O + o, mask=o < O, other=0.0)
        tap_factor = 1.0
        if tap_attn is not None:
            tap_factor = tl.load(tap_attn + b * TAPS + tap)
        scaled = grad * (out_factor * tap_factor)[:, None]
        mixed_along = tl.zeros([BLOCK_O], tl.float32)
        previous, grads = grads, ()
        for k in tl.static_range(K):
            share = tl.load(kernel_attn + b * K + k)
            grads += (previous[k] + share * scaled,)
            along = tl.sum(grad * kernels[k], 1)
            mixed_along += share * along
            tl.store(dkernel_attn + (b * tiles + tile) * K + k, tl.sum(along * out_factor) * tap_factor)
        if dout_attn is not None:
            row = (b * tiles_i + tile_i) * TAPS + tap
            tl.store(dout_attn + row * O + o, mixed_along * tap_factor, mask=o < O)
        if dtap_attn is not None:
            tl.store(dtap_attn + b * tiles + tile, tl.sum(mixed_along * out_factor))

    for k in tl.static_range(K):
        tl.store(
            dweight + (chunk * K + k) * size + offsets, grads[k].to(dweight.dtype.element_ty), mask=inside)
