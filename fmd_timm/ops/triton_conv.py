"""Dynamic convolution and its gradient with respect to the images, in Triton, for groups = 1.

Everything inside is channels_last. Two ways lead to the same result:

- materialised: the kernel of every image is mixed in memory (`triton_mix.py`) and each image convolved with its own.
- fused: the convolution loads each tile of the K kernels once for a group of images and mixes it for each of them in
  registers, so the mixed kernels never reach memory.

No atomics: programs write partial sums that are added afterwards, so a result repeats bit for bit. Proven in Triton's
interpreter and compiled ahead of time for sm_80 and sm_90; not yet run on a GPU.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_mix import mix_kernels


class ConvTile(NamedTuple):
    """What one program computes at a time."""
    samples: int  # images that share one load of the K kernels
    n: int  # channels of the result
    m: int  # pixels of the result
    c: int  # channels that are summed
    warps: int
    stages: int


class Tiles(NamedTuple):
    materialised: ConvTile
    small: ConvTile  # fused, up to 64 pixels
    large: ConvTile  # fused, above


# By how the GPU multiplies (wgmma: half precision on Hopper, mma: on others, fma: float32) and whether K > 4. Tiles are
# as large as the registers that the compiler reports allow, an estimate of what is fast; all but those of wgmma fit the
# 99 KiB of shared memory that every GPU since Ampere has.
TILES = {
    ('wgmma', False): Tiles(
        ConvTile(1, 64, 128, 64, 4, 4), ConvTile(4, 64, 64, 32, 4, 3), ConvTile(2, 64, 128, 32, 4, 3)),
    ('wgmma', True): Tiles(
        ConvTile(1, 64, 128, 64, 4, 4), ConvTile(4, 64, 64, 32, 8, 3), ConvTile(2, 64, 128, 32, 8, 3)),
    ('mma', False): Tiles(
        ConvTile(1, 64, 128, 32, 4, 3), ConvTile(4, 32, 64, 32, 4, 3), ConvTile(2, 32, 128, 32, 4, 3)),
    ('mma', True): Tiles(
        ConvTile(1, 64, 128, 32, 4, 3), ConvTile(2, 64, 64, 32, 4, 3), ConvTile(1, 64, 128, 32, 4, 3)),
    ('fma', False): Tiles(
        ConvTile(1, 64, 64, 16, 8, 3), ConvTile(2, 64, 64, 16, 8, 2), ConvTile(1, 64, 128, 16, 8, 2)),
    ('fma', True): Tiles(
        ConvTile(1, 64, 64, 16, 8, 3), ConvTile(2, 64, 64, 16, 8, 2), ConvTile(1, 64, 128, 16, 8, 2)),
}


def multiplier(x: Tensor) -> str:
    """How the GPU of x multiplies numbers of its dtype, the first key of the tables of tiles."""
    if x.dtype == torch.float32:
        return 'fma'
    # Without a GPU, in Triton's interpreter, any will do.
    return 'wgmma' if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9 else 'mma'


def convolve(
        x: Tensor,
        weight: Tensor,
        kernel_attn: Tensor,
        in_attn: Tensor | None,
        out_attn: Tensor | None,
        tap_attn: Tensor | None,
        mixed_bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        materialise: bool,
) -> Tensor:
    """y_b = out_attn[b] * (conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k) + mixed_bias[b])

    Args:
        x: Images (B, I, H, W) in float32, bfloat16 or float16, channels_last, I a multiple of 8. float32 is multiplied
            in full float32.
        weight: The K kernels (K * O, I, kh, kw), channels_last, O a multiple of 8; may be float32 beside
            half-precision images.
        kernel_attn: (B, K), like the other attentions and mixed_bias contiguous and in float32.
        in_attn: (B, I)
        out_attn: (B, O)
        tap_attn: (B, kh * kw)
        mixed_bias: sum_k kernel_attn[b, k] bias_k, (B, O)
        stride: Pixels.
        padding: Pixels of zeros on each side.
        dilation: Pixels between kernel taps.
        materialise: Whether the kernel of every image is mixed in memory.

    Returns:
        (B, O, H', W') in the dtype of x, channels_last.
    """
    oh, ow = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    y = torch.empty(
        x.shape[0], weight.shape[0] // kernel_attn.shape[1], oh, ow, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last)
    _convolve(
        x, weight, kernel_attn, in_attn, tap_attn, out_attn, mixed_bias, None, y, stride, padding, dilation,
        materialise, backward=False)
    return y


def image_gradient(
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
        materialise: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (channels_last) and in_attn (float32): the convolution that runs the kernels backwards.

    grad_y (B, O, H', W') is channels_last in the dtype of x; the other arguments are those of `convolve`.
    """
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_in_attn = _convolve(
        grad_y, weight, kernel_attn, out_attn, tap_attn, in_attn, None, None if in_attn is None else x, grad_x,
        stride, padding, dilation, materialise, backward=True)
    return grad_x, grad_in_attn


