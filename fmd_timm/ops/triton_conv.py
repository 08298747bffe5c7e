"""Dynamic convolution on CUDA, in Triton: the operator of `fmd_timm.ops` for groups = 1 and its gradients.

Everything inside is channels_last. Two ways lead to the same result, chosen by the number of output pixels:

- materialised: the kernel of every image is mixed in memory (`triton_mix.py`) and each image convolved with its own.
- fused: the convolution loads each tile of the K kernels once for a group of images and mixes it for each of them in
  registers, so the mixed kernels never reach memory.

Either way the backward pass mixes again rather than keep a kernel for every image. The gradient of the weight lives in
registers: one program sees a tile of the K kernels, computes the gradient of each image's mixed kernel there, and adds
it to the K gradients in turn. The gradients of kernel_attn, out_attn and tap_attn are inner products of that same tile.
Programs write partial sums that are added afterwards, without atomics, so a result repeats bit for bit.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_mix import mix_kernels_triton

__all__ = ['dynamic_conv2d_triton', 'dynamic_conv2d_triton_backward']

# Rules. Estimates from the bandwidth and arithmetic of an H200, and the registers and shared memory that the compiler
# reports; not yet measured on a GPU.
MATERIALISE_ABOVE = 250  # output pixels from which a mixed kernel costs less to write and read than to mix repeatedly
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H200; how often the weight gradient is split by images


class ConvTile(NamedTuple):
    """What one program of a convolution computes at a time."""
    samples: int  # images that share one load of the K kernels
    n: int  # channels of the result
    m: int  # pixels of the result
    c: int  # channels that are summed
    warps: int
    stages: int


class GradTile(NamedTuple):
    """What one program of the weight gradient computes at a time, for one tap of the K kernels."""
    o: int
    i: int
    m: int  # output pixels that are summed
    warps: int
    stages: int


class Tiles(NamedTuple):
    materialised: ConvTile
    fused: ConvTile  # for at most 64 pixels; above, half the images and twice the pixels
    grad: GradTile


# By how the GPU multiplies (wgmma: half precision on Hopper, mma: on others, fma: float32) and whether K > 4. Tiles are
# as large as registers allow; all but those of wgmma fit the 99 KiB of shared memory that every GPU since Ampere has.
TILES = {
    ('wgmma', False): Tiles(
        ConvTile(1, 64, 128, 64, 4, 4), ConvTile(4, 64, 64, 32, 4, 3), GradTile(64, 64, 64, 8, 3)),
    ('wgmma', True): Tiles(
        ConvTile(1, 64, 128, 64, 4, 4), ConvTile(4, 64, 64, 32, 8, 3), GradTile(64, 32, 64, 8, 3)),
    ('mma', False): Tiles(
        ConvTile(1, 64, 128, 32, 4, 3), ConvTile(4, 32, 64, 32, 4, 3), GradTile(64, 64, 64, 8, 3)),
    ('mma', True): Tiles(
        ConvTile(1, 64, 128, 32, 4, 3), ConvTile(2, 64, 64, 32, 4, 3), GradTile(64, 32, 64, 8, 3)),
    ('fma', False): Tiles(
        ConvTile(1, 64, 64, 16, 8, 3), ConvTile(2, 64, 64, 16, 8, 2), GradTile(64, 32, 32, 8, 2)),
    ('fma', True): Tiles(
        ConvTile(1, 64, 64, 16, 8, 3), ConvTile(2, 64, 64, 16, 8, 2), GradTile(32, 32, 16, 4, 2)),
}


def _tiles(x: Tensor, K: int) -> Tiles:
    if x.dtype == torch.float32:
        return TILES['fma', K > 4]
    return TILES['wgmma' if _capability(x) == 9 else 'mma', K > 4]


def _capability(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8  # no GPU: Triton's interpreter


def dynamic_conv2d_triton(
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
) -> Tensor:
    """y_b = out_attn[b] * (conv(in_attn[b] * x_b, tap_attn[b] * sum_k kernel_attn[b, k] W_k) + mixed_bias[b])

    Args:
        x: Images (B, I, H, W) in float32, bfloat16 or float16; float32 is multiplied in full float32.
        weight: The K kernels (K * O, I, kh, kw), best channels_last; may be float32 beside half-precision images.
        kernel_attn: (B, K); like the other attentions and mixed_bias in float32.
        in_attn: (B, I)
        out_attn: (B, O)
        tap_attn: (B, kh * kw)
        mixed_bias: sum_k kernel_attn[b, k] bias_k, (B, O)
        stride: Pixels.
        padding: Pixels of zeros on each side.
        dilation: Pixels between kernel taps.

    Returns:
        (B, O, H', W') in the dtype of x, channels_last.
    """
    x, weight = _channels_last(x), _channels_last(weight)
    kernel_attn, in_attn, out_attn, tap_attn, mixed_bias = map(
        _contiguous, (kernel_attn, in_attn, out_attn, tap_attn, mixed_bias))
    B, O = x.shape[0], weight.shape[0] // kernel_attn.shape[1]
    oh, ow = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    with torch.cuda.device_of(x):
        if B > 0 and _is_matmul(weight, oh * ow, stride, padding):
            mixed = mix_kernels_triton(weight, kernel_attn, in_attn, out_attn, tap_attn, x.dtype)
            y = torch.bmm(_pixels(x), mixed.reshape(B, O, -1).mT)  # (B, H * W, O)
            if mixed_bias is not None:
                y += (mixed_bias if out_attn is None else mixed_bias * out_attn)[:, None, :]
            return y.reshape(B, oh, ow, O).permute(0, 3, 1, 2)

        y = torch.empty(B, O, oh, ow, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        _convolve(
            x, weight, kernel_attn, in_attn, tap_attn, out_attn, mixed_bias, None, y, stride, padding, dilation,
            backward=False)
    return y


def dynamic_conv2d_triton_backward(
        gy: Tensor,
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
        needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and mixed_bias, None where not in `needs`.

    gy is the gradient of the result; the other arguments are those of `dynamic_conv2d_triton`. The gradient of x is
    channels_last, that of weight has the strides of weight, the others are float32.
    """
    needs = [need and t is not None for need, t in zip(
        needs, (x, weight, kernel_attn, in_attn, out_attn, tap_attn, mixed_bias))]
    need_x, need_weight, need_kernel, need_in, need_out, need_tap, need_bias = needs
    weight_like = weight
    gy, x, weight = _channels_last(gy.to(x.dtype)), _channels_last(x), _channels_last(weight)
    kernel_attn, in_attn, out_attn, tap_attn, mixed_bias = map(
        _contiguous, (kernel_attn, in_attn, out_attn, tap_attn, mixed_bias))
    dx = dweight = dkernel_attn = din_attn = dout_attn = dtap_attn = dmixed_bias = None
    with torch.cuda.device_of(x):
        if need_x or need_in:
            dx, din_attn = _image_grad(
                gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, need_in, stride, padding, dilation)
        if need_weight or need_kernel or need_out or need_tap:
            dweight, dkernel_attn, dout_attn, dtap_attn = _weight_grad(
                gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, stride, padding, dilation)
            if weight_like.is_contiguous(memory_format=torch.channels_last):  # but 1x1 may be strided as if it were not
                dweight = dweight.as_strided(weight_like.shape, weight_like.stride())
            else:
                dweight = torch.empty_like(weight_like).copy_(dweight)
    if mixed_bias is not None and (need_bias or need_out):
        dmixed_bias = gy.sum((2, 3), dtype=torch.float32)
        if need_out:
            dout_attn = dout_attn + mixed_bias * dmixed_bias
        if out_attn is not None:
            dmixed_bias = out_attn * dmixed_bias
    grads = dx, dweight, dkernel_attn, din_attn, dout_attn, dtap_attn, dmixed_bias
    return tuple(grad if need else None for grad, need in zip(grads, needs))


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _pixels(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C), a view


