"""Dynamic convolution in Triton: each image is convolved with its own mixed kernel, which lies in memory.

Everything inside is channels_last, and groups = 1. A mixed kernel costs K multiplications and one store for each
weight, which the convolution earns back where it has many output pixels. `_conv_kernel` convolves forward and, for the
gradient of the images, backward; the kernels' gradients are matrix products in PyTorch (`im2col.py`).

No atomics: programs write partial sums that are added afterwards, so a result repeats bit for bit. Proven in Triton's
interpreter and compiled ahead of time for sm_80 to sm_120; not yet run on a GPU.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import im2col
from .case import Attention, Case, Gradients

BLOCK = 1024  # weights that a program mixes; this, SAMPLES and TILES are estimates, not yet measured on a GPU
SAMPLES = 8  # images that share one load of the K kernels


class Tile(NamedTuple):
    """What one program computes at a time."""
    channels: int  # of the result
    pixels: int  # of the result
    depth: int  # channels that are summed
    warps: int
    stages: int


# By channels and bytes of a number. As large as registers and the 99 KiB of shared memory allow that every GPU since
# Ampere has.
TILES = {
    (64, 2): Tile(64, 128, 64, 8, 4),
    (128, 2): Tile(128, 128, 32, 8, 4),
    (64, 4): Tile(64, 128, 16, 8, 2),
}


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case, channels: int) -> Tensor:
    """The result (B, O, H', W'), channels_last; arguments as of `reference.forward`, channels in multiples of 8.

    `channels` is the first key of `TILES`. float32 is multiplied in full float32.
    """
    y = torch.empty(
        case.batch, case.out_channels, *case.output_size, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last)
    with torch.cuda.device_of(x):
        kernels = _mix_kernels(_prepared(weight), attention._replace(out_attn=None), case)
        _convolve(_prepared(x), kernels, attention.out_attn, None, y, case, channels, backward=False)
    return y


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case, channels: int) -> Gradients:
    """Gradients of x (channels_last), weight and attention; None for what is None."""
    grad_y, x, weight = _prepared(grad_y), _prepared(x), _prepared(weight)
    grad_x, grad_in_attn = image_gradient(grad_y, x, weight, attention, case, channels)
    case = case._replace(channels_last=True, weight_channels_last=True)
    grad_weight, gradients = im2col.kernel_gradient(grad_y, x, weight, attention, case)
    return grad_x, grad_weight, gradients._replace(in_attn=grad_in_attn)


def image_gradient(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case, channels: int,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (channels_last) and in_attn: all that is in Triton of the backward pass."""
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    probe = None if attention.in_attn is None else _prepared(x)
    with torch.cuda.device_of(x):
        kernels = _mix_kernels(_prepared(weight), attention._replace(in_attn=None), case)
        grad_in_attn = _convolve(
            _prepared(grad_y), kernels, attention.in_attn, probe, grad_x, case, channels, backward=True)
    return grad_x, grad_in_attn