def _convolve(
        src, weight, kernel_attn, c_attn, tap_attn, n_attn, bias, probe, dst, stride, padding, dilation, materialise,
        backward):
    """Fill dst from src, `_conv_kernel` says how; returns its sums with the probe, (B, N)."""
    B, C, H, W = src.shape
    N, oh, ow = dst.shape[1:]
    K, (kh, kw) = kernel_attn.shape[1], weight.shape[2:]
    # Going backwards only every stride-th tap reaches a pixel. Pixels of one remainder (phase) share their taps; each
    # phase must have a pixel. A single phase is correct, too, and looks at every tap.
    phased = backward and tuple(dilation) == (1, 1) and oh >= stride[0] and ow >= stride[1]
    phases = stride if phased else (1, 1)
    phase_pixels = triton.cdiv(oh, phases[0]) * triton.cdiv(ow, phases[1])
    tiles = TILES[multiplier(src), K > 4]
    if materialise:
        tile = tiles.materialised
        in_attn, out_attn = (None, c_attn) if backward else (c_attn, None)
        weight = mix_kernels(weight, kernel_attn, in_attn, out_attn, tap_attn, src.dtype)
        K, kernel_attn, c_attn, tap_attn = 0, None, None, None
    else:
        tile = tiles.small if phase_pixels <= tiles.small.m else tiles.large
        weight = weight.to(src.dtype)  # every group of images reads all of it
    tiles_m = phases[0] * phases[1] * triton.cdiv(phase_pixels, tile.m)
    programs = triton.cdiv(B, tile.samples) * triton.cdiv(N, tile.n) * tiles_m
    sums = None
    if probe is not None:
        sums = torch.empty(B, tiles_m, N, dtype=torch.float32, device=src.device)
    _conv_kernel[(programs,)](
        src, weight, kernel_attn, c_attn, tap_attn, n_attn, bias, probe, dst, sums,
        B, C // 8, H, W, N // 8, oh, ow, *padding, tiles_m,
        K=K, KH=kh, KW=kw, STRIDE_H=stride[0], STRIDE_W=stride[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
        PHASES_H=phases[0], PHASES_W=phases[1], BACKWARD=backward,
        SAMPLES=tile.samples, BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_C=tile.c,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)  # off by default since Triton 3.9
    return None if sums is None else sums.sum(1)


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision='ieee')


