"""Any CNN of timm with dynamic convolutions in place of its own: what `make_dynamic` and `inflate` leave, by a name.

`fmd_timm.hub.save_for_hub` saves such networks as this one, so that `timm.create_model` and transformers load them.
"""
from typing import Any

import timm
from timm.models import get_pretrained_cfg, register_model
from torch import nn

from ..layers import METHODS, DynamicConv2d, make_dynamic
from ._pretrained import build_model

__all__ = ['dynamic_cnn']


@register_model
def dynamic_cnn(
        pretrained: bool = False,
        pretrained_cfg: dict[str, Any] | None = None,
        static: str = 'resnet18',
        dynamic: str | list[dict[str, Any]] = 'fmd',
        **kwargs,
) -> nn.Module:
    """A network of timm whose convolutions are dynamic.

    Args:
        pretrained: Load weights: of a folder or a repository that `save_for_hub` wrote.
        pretrained_cfg: Theirs; by default the static network's, without its weights.
        static: The network.
        dynamic: Which convolutions and how, see `swap_convs`.
        **kwargs: For `static`.
    """
    if pretrained_cfg is None:
        cfg = get_pretrained_cfg(static)
        pretrained_cfg = dict(cfg.to_dict(remove_source=True) if cfg else {}, architecture='dynamic_cnn', tag=None)
    return build_model(
        _build, 'dynamic_cnn', pretrained, pretrained_cfg=pretrained_cfg, static=static, dynamic=dynamic,
        feature_cfg=dict(feature_cls='getter'), **kwargs)  # which asks nothing of the static network's structure


def _build(static: str, dynamic: str | list[dict[str, Any]], **kwargs) -> nn.Module:
    model = timm.create_model(static, **kwargs)
    swap_convs(model, dynamic)
    return model


def swap_convs(model: nn.Module, dynamic: str | list[dict[str, Any]]) -> None:
    """`make_dynamic` as `describe` says it, in place.

    Args:
        model: A CNN.
        dynamic: A method as in names of models ('cond', 'dy', 'od', 'fmd'), which takes the convolutions that
            `make_dynamic` chooses. Or a list, with `method`, `convs` (names; those of `make_dynamic` without) and
            arguments of the layer, such as `num_kernels`, for each way.

    Raises:
        ValueError: There is no such method or convolution, or `make_dynamic` refuses it.
        TypeError: The layer has no such argument.
    """
    for part in [dict(method=dynamic)] if isinstance(dynamic, str) else dynamic:
        conv_args = dict(part)
        method, names = conv_args.pop('method', None), conv_args.pop('convs', None)
        if method not in METHODS:
            raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method!r}')
        chosen = None if names is None else lambda name, conv, names=names: name in names
        make_dynamic(model, METHODS[method], filter_fn=chosen, **conv_args)


def describe(model: nn.Module, static_model: nn.Module) -> list[dict[str, Any]]:
    """What makes the one of the other: for each way in which convolutions were made dynamic its arguments.

    Args:
        model: A network that `make_dynamic` or `inflate` has changed.
        static_model: As it was before.

    Returns:
        `method` (as in names of models, such as 'fmd'), `convs` (their names) and what `DynamicConv2d.like` was given.
    """
    before = dict(static_model.named_modules(remove_duplicate=False))
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DynamicConv2d) and not isinstance(before.get(name), DynamicConv2d):
            part = dict(module.like_args, method=module.suffix)
            for other in parts:
                if {key: value for key, value in other.items() if key != 'convs'} == part:
                    other['convs'].append(name)
                    break
            else:
                parts.append(dict(part, convs=[name]))
    return parts