def _mix_kernels(weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """weight (K * O, I, kh, kw), channels_last -> (B, O, kh, kw, I) in the images' dtype, mixed in float32"""
    B, K, O, I, (kh, kw) = case.batch, case.num_kernels, case.out_channels, case.in_channels, case.kernel_size
    mixed = torch.empty(B, O, kh, kw, I, dtype=case.dtype, device=weight.device)
    grid = (triton.cdiv(O * kh * kw * I, BLOCK) * triton.cdiv(B, SAMPLES),)
    kernel_attn, *others = attention
    if kernel_attn is None:
        kernel_attn = weight.new_ones(B, 1)
    _mix_kernel[grid](
        weight, kernel_attn, *others, mixed, B, O, I,
        K=K, TAPS=kh * kw, SAMPLES=SAMPLES, BLOCK=BLOCK, enable_fp_fusion=True)  # off by default since Triton 3.9
    return mixed


def _prepared(t: Tensor) -> Tensor:
    """channels_last, from an address that is a multiple of 16: for others the kernels would be compiled again."""
    t = t.contiguous(memory_format=torch.channels_last)
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _convolve(src, kernels, attn, probe, dst, case: Case, channels: int, backward: bool) -> Tensor | None:
    """Fill dst from src, `_conv_kernel` says how; returns its sums with the probe (B, N)."""
    tile = TILES[channels, src.element_size()]
    B, C, H, W = src.shape
    N, oh, ow = dst.shape[1:]
    # Going backwards only every stride-th tap reaches a pixel. Pixels of one remainder (phase) share their taps; each
    # phase must have a pixel. A single phase is correct, too, and looks at every tap.
    phased = backward and case.dilation == (1, 1) and oh >= case.stride[0] and ow >= case.stride[1]
    phases = case.stride if phased else (1, 1)
    tiles_m = phases[0] * phases[1] * triton.cdiv(
        triton.cdiv(oh, phases[0]) * triton.cdiv(ow, phases[1]), tile.pixels)
    sums = None if probe is None else torch.empty(B, tiles_m, N, dtype=torch.float32, device=src.device)
    _conv_kernel[(B * triton.cdiv(N, tile.channels) * tiles_m,)](
        src, kernels, attn, probe, dst, sums, C // 8, H, W, N // 8, oh, ow, *case.padding, tiles_m,
        KH=case.kernel_size[0], KW=case.kernel_size[1], STRIDE_H=case.stride[0], STRIDE_W=case.stride[1],
        DILATION_H=case.dilation[0], DILATION_W=case.dilation[1], PHASES_H=phases[0], PHASES_W=phases[1],
        BACKWARD=backward, BLOCK_N=tile.channels, BLOCK_M=tile.pixels, BLOCK_C=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)  # off by default since Triton 3.9
    return None if sums is None else sums.sum(1)


@triton.jit(do_not_specialize=['B'])  # the last batch of an epoch is to compile nothing
def _mix_kernel(
        weight, kernel_attn, in_attn, out_attn, tap_attn, mixed, B, O, I,
        K: tl.constexpr, TAPS: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):
    size = O * TAPS * I
    blocks = tl.cdiv(size, BLOCK)
    e = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # elements of one kernel
    o, tap, i = e // (TAPS * I), e // I % TAPS, e % I
    inside = e < size
    kernels = ()
    for k in tl.static_range(K):
        kernels += (tl.load(weight + k * size + e, mask=inside, other=0.0).to(tl.float32),)
    first = (tl.program_id(0) // blocks).to(tl.int64) * SAMPLES  # int64: b * size can pass 2**31
    for b in range(first, tl.minimum(first + SAMPLES, B)):
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.static_range(K):
            total += tl.load(kernel_attn + b * K + k).to(tl.float32) * kernels[k]
        if in_attn is not None:
            total *= tl.load(in_attn + b * I + i, mask=inside, other=0.0).to(tl.float32)
        if out_attn is not None:
            total *= tl.load(out_attn + b * O + o, mask=inside, other=0.0).to(tl.float32)
        if tap_attn is not None:
            total *= tl.load(tap_attn + b * TAPS + tap, mask=inside, other=0.0).to(tl.float32)
        tl.store(mixed + b * size + e, total.to(mixed.dtype.element_ty), mask=inside)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision='ieee')


@triton.jit
def _conv_kernel(
        src, kernels, attn, probe, dst, sums, C8, H, W, N8, OH, OW, PAD_H, PAD_W, TILES_M,
        KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
        DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PHASES_H: tl.constexpr, PHASES_W: tl.constexpr,
        BACKWARD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """acc[b, n, m] = sum of kernels[b, n, tap, c] * src[b, c, the pixel that tap joins with m] over taps and channels c
    dst[b, n, m] = attn[b, n] * acc,  sums[b, tile of m, n] = sum_m probe[b, n, m] * acc

    Forward n, m are output channels and pixels and c input channels; BACKWARD swaps the two sides, and the kernels lie
    as kernels[b, c, tap, n].
    """
    C, N = C8 * 8, N8 * 8  # so that the compiler knows rows of channels to start where 16 bytes do
    program, tiles_n = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = program % TILES_M, program // TILES_M % tiles_n  # neighbours share the kernel of an image
    b = (program // (TILES_M * tiles_n)).to(tl.int64)  # int64: b * size can pass 2**31
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    phase, m = tile_m % (PHASES_H * PHASES_W), tile_m // (PHASES_H * PHASES_W) * BLOCK_M + tl.arange(0, BLOCK_M)
    phase_h, phase_w = phase // PHASES_W, phase % PHASES_W
    columns = tl.cdiv(OW - phase_w, PHASES_W)
    in_dst = m < tl.cdiv(OH - phase_h, PHASES_H) * columns
    row, column = phase_h + PHASES_H * (m // columns), phase_w + PHASES_W * (m % columns)
    first_kh, first_kw = (phase_h + PAD_H) % PHASES_H, (phase_w + PAD_W) % PHASES_W
    taps_h, taps_w = tl.cdiv(KH - first_kh, PHASES_H), tl.cdiv(KW - first_kw, PHASES_W)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    blocks = tl.cdiv(C, BLOCK_C)
    src += b * H * W * C
    kernels += b * N * KH * KW * C
    for step in range(taps_h * taps_w * blocks):
        kh, kw = first_kh + PHASES_H * (step // blocks // taps_w), first_kw + PHASES_W * (step // blocks % taps_w)
        tap = kh * KW + kw
        c = step % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        if BACKWARD:
            h, w = row + PAD_H - kh * DILATION_H, column + PAD_W - kw * DILATION_W
            in_src = in_dst & (h >= 0) & (w >= 0) & (h % STRIDE_H == 0) & (w % STRIDE_W == 0)
            h, w = h // STRIDE_H, w // STRIDE_W
            offsets = (c[None, :] * (KH * KW) + tap) * N + n[:, None]
        else:
            h, w = row * STRIDE_H - PAD_H + kh * DILATION_H, column * STRIDE_W - PAD_W + kw * DILATION_W
            in_src = in_dst & (h >= 0) & (w >= 0)
            offsets = (n[:, None] * (KH * KW) + tap) * C + c[None, :]
        kernel = tl.load(kernels + offsets, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)  # [BLOCK_N, BLOCK_C]
        image = tl.load(  # [BLOCK_M, BLOCK_C]
            src + (h * W + w)[:, None] * C + c[None, :],
            mask=(in_src & (h < H) & (w < W))[:, None] & (c < C)[None, :], other=0.0)
        acc = _dot(kernel, tl.trans(image), acc)

    pixels = (row * OW + column)[None, :] * N + n[:, None]  # [BLOCK_N, BLOCK_M]
    inside = (n < N)[:, None] & in_dst[None, :]
    if probe is not None:
        values = tl.load(probe + b * OH * OW * N + pixels, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + (b * TILES_M + tile_m) * N + n, tl.sum(acc * values, 1), mask=n < N)
    if attn is not None:
        acc *= tl.load(attn + b * N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(dst + b * OH * OW * N + pixels, acc.to(dst.dtype.element_ty), mask=inside)
