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
        dynamic: list[dict[str, Any]] | None = None,
        **kwargs,
) -> nn.Module:
    """A network of timm whose convolutions are dynamic.

    Args:
        pretrained: Load weights: of a folder or a repository that `save_for_hub` wrote.
        pretrained_cfg: Theirs; by default the static network's, without its weights.
        static: The network.
        dynamic: Which convolutions, see `describe`; those of `make_dynamic` by default, by FMDConv.
        **kwargs: For `static`.
    """
    if pretrained_cfg is None:
        cfg = get_pretrained_cfg(static)
        pretrained_cfg = dict(cfg.to_dict(remove_source=True) if cfg else {}, architecture='dynamic_cnn', tag=None)
    return build_model(
        _build, 'dynamic_cnn', pretrained, pretrained_cfg=pretrained_cfg, static=static, dynamic=dynamic,
        feature_cfg=dict(feature_cls='getter'), **kwargs)  # which asks nothing of the static network's structure


def _build(static: str, dynamic: list[dict[str, Any]] | None, **kwargs) -> nn.Module:
    model = timm.create_model(static, **kwargs)
    if dynamic is None:
        make_dynamic(model)
    for part in dynamic or ():
        conv_args = dict(part)
        method, names = METHODS[conv_args.pop('method')], conv_args.pop('convs')
        make_dynamic(model, method, filter_fn=lambda name, conv, names=names: name in names, **conv_args)
    return model


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
