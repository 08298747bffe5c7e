"""Any CNN made dynamic: its convolutions swapped in place."""
import re
from collections.abc import Callable

import torch.nn as nn

from .dynamic_conv import DynamicConv2d
from .fmd_conv import FMDConv2d

__all__ = ['make_dynamic']

# Parts of a module's name, in timm's models, that stand outside the blocks or work on pooled features: there are few
# channels or a single pixel, the papers leave them static, and K kernels per image would cost more than they compute.
_STATIC_PART = re.compile(
    r'^conv1\.|stem|patch_embed|downsample|shortcut|head|classifier|pre_logits|attn|(^|[._])se(_module)?([._]|$)')


def make_dynamic(
        model: nn.Module,
        conv_layer: type[DynamicConv2d] = FMDConv2d,
        filter_fn: Callable[[str, nn.Conv2d], bool] | None = None,
        **conv_args,
) -> list[str]:
    """Swap the convolutions of a network for dynamic ones, newly initialised, in place.

    Unless `filter_fn` says which, those of the blocks are swapped, as the papers do in ResNets and MobileNets: 1x1,
    depthwise, grouped or full. Those that read the image, stems, downsampling and shortcuts between the blocks,
    squeeze-and-excitation and other attention, and heads stay static.

    Forward hooks of a convolution, with which some of timm's networks return their features, stay in its place.

    To keep what a trained network has learned, use `fmd_timm.inflate`, which returns a dynamic copy of it.

    Args:
        model: A CNN, for instance of timm, also one made with `features_only=True`.
        conv_layer: `CondConv2d`, `DyConv2d`, `ODConv2d` or `FMDConv2d`.
        filter_fn: Whether to swap the convolution of this name, as in `model.named_modules()`.
        **conv_args: Arguments of `conv_layer.like`, such as `num_kernels`.

    Returns:
        The names of the convolutions that were swapped.

    Raises:
        ValueError: There is none to swap, or one that can't be: a subclass of `nn.Conv2d` that may compute something
            else (such as one that standardises its weights). Nothing is swapped then.
    """
    convs = {  # a module that stands in two places has two names
        name: conv for name, conv in model.named_modules(remove_duplicate=False) if name and isinstance(conv, nn.Conv2d)
    }
    if filter_fn is None:
        image_channels = getattr(model, 'in_chans', 3)
        chosen = [
            name for name, conv in convs.items()
            if not (_STATIC_PART.search(name) or conv.in_channels == image_channels and conv.groups == 1)
        ]
    else:
        chosen = [name for name, conv in convs.items() if filter_fn(name, conv)]
    if not chosen:
        raise ValueError(
            f'{type(model).__name__} has no convolution to make dynamic: '
            f'of its {len(convs)} the filter takes none'
        )
    dynamic = {}  # by the static module
    for name in chosen:
        conv = convs[name]
        if conv not in dynamic:
            try:
                dynamic[conv] = conv_layer.like(conv, **conv_args)
            except ValueError as error:
                raise ValueError(f'{name} of {type(model).__name__}: {error}') from error
            dynamic[conv].train(conv.training)
            keep_hooks(conv, dynamic[conv])
    for name in chosen:
        parent, _, key = name.rpartition('.')
        setattr(model.get_submodule(parent), key, dynamic[convs[name]])
    return chosen


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Register the forward hooks of a module at the one in its place, as torch.ao.quantization does."""
    for hook in old._forward_pre_hooks.values():
        new.register_forward_pre_hook(hook)
    for hook in old._forward_hooks.values():
        new.register_forward_hook(hook)
