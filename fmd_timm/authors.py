"""Checkpoints of the authors' code of FMDConv (github.com/tianyu00824/FMDConv) and of ODConv (github.com/OSVAI/ODConv),
turned into ours."""

import torch
import torch.nn as nn
from torch import Tensor

from .layers import DynamicConv2d, FMDAttention, FMDConv2d, ODConv2d, ODConvAttention
from .models import DynamicMobileNetV2

__all__ = ['load_authors_state_dict']

Parts = list[tuple[str, tuple[int, ...]]]  # the authors' key and shape of each part


def load_authors_state_dict(module_or_model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load a state_dict with the authors' names and shapes into an `FMDConv2d`, an `ODConv2d` or a whole network.

    Outside the dynamic convolutions their ResNets have the names of ours, and their MobileNetV2 those of torchvision.
    Their checkpoints hold no temperatures, and those of `module_or_model` are kept: set them with `set_temperature`
    (FMDConv's kernel temperature is always 34, that of its gates and that of ODConv is what their schedule had reached,
    1 at its end).

    Args:
        module_or_model: A layer, or a network such as `resnet18_od`, `mobilenetv2_100_od`, or `resnet18_fmd` with
            `conv_bias=True`.
        state_dict: The authors' state_dict.

    Raises:
        ValueError: Keys are missing or unexpected, or a shape does not fit; names them all. Nothing is loaded then.
    """
    target = module_or_model.state_dict()
    if isinstance(module_or_model, DynamicMobileNetV2):
        state_dict = _with_names_of_timm(state_dict, module_or_model)
    parts_of = {key: [(key, tuple(tensor.shape))] for key, tensor in target.items()}
    without_effect = set()
    for name, conv in module_or_model.named_modules():
        if isinstance(conv, (FMDConv2d, ODConv2d)):
            prefix = f'{name}.' if name else ''
            for key, parts in _authors_parts(conv).items():
                parts_of[prefix + key] = [(prefix + theirs, shape) for theirs, shape in parts]
            # the authors' softmax over one kernel; ours has none
            if conv.num_kernels == 1 and isinstance(conv, FMDConv2d):
                without_effect |= {f'{prefix}attention2.{key}' for key in ('fc1.weight', 'fc2.weight', 'fc2.bias')}

    expected = {theirs: shape for parts in parts_of.values() for theirs, shape in parts}
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - expected.keys() - without_effect)
    misfits = [
        f'{key} is {tuple(state_dict[key].shape)}, expected {shape}'
        for key, shape in expected.items() if key in state_dict and tuple(state_dict[key].shape) != shape
    ]
    if missing or unexpected or misfits:
        raise ValueError(
            f'the state_dict does not fit {type(module_or_model).__name__}: '
            f'missing keys {missing}, unexpected keys {unexpected}, shapes {misfits}'
        )
    converted = {
        key: torch.cat([state_dict[theirs].flatten() for theirs, _ in parts]).reshape(target[key].shape)
        for key, parts in parts_of.items() if parts
    }
    module_or_model.load_state_dict(converted, strict=False)


def _with_names_of_timm(state_dict: dict[str, Tensor], model: DynamicMobileNetV2) -> dict[str, Tensor]:
    """The state_dict of ODConv's MobileNetV2, whose modules have torchvision's names, with those of timm's."""
    blocks = [(f'blocks.{i}.{j}', block) for i, stage in enumerate(model.blocks) for j, block in enumerate(stage)]
    ours = {'features.0.0': 'conv_stem', 'features.0.1': 'bn1', 'classifier.1': 'classifier'}
    for number, (name, block) in enumerate(blocks, 1):
        layers = [f'{name}.{key}' for key, _ in block.named_children() if key.startswith(('conv', 'bn'))]
        for index, (conv, norm) in enumerate(zip(layers[::2], layers[1::2])):
            prefix = f'features.{number}.conv.{index}'
            is_last = conv == layers[-2]  # which has no activation behind it, and so no Sequential of its own
            ours[prefix if is_last else f'{prefix}.0'] = conv
            ours[f'features.{number}.conv.{index + 1}' if is_last else f'{prefix}.1'] = norm
    ours |= {f'features.{len(blocks) + 1}.0': 'conv_head', f'features.{len(blocks) + 1}.1': 'bn2'}
    renamed = {}
    for key, tensor in state_dict.items():
        theirs = next((name for name in ours if key.startswith(f'{name}.')), None)
        renamed[key if theirs is None else ours[theirs] + key.removeprefix(theirs)] = tensor
    return renamed


def _authors_parts(conv: DynamicConv2d) -> dict[str, Parts]:
    """Our key -> the authors' tensors that stand in it one after the other; none for the temperatures."""
    parts = {'weight': [('weight', (conv.num_kernels, conv.out_channels, *conv.weight.shape[1:]))]}
    if conv.bias is not None:
        parts['bias'] = [('bias', (conv.num_kernels, conv.out_channels))]
    attention_parts = _fmd_parts if isinstance(conv, FMDConv2d) else _od_parts
    for key, tensors in attention_parts(conv.attention).items():
        parts[f'attention.{key}'] = tensors
    return parts


def _fmd_parts(attention: FMDAttention) -> dict[str, Parts]:
    K, I, O = attention.num_kernels, attention.in_channels, attention.out_channels
    A, h = attention.gate_hidden, attention.kernel_hidden
    parts: dict[str, Parts] = {
        'squeeze.weight': [('attention.fc.weight', (A, I, 1, 1))],
        'gates.weight': [('attention.channel_fc.weight', (I, A, 1, 1))],
        'gates.bias': [('attention.channel_fc.bias', (I,))],
        'kernel_temperature': [],
        'gate_temperature': [],
    }
    if O > 0:
        parts['gates.weight'].append(('attention.filter_fc.weight', (O, A, 1, 1)))
        parts['gates.bias'].append(('attention.filter_fc.bias', (O,)))
    if K > 1:
        parts['squeeze.weight'].append(('attention2.fc1.weight', (h, I, 1, 1)))
        parts['kernel.weight'] = [('attention2.fc2.weight', (K, h, 1, 1))]
        parts['kernel.bias'] = [('attention2.fc2.bias', (K,))]
    return parts


def _od_parts(attention: ODConvAttention) -> dict[str, Parts]:
    A = attention.hidden
    heads = [
        (f'attention.{name}_fc', size)
        for name, size in zip(('channel', 'filter', 'spatial', 'kernel'), attention.sizes) if size > 0
    ]
    return {
        'squeeze.weight': [('attention.fc.weight', (A, attention.in_channels, 1, 1))],
        'heads.weight': [(f'{name}.weight', (size, A, 1, 1)) for name, size in heads],
        'heads.bias': [(f'{name}.bias', (size,)) for name, size in heads],
        'kernel_temperature': [],
    }
