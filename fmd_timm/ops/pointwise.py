"""1x1 convolutions on CUDA as one product of two matrices per image, which cuBLAS does best.

The kernels are mixed in memory first (`triton_mix.py`), all factors included. For stride 1 and no padding, and for
images whose pixels outnumber what a mixed kernel costs: `cuda.py` says when. Not yet run on a GPU.
"""
import torch
from torch import Tensor

from .triton_mix import mix_kernels


def forward(x, weight, kernel_attn, in_attn, out_attn, tap_attn, mixed_bias) -> Tensor:
    """Arguments and result of `triton_conv.convolve`, for any number of channels."""
    mixed = mix_kernels(weight, kernel_attn, in_attn, out_attn, tap_attn, x.dtype)  # (B, O, 1, 1, I)
    y = torch.bmm(_pixels(x), mixed.flatten(2).mT)  # (B, H * W, O)
    if mixed_bias is not None:
        y += (mixed_bias if out_attn is None else mixed_bias * out_attn)[:, None, :]
    return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def backward(grad_y, x, weight, kernel_attn, in_attn, out_attn, tap_attn) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, kernel_attn, in_attn, out_attn and tap_attn, as `triton_conv.image_gradient` and
    `triton_weight_grad.weight_gradient` return them."""
    mixed = mix_kernels(weight, kernel_attn, None, out_attn, tap_attn, x.dtype)
    grad_x = torch.bmm(_pixels(grad_y), mixed.flatten(2))  # (B, H * W, I), before in_attn
    grad_in_attn = None
    if in_attn is not None:
        grad_in_attn = (grad_x * _pixels(x)).sum(1, dtype=torch.float32)
        grad_x *= in_attn[:, None, :]

    # Of each image's mixed kernel: B kernels, but small beside the images and only for a moment.
    G = torch.bmm(_pixels(grad_y).mT, _pixels(x)).float()  # (B, O, I)
    if in_attn is not None:
        G *= in_attn[:, None, :]
    out_factor = G.new_ones(len(G), 1) if out_attn is None else out_attn
    tap_factor = G.new_ones(len(G), 1) if tap_attn is None else tap_attn  # a single tap
    products = torch.einsum('boi,koi->bko', G, weight.float().reshape(kernel_attn.shape[1], *G.shape[1:]))
    mixed_products = torch.einsum('bk,bko->bo', kernel_attn, products)
    G *= (out_factor * tap_factor)[:, :, None]
    return (
        grad_x.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2),
        (kernel_attn.T @ G.flatten(1)).reshape(weight.shape),
        (products * (out_factor * tap_factor)[:, None]).sum(2),
        grad_in_attn,
        None if out_attn is None else mixed_products * tap_factor,
        None if tap_attn is None else (mixed_products * out_factor).sum(1, keepdim=True),
    )


def _pixels(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H * W, C), a view
