"""The temperatures of the attentions: setting them, and annealing them in training.

A high temperature makes the attention uniform, so that all kernels learn; 1 is what training ends at. Dynamic
Convolution (arXiv 1912.03458) trains with a softmax temperature of 30, which it lowers linearly to 1 over the first 10
epochs. FMDConv (arXiv 2503.17530) anneals it too.
"""

import torch.nn as nn

from .attention import DynamicAttention

__all__ = ['annealed_temperature', 'set_temperature']


def set_temperature(model: nn.Module, kernel: float | None = None, gate: float | None = None) -> None:
    """Set the temperatures of every dynamic convolution in `model`, in place.

    A method without such a temperature is left as it is: CondConv has none, DyConv none of gates. ODConv has a single
    one, which `kernel` sets: it divides the logits of all four attentions, as in its authors' code.

    Args:
        model: A network, a layer or a wrapper of one (DDP, EMA).
        kernel: Temperature of the softmax over the kernels (of the sigmoids too in ODConv); None leaves it.
        gate: Temperature of FMDConv's sigmoids over the channels; None leaves it.

    Raises:
        ValueError: A temperature is not positive and finite, or `model` has no dynamic convolution.
    """
    for name, value in ('kernel', kernel), ('gate', gate):
        if value is not None and not 0 < value < float('inf'):
            raise ValueError(f'{name} temperature must be positive and finite, got {value}')
    attentions = [module for module in model.modules() if isinstance(module, DynamicAttention)]
    if not attentions:
        raise ValueError(f'{type(model).__name__} has no dynamic convolution to set a temperature of')
    for attention in attentions:
        for name, value in ('kernel_temperature', kernel), ('gate_temperature', gate):
            if value is not None and hasattr(attention, name):
                getattr(attention, name).fill_(value)


def annealed_temperature(progress: float, start: float = 30.0, annealed_by: float = 0.1) -> float:
    """Temperature after a part of training: linear from `start` to 1, and 1 from `annealed_by` on.

    Args:
        progress: Fraction of all optimizer steps done, 0 to 1.
        start: Temperature at progress 0. 30 as in the paper of Dynamic Convolution.
        annealed_by: Progress at which it reaches 1. 0.1 is the first 10 epochs of 100; 0 never anneals, always 1.

    Raises:
        ValueError: `progress` or `annealed_by` is outside [0, 1], or `start` is not positive.
    """
    for name, fraction in ('progress', progress), ('annealed_by', annealed_by):
        if not 0 <= fraction <= 1:
            raise ValueError(f'{name} must be between 0 and 1, got {fraction}')
    if not 0 < start < float('inf'):
        raise ValueError(f'start must be a positive temperature, got {start}')
    if progress >= annealed_by:
        return 1.0
    return start + (1.0 - start) * progress / annealed_by
