"""What tests of several files compute with: inputs of the operator and its reference, and runs of the recipes."""

import torch
import torch.nn.functional as F

# The operator

SHAPES = {  # B, K, C_in, C_out, kernel, stride, padding, dilation, groups, (H, W)
    '1x1': (3, 4, 5, 7, 1, 1, 0, 1, 1, (4, 6)),
    '3x3': (2, 4, 4, 6, 3, 1, 1, 1, 1, (7, 5)),
    'stride': (2, 2, 4, 6, 3, 2, 1, 1, 1, (8, 5)),
    'one_kernel': (2, 1, 4, 6, 3, 1, 1, 1, 1, (5, 5)),
    'dilated_groups': (2, 3, 4, 6, 3, 1, 2, 2, 2, (7, 6)),
    'depthwise': (3, 4, 6, 6, 5, 1, 2, 1, 6, (6, 6)),
    'uneven': (2, 2, 3, 4, (1, 3), (2, 1), (0, 1), 1, 1, (5, 6)),
}


def make_inputs(B, K, I, O, kernel, stride, padding, dilation, groups, size, dtype=torch.float64, tap_attn=False):
    h, w = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    torch.manual_seed(0)
    tensors = dict(
        x=torch.randn(B, I, *size), weight=torch.randn(K * O, I // groups, h, w), kernel_attn=torch.rand(B, K),
        in_attn=torch.rand(B, I), out_attn=torch.rand(B, O), bias=torch.randn(K * O),
    )
    if tap_attn:
        tensors['tap_attn'] = torch.rand(B, h * w)
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return tensors, dict(stride=stride, padding=padding, dilation=dilation, groups=groups)


def one_by_one(x, weight, kernel_attn, in_attn, out_attn, bias, tap_attn=None, **conv_args):
    images = []
    for b in range(x.shape[0]):
        mixed = sum(share * kernel for share, kernel in zip(kernel_attn[b], weight.chunk(kernel_attn.shape[1])))
        mixed_bias = sum(share * part for share, part in zip(kernel_attn[b], bias.chunk(kernel_attn.shape[1])))
        if tap_attn is not None:
            mixed = tap_attn[b].reshape(weight.shape[2:]) * mixed
        y = F.conv2d(in_attn[b, :, None, None] * x[b], mixed, mixed_bias, **conv_args)
        images.append(out_attn[b, :, None, None] * y)
    return torch.stack(images)
