"""The operator in plain ATen operations, for what has no operator of ours: ONNX, OpenVINO, ExecuTorch.

It stands in PyTorch's table of decompositions, in which `torch.onnx.export(..., dynamo=True)` finds it. `torch.export`
keeps the operator, which other runtimes need to have taken out: `program.run_decompositions(decompositions())`.
"""
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import memory_format
from .layout import gated
from .operator import fake

__all__ = ['decompose', 'decompositions']


def decompose(
        x: Tensor, weight: Tensor, kernel_attn: Tensor | None, in_attn: Tensor | None, out_attn: Tensor | None,
        tap_attn: Tensor | None, stride, padding, dilation, groups: int, for_onnxruntime: bool = False,
        computed_kernels: bool = True,
) -> Tensor:
    """What the operator computes, for any batch and image size. The arguments are the operator's, and two more.

    Where the batch is known to be 1, one kernel is mixed, and one convolution takes it. For any other batch, the kernel
    of each image is multiplied by what its taps see. A convolution can't do that: it has one kernel for all images, and
    a graph can't have as many groups as there will be images. A kernel of one tap is multiplied too: it sees the image
    as it is.

    Where each channel sees one channel alone (depthwise), a batch is convolved by each of the K kernels, and the
    results are mixed: K small convolutions whose kernels are constants, for which runtimes have a fast way. A single
    image goes the same way in onnxruntime, which is slow where a depthwise kernel is computed. OpenVINO is faster with
    the mixed kernel.

    Args:
        for_onnxruntime: Whether the kernel of a single image is mixed by output channels, with which onnxruntime needs
            0.9 of the time for a ResNet-18 and OpenVINO up to 1.7 of it for a layer, and what the taps see in a batch
            is taken out by a convolution, with which onnxruntime needs 0.80 to 0.86 of the time for 8 images.
        computed_kernels: Whether the runtime takes convolutions whose kernel is computed. Without it a single image is
            computed as any other batch.
    """
    images, taps = gated(x, in_attn), weight.shape[2] * weight.shape[3]
    is_single = computed_kernels and isinstance(x.shape[0], int) and x.shape[0] == 1 and taps > 1
    if kernel_attn is None and tap_attn is None:
        y = F.conv2d(images, weight.to(x.dtype), None, stride, padding, dilation, groups)
    elif weight.shape[1] == 1 < groups and tap_attn is None and (for_onnxruntime or not is_single):
        bank = weight.reshape(kernel_attn.shape[1], -1, *weight.shape[1:]).to(x.dtype)
        convolved = [  # by each kernel: exporters compute a slice of constants, and not what splits them
            F.conv2d(images, bank[k], None, stride, padding, dilation, groups) for k in range(len(bank))]
        y = sum(map(gated, convolved, kernel_attn.to(x.dtype).split(1, 1)))
    else:
        kernels = _mixed(weight, kernel_attn, tap_attn, by_channel=for_onnxruntime).to(x.dtype)  # (B, O, i, taps)
        if is_single:
            kernel = kernels.reshape(-1, *weight.shape[1:])
            y = F.conv2d(images, kernel, None, stride, padding, dilation, groups)
        else:
            windows_of = _windows_by_convolution if for_onnxruntime and taps > 1 else _windows
            y = _multiplied(kernels, windows_of(images, weight.shape[2:], stride, padding, dilation), groups)
    return gated(y, out_attn).contiguous(memory_format=memory_format(x))


def _decompose_for_onnx(*arguments) -> Tensor:
    return decompose(*arguments, for_onnxruntime=True)


