"""Dynamic convolution as one convolution per image, each with its own mixed kernel; 1x1 kernels as a batch of products.

Where images are large beside the kernels, a convolution of one image is as fast as its share of a batch, and all of the
attention goes into the small kernel: images and results are not read once more for the gates. Kernels are mixed for a
few images at a time, so that they stay in the cache.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_bytes
from .case import Attention, Case, Gradients, is_channels_last, memory_format
from .layout import gated, kernel_attn_of, kernel_rows


def supports(case: Case) -> bool:
    return True


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W'), as in `reference.forward`."""
    kernel_attn, bank = kernel_attn_of(attention, weight, case), kernel_rows(weight, case.num_kernels)  # (K, O, R)
    in_gate, out_gate, tap_gate = _gates(attention, case)
    # The channels' gates go where there are fewer numbers to multiply: into the kernels, or into the images.
    gates_kernels = case.kernel_numel <= 2 * case.image_numel
    gates = (in_gate, out_gate, tap_gate) if gates_kernels else (tap_gate,)
    y = _empty(x, case.batch, case.out_channels, case.output_size)
    parts, memory = _parts(bank, case, 10 * cache_bytes(2))
    for part in parts:
        kernels = _gate_(_mix(kernel_attn[part], bank, weight, memory), part, *gates).to(x.dtype)
        images = x[part] if gates_kernels or in_gate is None else gated(x[part], attention.in_attn[part])
        if case.is_pointwise:
            _multiply(kernels.flatten(2), _pixels(images), out=_pixels(y[part]))
        elif case.batch == 1:
            y = F.conv2d(images, kernels[0], None, case.stride, case.padding, case.dilation, case.groups)
        else:
            for i, b in enumerate(range(part.start, part.stop)):
                # copied at once, so that the next result takes the same memory
                y[b:b + 1] = F.conv2d(
                    images[i:i + 1], kernels[i], None, case.stride, case.padding, case.dilation, case.groups)
        if out_gate is not None and not gates_kernels:
            y[part] *= attention.out_attn[part].to(x.dtype)[:, :, None, None]
    return y


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None."""
    kernel_attn, bank = kernel_attn_of(attention, weight, case), kernel_rows(weight, case.num_kernels)  # (K, O, R)
    in_gate, out_gate, tap_gate = _gates(attention, case)
    grad_x, grad_weight = _empty(x, *x.shape[:2], x.shape[2:]), torch.zeros_like(weight)
    grad_bank = kernel_rows(grad_weight, case.num_kernels).flatten(1)
    grad_kernel_attn, grad_in, grad_out, grad_taps = [], [], [], []
    parts, memory = _parts(bank, case, 2 * cache_bytes(2))  # each kernel has a gradient and products with it
    for part in parts:
        mixed = _mix(kernel_attn[part], bank, weight, memory)  # (b, O, i, kh, kw)
        kernels = _times(mixed, part, in_gate, out_gate, tap_gate).to(x.dtype)
        G = torch.empty_like(mixed)  # the gradient of each image's kernel, gates included
        if case.is_pointwise:
            pixels_y, pixels_x = _pixels(grad_y[part], memory_format(x)), _pixels(x[part])
            _multiply(kernels.flatten(2).mT, pixels_y, out=_pixels(grad_x[part]))
            G.copy_(torch.bmm(pixels_y, pixels_x.mT)[..., None, None])
        else:
            for i, b in enumerate(range(part.start, part.stop)):
                grad_x[b:b + 1], G[i], _ = torch.ops.aten.convolution_backward(
                    grad_y[b:b + 1], x[b:b + 1], kernels[i], None, case.stride, case.padding, case.dilation, False,
                    [0, 0], case.groups, [True, True, False],
                )
        if in_gate is not None or out_gate is not None:
            by_channel = _times(G * mixed, part, tap_gate).sum((3, 4), keepdim=True)
        if in_gate is not None:
            by_group = _times(by_channel, part, out_gate).flatten(2).unflatten(1, (case.groups, -1))
            grad_in.append(by_group.sum(2).flatten(1))  # (b, g, O / g, i) -> (b, I)
        if out_gate is not None:
            grad_out.append(_times(by_channel, part, in_gate).flatten(2).sum(2))
        if tap_gate is not None:
            by_tap = _times(G * mixed, part, in_gate).sum(2, keepdim=True)  # (b, O, 1, kh, kw)
            grad_taps.append(_times(by_tap, part, out_gate).sum((1, 2)).flatten(1))
        G = _gate_(G, part, in_gate, out_gate, tap_gate)
        rows = (G.permute(0, 1, 3, 4, 2) if is_channels_last(weight) else G).flatten(1)  # (b, N)
        grad_kernel_attn.append(rows @ bank.flatten(1).T)
        grad_bank.addmm_(kernel_attn[part].T, rows)
    if attention.kernel_attn is None:
        grad_kernel_attn = []
    return grad_x, grad_weight, Attention(
        *(torch.cat(parts) if parts else None for parts in (grad_kernel_attn, grad_in, grad_out, grad_taps)))


def _parts(bank: Tensor, case: Case, size: int) -> tuple[list[slice], Tensor]:
    """Ranges of the images, and memory for the mixed kernels of one: fresh memory costs more than the mixing."""
    step = min(max(size // (case.kernel_numel * bank.element_size()), 1), case.batch)
    parts = [slice(start, min(start + step, case.batch)) for start in range(0, case.batch, step)]
    return parts, bank.new_empty(step, case.kernel_numel)


def _mix(kernel_attn: Tensor, bank: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """kernel_attn (b, K), bank (K, O, R) -> mixed kernels (b, O, i, kh, kw), with the strides of `weight`"""
    O, (_, i, kh, kw) = bank.shape[1], weight.shape
    rows = torch.mm(kernel_attn, bank.flatten(1), out=memory[:len(kernel_attn)])
    if is_channels_last(weight):
        return rows.view(-1, O, kh, kw, i).permute(0, 1, 4, 2, 3)
    return rows.view(-1, O, i, kh, kw)


def _gates(attention: Attention, case: Case) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The factors of each image's kernel (B, O, i, kh, kw), 1 wide where they are the same."""
    _, in_attn, out_attn, tap_attn = attention
    in_gate = out_gate = tap_gate = None
    if in_attn is not None:
        in_gate = in_attn.unflatten(1, (case.groups, -1))  # (B, g, i)
        if case.groups > 1:
            in_gate = in_gate.repeat_interleave(case.out_channels // case.groups, 1)
        in_gate = in_gate[..., None, None]
    if out_attn is not None:
        out_gate = out_attn[..., None, None, None]
    if tap_attn is not None:
        tap_gate = tap_attn.unflatten(1, case.kernel_size)[:, None, None]
    return in_gate, out_gate, tap_gate


def _times(kernels: Tensor, part: slice, *gates: Tensor | None) -> Tensor:
    for gate in gates:
        if gate is not None:
            kernels = kernels * gate[part]
    return kernels


def _gate_(kernels: Tensor, part: slice, *gates: Tensor | None) -> Tensor:
    for gate in gates:
        if gate is not None:
            kernels *= gate[part]
    return kernels


def _pixels(x: Tensor, format: torch.memory_format | None = None) -> Tensor:
    """A view (b, C, P) of images (b, C, H, W) that are laid out in their format."""
    x = x.contiguous(memory_format=format or memory_format(x))
    return x.permute(0, 2, 3, 1).flatten(1, 2).mT if is_channels_last(x) else x.flatten(2)


def _multiply(kernels: Tensor, pixels: Tensor, out: Tensor) -> None:
    """out (b, O, P) = kernels (b, O, I) @ pixels (b, I, P), transposed where the pixels are rows in memory"""
    if out.is_contiguous():
        torch.bmm(kernels, pixels, out=out)
    else:
        torch.bmm(pixels.mT, kernels.mT, out=out.mT)


def _empty(x: Tensor, batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(
        batch, channels, *size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
