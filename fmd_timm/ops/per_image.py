"""Dynamic convolution on the CPU as one convolution per image, each with its own mixed kernel.

Where images are large beside the kernels, a convolution of one image is as fast as its share of a batch, and all of the
attention goes into the small kernel: images and results are not read once more for the gates. Kernels are mixed for a
few images at a time, so that they stay in the cache. 1x1 kernels are a batch of matrix products.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import is_channels_last, kernel_rows, memory_format

MIXED_BYTES = 10 * 2**20  # of the kernels mixed at once
GRADIENT_BYTES = 2 * 2**20  # the same where each has a gradient and products with it


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups) -> Tensor:
    """Arguments, shapes and result of `fmd_timm.ops.dynamic_conv2d`; B > 0."""
    share, bank = _share_and_bank(weight, kernel_attn, len(x))
    in_gate, out_gate, tap_gate = _gates(weight, in_attn, out_attn, tap_attn, bank.shape[1], groups)
    # The channels' gates go where there are fewer numbers to multiply: into the kernels, or into the images.
    gates_kernels = bank[0].numel() <= 2 * x[0].numel()
    gates = (in_gate, out_gate, tap_gate) if gates_kernels else (tap_gate,)
    y = None
    parts, memory = _parts(len(x), bank, MIXED_BYTES)
    for part in parts:
        kernels = _gate_(_mix(share[part], bank, weight, memory), part, *gates).to(x.dtype)
        images = x[part]
        if in_attn is not None and not gates_kernels:
            images = images * in_attn[part].to(x.dtype)[:, :, None, None]
        if _is_matmul(weight, stride, padding, groups):
            if y is None:
                y = _empty(x, len(x), bank.shape[1])
            _multiply(kernels.flatten(2), _pixels(images), out=_pixels(y[part]))
        else:
            for i, b in enumerate(range(part.start, part.stop)):
                y_b = F.conv2d(images[i:i + 1], kernels[i], None, stride, padding, dilation, groups)
                if y is None:
                    y = y_b if len(x) == 1 else _empty(y_b, len(x), y_b.shape[1])
                if len(x) > 1:
                    y[b:b + 1] = y_b  # at once, so that the next result takes the same memory
        if out_attn is not None and not gates_kernels:
            y[part] *= out_attn[part].to(x.dtype)[:, :, None, None]
    if bias is not None:
        biases = share @ bias.reshape(bank.shape[0], -1)  # (B, O)
        y += (biases if out_attn is None else biases * out_attn.to(biases.dtype)).to(x.dtype)[:, :, None, None]
    return y


def backward(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, bias, stride, padding, dilation, groups,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn, tap_attn and bias; None for what is None."""
    share, bank = _share_and_bank(weight, kernel_attn, len(x))
    K, O, _ = bank.shape
    in_gate, out_gate, tap_gate = _gates(weight, in_attn, out_attn, tap_attn, O, groups)
    grad_x, grad_weight = _empty(x, *x.shape[:2]), torch.zeros_like(weight)
    grad_bank = kernel_rows(grad_weight, kernel_attn).flatten(1)
    grad_share, grad_in, grad_out, grad_taps = [], [], [], []
    parts, memory = _parts(len(x), bank, GRADIENT_BYTES)
    for part in parts:
        mixed = _mix(share[part], bank, weight, memory)  # (b, O, i, kh, kw)
        kernels = _times(mixed, part, in_gate, out_gate, tap_gate).to(x.dtype)
        G = torch.empty_like(mixed)  # the gradient of each image's kernel, gates included
        if _is_matmul(weight, stride, padding, groups):
            pixels_y, pixels_x = _pixels(grad_y[part], memory_format(x)), _pixels(x[part])
            _multiply(kernels.flatten(2).mT, pixels_y, out=_pixels(grad_x[part]))
            G.copy_(torch.bmm(pixels_y, pixels_x.mT)[..., None, None])
        else:
            for i, b in enumerate(range(part.start, part.stop)):
                grad_x[b:b + 1], G[i], _ = torch.ops.aten.convolution_backward(
                    grad_y[b:b + 1], x[b:b + 1], kernels[i], None, stride, padding, dilation, False, [0, 0], groups,
                    [True, True, False],
                )
        if in_attn is not None or out_attn is not None:
            by_channel = _times(G * mixed, part, tap_gate).sum((3, 4), keepdim=True)
        if in_attn is not None:
            by_group = _times(by_channel, part, out_gate).flatten(2).unflatten(1, (groups, -1))  # (b, g, O / g, i)
            grad_in.append(by_group.sum(2).flatten(1))
        if out_attn is not None:
            grad_out.append(_times(by_channel, part, in_gate).flatten(2).sum(2))
        if tap_attn is not None:
            by_tap = _times(G * mixed, part, in_gate).sum(2, keepdim=True)  # (b, O, 1, kh, kw)
            grad_taps.append(_times(by_tap, part, out_gate).sum((1, 2)).flatten(1))
        G = _gate_(G, part, in_gate, out_gate, tap_gate)
        rows = (G.permute(0, 1, 3, 4, 2) if is_channels_last(weight) else G).flatten(1)  # (b, N)
        grad_share.append(rows @ bank.flatten(1).T)
        grad_bank.addmm_(share[part].T, rows)

    grad_kernel_attn, grad_out_attn, grad_bias = torch.cat(grad_share), None, None
    if out_attn is not None:
        grad_out_attn = torch.cat(grad_out)
    if bias is not None:
        biases, of_bias = bias.reshape(K, O), grad_y.sum((2, 3), dtype=weight.dtype)  # (B, O)
        if out_attn is not None:
            grad_out_attn = grad_out_attn + of_bias * (share @ biases)
            of_bias = of_bias * out_attn.to(weight.dtype)
        grad_kernel_attn = grad_kernel_attn + of_bias @ biases.T
        grad_bias = (share.T @ of_bias).reshape(-1)
    return (
        grad_x, grad_weight, None if kernel_attn is None else grad_kernel_attn,
        None if in_attn is None else torch.cat(grad_in), grad_out_attn,
        None if tap_attn is None else torch.cat(grad_taps), grad_bias,
    )


