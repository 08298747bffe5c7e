"""The mixed kernel of every image, in Triton.

A mixed kernel costs K multiplications and one store for each weight, which the convolution earns back where it has many
output pixels. The factors of channels and taps are folded in on the way, so no pass over the images applies them.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from .case import Attention, Case

BLOCK = 1024  # weights per program; this and SAMPLES are estimates, not yet measured on a GPU
SAMPLES = 8  # images that share one load of the K kernels


def mix_kernels(weight: Tensor, attention: Attention, case: Case) -> Tensor:
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