@triton.jit(do_not_specialize=['B'])  # the last batch of an epoch is to compile nothing
def _conv_kernel(
        src, weight, kernel_attn, c_attn, tap_attn, n_attn, bias, probe, dst, sums,
        B, C8, H, W, N8, OH, OW, PAD_H, PAD_W, TILES_M,
        K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
        STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
        PHASES_H: tl.constexpr, PHASES_W: tl.constexpr, BACKWARD: tl.constexpr,
        SAMPLES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """acc[b, n, m] = sum of mixed[b, n, tap, c] * src[b, c, the pixel that tap joins with m] over taps and channels c
    mixed[b, n, tap, c] = c_attn[b, c] * tap_attn[b, tap] * sum_k kernel_attn[b, k] * weight[k, n, tap, c]
    dst[b, n, m] = n_attn[b, n] * (acc + bias[b, n]),  sums[b, tile of m, n] = sum_m probe[b, n, m] * acc

    Forward n, m are output channels and pixels and c input channels; BACKWARD swaps the two sides. With K = 0 the
    kernels in `weight` are mixed already, one for each image.
    """
    C, N = C8 * 8, N8 * 8  # so that the compiler knows rows of channels to start where 16 bytes do
    program, tiles_n, groups = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(B, SAMPLES)
    if K == 0:  # neighbours share the kernel of an image
        tile_m, tile_n, group = program % TILES_M, program // TILES_M % tiles_n, program // (TILES_M * tiles_n)
    else:  # neighbours share the tile of the K kernels
        group, tile_n, tile_m = program % groups, program // groups % tiles_n, program // (groups * tiles_n)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    phase, m = tile_m % (PHASES_H * PHASES_W), tile_m // (PHASES_H * PHASES_W) * BLOCK_M + tl.arange(0, BLOCK_M)
    phase_h, phase_w = phase // PHASES_W, phase % PHASES_W
    columns = tl.cdiv(OW - phase_w, PHASES_W)
    in_dst = m < tl.cdiv(OH - phase_h, PHASES_H) * columns
    row, column = phase_h + PHASES_H * (m // columns), phase_w + PHASES_W * (m % columns)
    first_kh, first_kw = (phase_h + PAD_H) % PHASES_H, (phase_w + PAD_W) % PHASES_W
    taps_h, taps_w = tl.cdiv(KH - first_kh, PHASES_H), tl.cdiv(KW - first_kw, PHASES_W)

    accs = ()
    for _ in tl.static_range(SAMPLES):
        accs += (tl.zeros([BLOCK_N, BLOCK_M], tl.float32),)
    blocks = tl.cdiv(C, BLOCK_C)
    size = N * KH * KW * C
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
        in_src = (in_src & (h < H) & (w < W))[:, None] & (c < C)[None, :]
        pixels = (h * W + w)[:, None] * C + c[None, :]  # [BLOCK_M, BLOCK_C]
        in_weight = (n < N)[:, None] & (c < C)[None, :]  # [BLOCK_N, BLOCK_C]
        kernels = ()
        for k in tl.static_range(K):
            kernels += (tl.load(weight + k * size + offsets, mask=in_weight, other=0.0),)

        previous, accs = accs, ()
        for s in tl.static_range(SAMPLES):
            b = tl.minimum(group * SAMPLES + s, B - 1).to(tl.int64)  # int64: b * size can pass 2**31
            if K == 0:
                mixed = tl.load(weight + b * size + offsets, mask=in_weight, other=0.0)
            else:
                total = tl.load(kernel_attn + b * K) * kernels[0].to(tl.float32)
                for k in tl.static_range(1, K):
                    total += tl.load(kernel_attn + b * K + k) * kernels[k].to(tl.float32)
                if c_attn is not None:
                    total *= tl.load(c_attn + b * C + c, mask=c < C, other=0.0)[None, :]
                if tap_attn is not None:
                    total *= tl.load(tap_attn + b * KH * KW + tap)
                mixed = total.to(src.dtype.element_ty)
            image = tl.load(src + b * H * W * C + pixels, mask=in_src, other=0.0)
            accs += (dot(mixed, tl.trans(image), previous[s]),)

    pixels = (row * OW + column)[None, :] * N + n[:, None]  # [BLOCK_N, BLOCK_M]
    for s in tl.static_range(SAMPLES):
        b = (group * SAMPLES + s).to(tl.int64)
        in_n = n < tl.where(b < B, N, 0)  # the last group may be short of images
        inside = in_n[:, None] & in_dst[None, :]
        acc = accs[s]
        if probe is not None:
            values = tl.load(probe + b * OH * OW * N + pixels, mask=inside, other=0.0).to(tl.float32)
            tl.store(sums + (b * TILES_M + tile_m) * N + n, tl.sum(acc * values, 1), mask=in_n)
        if bias is not None:
            acc += tl.load(bias + b * N + n, mask=in_n, other=0.0)[:, None]
        if n_attn is not None:
            acc *= tl.load(n_attn + b * N + n, mask=in_n, other=0.0)[:, None]
        tl.store(dst + b * OH * OW * N + pixels, acc.to(dst.dtype.element_ty), mask=inside)