def _is_matmul(weight: Tensor, out_pixels: int, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether a materialised convolution is a product of two matrices per image, which cuBLAS does best."""
    one_tap = tuple(weight.shape[2:]) == (1, 1)
    return out_pixels > MATERIALISE_ABOVE and one_tap and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)


def _image_grad(gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, need_in, stride, padding, dilation):
    """Gradients of x and, if needed, in_attn: the convolution that runs the kernels backwards over gy."""
    B, I = x.shape[:2]
    if B > 0 and _is_matmul(weight, gy.shape[2] * gy.shape[3], stride, padding):
        mixed = mix_kernels_triton(weight, kernel_attn, None, out_attn, tap_attn, x.dtype)
        dx = torch.bmm(_pixels(gy), mixed.reshape(B, -1, I))  # (B, H * W, I), before in_attn
        din_attn = (dx * _pixels(x)).sum(1, dtype=torch.float32) if need_in else None
        if in_attn is not None:
            dx *= in_attn[:, None, :]
        return dx.reshape(B, *x.shape[2:], I).permute(0, 3, 1, 2), din_attn

    dx = torch.empty_like(x)
    din_attn = _convolve(
        gy, weight, kernel_attn, out_attn, tap_attn, in_attn, None, x if need_in else None, dx, stride, padding,
        dilation, backward=True)
    return dx, din_attn


def _convolve(
        src, weight, kernel_attn, c_attn, tap_attn, n_attn, bias, probe, dst, stride, padding, dilation, backward):
    """Fill dst from src, `_conv_kernel` says how; returns its sums with the probe, (B, N)."""
    B, C, H, W = src.shape
    N, oh, ow = dst.shape[1:]
    kh, kw = weight.shape[2:]
    K = kernel_attn.shape[1]
    out_pixels = H * W if backward else oh * ow
    # Going backwards only every stride-th tap reaches a pixel. Pixels of one remainder (phase) share their taps; each
    # phase must have a pixel. A single phase is correct, too, and looks at every tap.
    phased = backward and tuple(dilation) == (1, 1) and oh >= stride[0] and ow >= stride[1]
    phases = stride if phased else (1, 1)
    phase_pixels = triton.cdiv(oh, phases[0]) * triton.cdiv(ow, phases[1])
    tiles = _tiles(src, K)
    if B > 0 and out_pixels > MATERIALISE_ABOVE:
        tile = tiles.materialised
        in_attn, out_attn = (None, c_attn) if backward else (c_attn, None)
        weight = mix_kernels_triton(weight, kernel_attn, in_attn, out_attn, tap_attn, src.dtype)
        K, kernel_attn, c_attn, tap_attn = 0, None, None, None
    else:
        tile = tiles.fused
        if phase_pixels > tile.m:
            tile = tile._replace(samples=tile.samples // 2, m=2 * tile.m)
        tile = tile._replace(samples=min(tile.samples, triton.next_power_of_2(max(B, 1))))
        weight = weight.to(src.dtype)  # every group of images reads all of it
    tiles_m = phases[0] * phases[1] * triton.cdiv(phase_pixels, tile.m)
    programs = triton.cdiv(B, tile.samples) * triton.cdiv(N, tile.n) * tiles_m
    sums = None
    if probe is not None:
        sums = torch.empty(B, tiles_m, N, dtype=torch.float32, device=src.device)
    if programs > 0:
        _conv_kernel[(programs,)](
            src, weight, kernel_attn, c_attn, tap_attn, n_attn, bias, probe, dst, sums,
            B, C, H, W, N, oh, ow, *padding, tiles_m,
            K=K, KH=kh, KW=kw, STRIDE_H=stride[0], STRIDE_W=stride[1], DILATION_H=dilation[0], DILATION_W=dilation[1],
            PHASES_H=phases[0], PHASES_W=phases[1], BACKWARD=backward,
            SAMPLES=tile.samples, BLOCK_N=tile.n, BLOCK_M=tile.m, BLOCK_C=tile.c,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    return None if sums is None else sums.sum(1)


def _weight_grad(gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, stride, padding, dilation):
    """Gradients of weight, kernel_attn, out_attn and tap_attn; of out_attn without the part of the bias."""
    B, I, H, W = x.shape
    O, oh, ow = gy.shape[1:]
    K, (kh, kw) = kernel_attn.shape[1], weight.shape[2:]
    tile = _tiles(x, K).grad
    tiles_i = triton.cdiv(I, tile.i)
    tiles = triton.cdiv(O, tile.o) * tiles_i * kh * kw
    chunk = max(1, triton.cdiv(B, triton.cdiv(PROGRAMS, tiles)))  # images per program
    chunks = triton.cdiv(B, chunk)
    new = dict(dtype=torch.float32, device=x.device)
    dtype = weight.dtype if chunks == 1 else torch.float32
    dweight = torch.empty(chunks, K * O, kh, kw, I, dtype=dtype, device=x.device)
    dkernel_attn = torch.empty(B, tiles, K, **new)
    dout_attn = None if out_attn is None else torch.empty(B, tiles_i * kh * kw, O, **new)
    dtap_attn = None if tap_attn is None else torch.empty(B, tiles // (kh * kw), kh * kw, **new)
    if chunks > 0:
        _weight_grad_kernel[(tiles * chunks,)](
            gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, dweight, dkernel_attn, dout_attn, dtap_attn,
            B, chunk, I, H, W, O, oh, ow, *padding, triton.cdiv(oh * ow, tile.m),
            K=K, KW=kw, TAPS=kh * kw, STRIDE_H=stride[0], STRIDE_W=stride[1],
            DILATION_H=dilation[0], DILATION_W=dilation[1],
            BLOCK_O=tile.o, BLOCK_I=tile.i, BLOCK_M=tile.m,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True)
    dweight = dweight[0] if chunks == 1 else dweight.sum(0).to(weight.dtype)
    return (
        dweight.permute(0, 3, 1, 2),
        dkernel_attn.sum(1),
        None if dout_attn is None else dout_attn.sum(1),
        None if dtap_attn is None else dtap_attn.sum(1),
    )


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision='ieee')


@triton.jit
def _conv_kernel(
        src, weight, kernel_attn, c_attn, tap_attn, n_attn, bias, probe, dst, sums,
        B, C, H, W, N, OH, OW, PAD_H, PAD_W, TILES_M,
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
            accs += (_dot(mixed, tl.trans(image), previous[s]),)

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


@triton.jit
def _weight_grad_kernel(
        gy, x, weight, kernel_attn, in_attn, out_attn, tap_attn, dweight, dkernel_attn, dout_attn, dtap_attn,
        B, CHUNK, I, H, W, O, OH, OW, PAD_H, PAD_W, STEPS,
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
            grad = _dot(tl.trans(g), image, grad)

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