def _mixed(weight: Tensor, kernel_attn: Tensor | None, tap_attn: Tensor | None, by_channel: bool) -> Tensor:
    """The kernels of the images (B, O, i, taps), in the dtype of `weight`."""
    rows, channels, kh, kw = weight.shape
    if kernel_attn is None:
        kernels = weight
    else:
        B, K = kernel_attn.shape
        rows, shares = rows // K, kernel_attn.to(weight.dtype)
        if by_channel and isinstance(B, int) and B == 1:
            kernels = torch.matmul(shares[None], weight.reshape(K, rows, -1).transpose(0, 1))  # (1, 1, K) (O, K, R)
        else:
            kernels = torch.mm(shares, weight.reshape(K, -1))
    kernels = kernels.reshape(-1, rows, channels, kh * kw)
    return kernels if tap_attn is None else kernels * tap_attn.to(weight.dtype)[:, None, None]


def _multiplied(kernels: Tensor, windows: Tensor, groups: int) -> Tensor:
    """The kernels (B, O, i, taps) times what they see (B, I * taps, H', W'), as products of matrices."""
    _, O, channels, taps = kernels.shape
    height, width = windows.shape[2:]
    patches = windows.reshape(-1, channels * taps, height * width)
    y = torch.bmm(kernels.reshape(-1, O // groups, channels * taps), patches)
    return y.reshape(-1, O, height, width)


def _windows(images: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    """What each tap of each channel sees (B, I * taps, H', W') of the images (B, I, H, W)."""
    images = F.pad(images, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else images
    # In two steps: exporters take as long for a slice as for a convolution, and kh * kw of them would be many.
    seen_rows, seen_columns = map(_seen, kernel_size, stride, dilation)
    images = images[:, :, None]
    images = torch.cat([images[..., seen, :] for seen in seen_rows], 2)[:, :, :, None]  # (B, I, kh, 1, H', W)
    return torch.cat([images[..., seen] for seen in seen_columns], 3).flatten(1, 3)  # of (B, I, kh, kw, H', W')


def _windows_by_convolution(images: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    """As `_windows`, by kernels that are 1 in one tap: a single operation, to which slices are many."""
    channels, taps = images.shape[1], kernel_size[0] * kernel_size[1]
    taken = torch.eye(taps, dtype=images.dtype, device=images.device).reshape(taps, 1, *kernel_size)
    return F.conv2d(images, taken.repeat(channels, 1, 1, 1), None, stride, padding, dilation, channels)


def _seen(taps: int, stride: int, dilation: int) -> list[slice]:
    """The pixels that each tap sees, in one dimension of padded images of any size."""
    last = dilation * (taps - 1)
    return [slice(start, start - last or None, stride) for start in range(0, last + 1, dilation)]


def decompositions(computed_kernels: bool = True) -> dict[torch._ops.OperatorBase, Callable]:
    """PyTorch's default decompositions and that of our operator, for `torch.export.ExportedProgram.run_decompositions`.

    The program then holds no operator of ours: runtimes other than PyTorch take it, and a process that loads it does
    not need this package.

    Args:
        computed_kernels: False for runtimes that take no convolution whose kernel is computed, as ExecuTorch's XNNPACK
            does: a single image, too, is then a product of matrices.
    """
    table = torch.export.default_decompositions()
    table[torch.ops.fmd_timm.dynamic_conv2d.default] = partial(decompose, computed_kernels=computed_kernels)
    return table


def register() -> None:
    """Let the ONNX exporter find the decomposition.

    The table is private to PyTorch: a version that has moved it is named in a warning, and all else works on.
    """
    operator = torch.ops.fmd_timm.dynamic_conv2d.default
    try:
        from torch._decomp import register_decomposition
        register_decomposition(operator)(_decompose_for_onnx)
        # Tensors without memory would go through the decomposition too, for images of any size: slower, and compiled
        # networks would be tied to what it asks of the sizes. They prefer what is registered as meta.
        register_decomposition(operator, type='meta')(fake)
    except (ImportError, TypeError) as error:
        warnings.warn(
            f'torch.onnx.export will not know dynamic_conv2d: torch {torch.__version__} has another table of '
            f'decompositions ({error}). Give it '
            'torch.export.export(model, ...).run_decompositions(fmd_timm.decompositions()) instead of the model',
            stacklevel=2)


register()
