"""Dynamic convolution with a mixed kernel for every image, into which all of its attention goes.

Where images are large beside the kernels, a convolution of one image is as fast as its share of a batch, and images and
results are not read once more for the gates. 1x1 kernels are a batch of matrix products. Elsewhere than on the CPU, and
where they are depthwise and not in channels_last, images are groups of one convolution. On the CPU, kernels are mixed
for a few images at a time, so that they stay in the cache.
"""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import cache_bytes
from .case import Attention, Case, Gradients, empty_as, is_channels_last, memory_format
from .layout import bank_of, gated, kernel_rows, mix, slices

Gates = dict[str, Tensor]  # factors of each image's kernel (B, g, O / g, i, kh, kw), 1 wide where they are the same


def supports(case: Case) -> bool:
    return True


def forward(x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Tensor:
    """The result (B, O, H', W'), as in `reference.forward`."""
    in_attn = out_attn = None
    # The channels' gates go where there are fewer numbers to multiply: into the kernels, or into the images.
    if case.kernel_numel > 2 * case.image_numel:
        in_attn, out_attn = attention.in_attn, attention.out_attn
        attention = attention._replace(in_attn=None, out_attn=None)
    kernel_attn, bank = bank_of(weight, attention, case)
    gates = _gates(attention, case)
    is_whole = _is_grouped(case) and not case.is_pointwise  # one convolution makes the result
    y = None if is_whole else empty_as(x, case.batch, case.out_channels, *case.output_size)
    parts, memory = _parts(kernel_attn, case, 10 * cache_bytes())
    for part in parts:
        kernels = _mix(kernel_attn[part], bank, memory, weight, case)
        for gate in gates.values():
            kernels *= gate[part]
        kernels = kernels.to(x.dtype)
        images = x[part] if in_attn is None else gated(x[part], in_attn[part])
        if case.is_pointwise:
            kernels = kernels.reshape(len(kernels), case.out_channels, -1)
            _multiply(kernels, _pixels(images), out=_pixels(y[part]))
        elif is_whole:
            y = _convolve(images, kernels, case)
        else:
            for i, b in enumerate(range(part.start, part.stop)):
                y[b:b + 1] = _convolve(images[i:i + 1], kernels[i:i + 1], case)  # the next takes the same memory
        if out_attn is not None:
            y[part] *= out_attn[part].to(x.dtype)[:, :, None, None]
    return y


def backward(
        grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case) -> Gradients:
    """Gradients of x, weight and attention; None for what is None."""
    kernel_attn, bank = bank_of(weight, attention, case)
    gates = _gates(attention, case)
    is_whole = _is_grouped(case) and not case.is_pointwise
    grad_x, grad_weight = None if is_whole else empty_as(x, *x.shape), torch.zeros_like(weight)
    grad_bank = kernel_rows(grad_weight, case.num_kernels).flatten(1)
    gradients = {name: [] for name, attn in attention._asdict().items() if attn is not None}
    parts, memory = _parts(kernel_attn, case, 2 * cache_bytes())  # each kernel has a gradient and products with it
    for part in parts:
        factors = {name: gate[part] for name, gate in gates.items()}
        mixed = _mix(kernel_attn[part], bank, memory, weight, case)
        kernels = _product(mixed, factors).to(x.dtype)
        G = torch.empty_like(mixed)  # the gradient of each image's kernel, gates included
        if case.is_pointwise:
            pixels_y, pixels_x = _pixels(grad_y[part], memory_format(x)), _pixels(x[part])
            kernels = kernels.reshape(len(kernels), case.out_channels, -1)
            _multiply(kernels.mT, pixels_y, out=_pixels(grad_x[part]))
            G.copy_(torch.bmm(pixels_y, pixels_x.mT).view(G.shape))
        elif is_whole:
            grad_x, grad_kernels = _differentiate(grad_y, x, kernels, case)
            G.copy_(grad_kernels)
        else:
            for i, b in enumerate(range(part.start, part.stop)):
                grad_x[b:b + 1], G[i:i + 1] = _differentiate(grad_y[b:b + 1], x[b:b + 1], kernels[i:i + 1], case)
        if gates:
            products = G * mixed
            if 'tap_attn' not in gates:
                products = products.sum((4, 5), keepdim=True)
            for name in gates:
                others = {other: factor for other, factor in factors.items() if other != name}
                gradients[name].append(_product(products, others).sum_to_size(factors[name].shape).flatten(1))
        for gate in factors.values():
            G *= gate
        rows = (G.permute(0, 1, 2, 4, 5, 3) if is_channels_last(weight) else G).flatten(1)  # (b, N)
        if attention.kernel_attn is not None:
            gradients['kernel_attn'].append(rows @ bank.flatten(1).T)
        grad_bank.addmm_(kernel_attn[part].T, rows)
    return grad_x, grad_weight, Attention(
        *(torch.cat(gradients[name]) if name in gradients else None for name in Attention._fields))


def _product(kernels: Tensor, factors: Gates) -> Tensor:
    return functools.reduce(torch.mul, factors.values(), kernels)


def _is_grouped(case: Case) -> bool:
    """Whether all images are convolved at once: on a CPU, many groups of many channels are slow.

    Depthwise ones are not, but a batch in channels_last would be laid out anew for it, and its result once more.
    """
    return case.batch == 1 or case.is_depthwise and not case.channels_last or case.device.type != 'cpu'


def _convolve(x: Tensor, kernels: Tensor, case: Case) -> Tensor:
    """Images (b, I, H, W), each by its kernel (b, g, O / g, i, kh, kw) -> (b, O, H', W')"""
    y = F.conv2d(
        _as_groups(x), kernels.flatten(0, 2), None, case.stride, case.padding, case.dilation, len(x) * case.groups)
    return y.view(len(x), -1, *y.shape[2:])


def _differentiate(grad_y: Tensor, x: Tensor, kernels: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """Gradients of images and kernels of `_convolve`."""
    grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
        _as_groups(grad_y), _as_groups(x), kernels.flatten(0, 2), None, case.stride, case.padding, case.dilation, False,
        [0, 0], len(x) * case.groups, [True, True, False])
    return grad_x.view(x.shape), grad_kernels.view(kernels.shape)


def _as_groups(images: Tensor) -> Tensor:
    """(b, C, H, W) -> (1, b * C, H, W), a single one untouched: reshape may give it strides that PyTorch misreads."""
    return images if len(images) == 1 else images.reshape(1, -1, *images.shape[2:])


def _parts(kernel_attn: Tensor, case: Case, size: int) -> tuple[list[slice], Tensor]:
    """Ranges of the images, and memory for the mixed kernels of one: fresh memory costs more than the mixing."""
    step = case.batch if _is_grouped(case) else max(size // (case.kernel_numel * kernel_attn.element_size()), 1)
    return slices(case.batch, step), kernel_attn.new_empty(min(step, case.batch) * case.kernel_numel)


def _mix(kernel_attn: Tensor, bank: Tensor, memory: Tensor, weight: Tensor, case: Case) -> Tensor:
    """kernel_attn (b, K), bank (K, O, R) -> mixed kernels (b, g, O / g, i, kh, kw), with the strides of `weight`"""
    rows = mix(kernel_attn, bank, memory)
    sizes = len(rows), case.groups, case.out_channels // case.groups
    if is_channels_last(weight):
        return rows.view(*sizes, *case.kernel_size, -1).permute(0, 1, 2, 5, 3, 4)
    return rows.view(*sizes, -1, *case.kernel_size)


def _gates(attention: Attention, case: Case) -> Gates:
    B, g = case.batch, case.groups
    sizes = dict(in_attn=(B, g, 1, -1, 1, 1), out_attn=(B, g, -1, 1, 1, 1), tap_attn=(B, 1, 1, 1, *case.kernel_size))
    return {
        name: getattr(attention, name).reshape(size) for name, size in sizes.items()
        if getattr(attention, name) is not None}


def _pixels(x: Tensor, format: torch.memory_format | None = None) -> Tensor:
    """A view (b, C, P) of images (b, C, H, W) that are laid out in their format."""
    x = x.contiguous(memory_format=format or memory_format(x))
    return x.permute(0, 2, 3, 1).flatten(1, 2).mT if is_channels_last(x) else x.flatten(2)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Matrix products into `out`, transposed where it is: PyTorch is slow at a transposed `out`."""
    if out.is_contiguous():
        torch.bmm(a, b, out=out)
    else:
        torch.bmm(b.mT, a.mT, out=out.mT)
