"""Checkpoints of the FMDConv authors' code (github.com/tianyu00824/FMDConv), turned into ours."""

import torch
import torch.nn as nn
from torch import Tensor

from .layers import FMDConv2d

__all__ = ['load_official_state_dict']

Parts = list[tuple[str, tuple[int, ...]]]  # the authors' key and shape of each part


def load_official_state_dict(module_or_model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load a state_dict with the authors' names and shapes into an `FMDConv2d` or a whole network.

    Outside the dynamic convolutions their networks and ours use the same names. Their checkpoints hold no temperatures,
    and those of `module_or_model` are kept: set them with `set_temperature` (their kernel temperature is always 34,
    that of the gates is what their schedule had reached).

    Args:
        module_or_model: A layer, or a network such as `resnet18_fmd` with `conv_bias=True`.
        state_dict: The authors' state_dict.

    Raises:
        ValueError: Keys are missing or unexpected, or a shape does not fit; names them all. Nothing is loaded then.
    """
    target = module_or_model.state_dict()
    parts_of = {key: [(key, tuple(tensor.shape))] for key, tensor in target.items()}
    without_effect = set()
    for name, conv in module_or_model.named_modules():
        if isinstance(conv, FMDConv2d):
            prefix = f'{name}.' if name else ''
            for key, parts in _official_parts(conv).items():
                parts_of[prefix + key] = [(prefix + official, shape) for official, shape in parts]
            if conv.num_kernels == 1:  # the authors' softmax over one kernel; ours has none
                without_effect |= {f'{prefix}attention2.{key}' for key in ('fc1.weight', 'fc2.weight', 'fc2.bias')}

    expected = {official: shape for parts in parts_of.values() for official, shape in parts}
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
        key: torch.cat([state_dict[official].flatten() for official, _ in parts]).reshape(target[key].shape)
        for key, parts in parts_of.items() if parts
    }
    module_or_model.load_state_dict(converted, strict=False)


def _official_parts(conv: FMDConv2d) -> dict[str, Parts]:
    """Our key -> the authors' tensors that stand in it one after the other; none for the temperatures."""
    attention = conv.attention
    K, I, O = conv.num_kernels, conv.in_channels, conv.out_channels
    A, h = attention.gate_hidden, attention.kernel_hidden
    parts: dict[str, Parts] = {
        'weight': [('weight', (K, O, I // conv.groups, *conv.kernel_size))],
        'attention.squeeze.weight': [('attention.fc.weight', (A, I, 1, 1))],
        'attention.gates.weight': [('attention.channel_fc.weight', (I, A, 1, 1))],
        'attention.gates.bias': [('attention.channel_fc.bias', (I,))],
        'attention.kernel_temperature': [],
        'attention.gate_temperature': [],
    }
    if conv.bias is not None:
        parts['bias'] = [('bias', (K, O))]
    if attention.out_channels:
        parts['attention.gates.weight'].append(('attention.filter_fc.weight', (O, A, 1, 1)))
        parts['attention.gates.bias'].append(('attention.filter_fc.bias', (O,)))
    if K > 1:
        parts['attention.squeeze.weight'].append(('attention2.fc1.weight', (h, I, 1, 1)))
        parts['attention.kernel.weight'] = [('attention2.fc2.weight', (K, h, 1, 1))]
        parts['attention.kernel.bias'] = [('attention2.fc2.bias', (K,))]
    return parts