def image_gradient(
        grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn, stride, padding, dilation, groups,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and in_attn alone, for images that are small beside the kernels: those take the gates."""
    share, bank = _share_and_bank(weight, kernel_attn, len(x))
    tap_gate = _gates(weight, None, None, tap_attn, bank.shape[1], groups)[2]
    gated_y = grad_y if out_attn is None else grad_y * out_attn.to(grad_y.dtype)[:, :, None, None]
    grad_x = _empty(x, *x.shape[:2])
    grad_in_attn = None if in_attn is None else torch.empty_like(in_attn)
    parts, memory = _parts(len(x), bank, MIXED_BYTES)
    for part in parts:
        kernels = _gate_(_mix(share[part], bank, weight, memory), part, tap_gate).to(x.dtype)
        if _is_matmul(weight, stride, padding, groups):
            _multiply(kernels.flatten(2).mT, _pixels(gated_y[part], memory_format(x)), out=_pixels(grad_x[part]))
        for i, b in enumerate(range(part.start, part.stop)):
            if not _is_matmul(weight, stride, padding, groups):
                grad_x[b:b + 1], _, _ = torch.ops.aten.convolution_backward(
                    gated_y[b:b + 1], x[b:b + 1], kernels[i], None, stride, padding, dilation, False, [0, 0], groups,
                    [True, False, False],
                )
            if in_attn is not None:
                grad_in_attn[b] = (grad_x[b] * x[b]).sum((1, 2))
                grad_x[b] *= in_attn[b, :, None, None].to(x.dtype)
    return grad_x, grad_in_attn


def _share_and_bank(weight: Tensor, kernel_attn: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    share = weight.new_ones(batch, 1) if kernel_attn is None else kernel_attn.to(weight.dtype)
    return share, kernel_rows(weight, kernel_attn)


def _parts(batch: int, bank: Tensor, size: int) -> tuple[list[slice], Tensor]:
    """Ranges of the images, and memory for the mixed kernels of one: fresh memory costs more than the mixing."""
    kernel = bank[0].numel()
    step = min(max(size // (kernel * bank.element_size()), 1), batch)
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)], bank.new_empty(step, kernel)


def _mix(share: Tensor, bank: Tensor, weight: Tensor, memory: Tensor) -> Tensor:
    """share (b, K), bank (K, O, R) -> mixed kernels (b, O, i, kh, kw) with the strides of `weight`, in `memory`"""
    O, (_, i, kh, kw) = bank.shape[1], weight.shape
    rows = torch.mm(share, bank.flatten(1), out=memory[:len(share)])
    if is_channels_last(weight):
        return rows.view(-1, O, kh, kw, i).permute(0, 1, 4, 2, 3)
    return rows.view(-1, O, i, kh, kw)


def _gates(weight, in_attn, out_attn, tap_attn, O, groups) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The factors of each image's kernel (B, O, i, kh, kw), 1 wide where they are the same."""
    in_gate = out_gate = tap_gate = None
    if in_attn is not None:
        in_gate = in_attn.to(weight.dtype).unflatten(1, (groups, -1))  # (B, g, i)
        if groups > 1:
            in_gate = in_gate.repeat_interleave(O // groups, 1)
        in_gate = in_gate[..., None, None]
    if out_attn is not None:
        out_gate = out_attn.to(weight.dtype)[..., None, None, None]
    if tap_attn is not None:
        tap_gate = tap_attn.to(weight.dtype).unflatten(1, weight.shape[2:])[:, None, None]
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


def _is_matmul(weight: Tensor, stride, padding, groups: int) -> bool:
    return weight.shape[2:] == (1, 1) and list(stride) == [1, 1] and list(padding) == [0, 0] and groups == 1


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


def _empty(x: Tensor, batch: int, channels: int) -> Tensor:
    size = batch, channels, *x.shape[2:]
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
