"""Pretrained weights: which tags there are, and loading them.

A record `hub_cards/<model>.<tag>.json` is written by publishing. Its `hub` entry holds `repo`, `commit` and `sha256` of
the weights, `pretrained_cfg` what timm needs to know of them. A tag is pinned to that commit, so that nobody else's
upload is ever loaded under our names.

A tag `inflated_<tag>` is a static checkpoint of timm that is inflated while it is loaded, see `fmd_timm/inflate.py`:
the network has the accuracy of the static one, and its attention is untrained. It is the default as long as no trained
one is published.
"""
import json
import logging
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub.errors import HTTPError  # that of its transport
from safetensors import SafetensorError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    list_models,
    resolve_pretrained_cfg,
)

from ..hub_errors import explain
from ..inflate import checkpoint_filter_fn, is_static

__all__ = ['HUB_CARDS', 'MODULES', 'WEIGHTS_NAME', 'build_model', 'inflated_cfgs', 'with_published_tags']

# Of our models in timm's registry
MODULES = ['cifar_resnet', 'dynamic_cifar_resnet', 'dynamic_mobilenetv2', 'dynamic_mobilenetv3', 'dynamic_resnet']

WEIGHTS_NAME = 'model.safetensors'  # timm falls back to a pickle where no name is given

_logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parents[1]
_INSTALLED, _CHECKOUT = _PACKAGE / 'hub_cards', _PACKAGE.parent / 'hub_cards'
HUB_CARDS = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def with_published_tags(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """Add a configuration '<architecture>.<tag>' for every record of an architecture in `cfgs`, in order of the names.

    timm takes the first tag with weights for the architecture's default: published ones come first. The tag of a file
    that is no record is left out with a warning.
    """
    architectures = {name.partition('.')[0] for name in cfgs}
    published = {}
    for path in sorted(HUB_CARDS.glob('*.json')):
        name = path.name.removesuffix('.json')
        if name.partition('.')[0] in architectures:
            try:
                published[name] = _published_cfg(path)
            except (OSError, ValueError, KeyError, TypeError) as error:  # `import fmd_timm` has other uses
                _logger.warning(
                    f'{path} is not the record of a published checkpoint, {name} is left out: '
                    f'{type(error).__name__}: {error}')
    return {**published, **cfgs}


def _published_cfg(path: Path) -> PretrainedCfg:
    record = json.loads(path.read_text(encoding='utf-8'))
    return PretrainedCfg(**dict(
        record['pretrained_cfg'],
        hf_hub_id=f'{record["hub"]["repo"]}@{record["hub"]["commit"]}',
        hf_hub_filename=WEIGHTS_NAME,
    ))


def inflated_cfgs(architecture: str, cfg: dict[str, Any], static: str, tags: list[str]) -> dict[str, dict[str, Any]]:
    """Configurations of a network with random weights, '.untrained', and with static ones, '.inflated_<tag>'.

    Args:
        architecture: Of ours.
        cfg: Its own configuration.
        static: timm's architecture whose weights fit.
        tags: Of its checkpoints, the first one the default. Preprocessing and licence come from timm's configuration.
    """
    cfgs = {f'{architecture}.untrained': cfg}
    for tag in tags:
        source = get_pretrained_cfg(f'{static}.{tag}').to_dict(remove_source=True)
        source.update(
            hf_hub_id=f'timm/{static}.{tag}',
            hf_hub_filename=WEIGHTS_NAME,
            description=f'Inflated from the static timm/{static}.{tag}: the attention is constant until it is trained.',
        )
        cfgs[f'{architecture}.inflated_{tag}'] = {
            key: value for key, value in source.items() if key not in ('architecture', 'tag')}
    return cfgs


def build_model(
        model_cls,
        variant: str,
        pretrained: bool,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, which inflates the weights if they are a static network's.

    A network with random weights has its own configuration, not that of the checkpoint it could have had.

    Raises:
        RuntimeError: `pretrained` and there are no weights to load: names those that there are. Or they can't be
            loaded: names the Hub repository or the file. Or they are a pickle on the Hub.
    """
    cfg, overlay = None, dict(pretrained_cfg_overlay or {})
    if pretrained:
        cfg = _cfg_with_weights(variant, pretrained_cfg, overlay)
        if _is_on_hub(cfg):
            overlay['hf_hub_filename'] = cfg.hf_hub_filename or WEIGHTS_NAME
    elif pretrained_cfg is None and f'{variant}.untrained' in get_arch_pretrained_cfgs(variant):
        pretrained_cfg = 'untrained'
        overlay = {'tag': None, **overlay}
    try:
        model = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=checkpoint_filter_fn,
            **kwargs,
        )
    except (OSError, HTTPError, SafetensorError) as error:  # what the Hub's client raises itself is an OSError
        if cfg is None:
            raise
        source = f'the Hub repository {cfg.hf_hub_id}' if _is_on_hub(cfg) else cfg.file or cfg.url
        raise RuntimeError(f'the weights of {variant} could not be loaded from {source}: {explain(error)}') from error
    model.register_load_state_dict_pre_hook(_refuse_static)
    return model


def _refuse_static(model, state_dict, prefix, local_metadata, strict, *_) -> None:
    """Say what to do with the weights of a static network, in place of hundreds of missing keys."""
    if strict and is_static(state_dict, model, prefix):
        raise RuntimeError(
            'these are the weights of a static network: load them with pretrained=True and '
            'pretrained_cfg_overlay=dict(file=...), or with fmd_timm.inflate_state_dict(state_dict, model), either of '
            'which inflates them')


def _is_on_hub(cfg: PretrainedCfg) -> bool:
    return bool(cfg.hf_hub_id) and (cfg.source == 'hf-hub' or not (cfg.file or cfg.state_dict))


def _cfg_with_weights(variant: str, pretrained_cfg, overlay: dict[str, Any]) -> PretrainedCfg:
    try:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    except RuntimeError as error:
        raise RuntimeError(f'{error} With weights: {_available()}.') from error
    if not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'{variant} has no published weights (with weights: {_available()}). '
            'Use pretrained=False for random weights.')
    if _is_on_hub(cfg) and not (cfg.hf_hub_filename or WEIGHTS_NAME).endswith('.safetensors'):
        raise RuntimeError(
            f'the weights of {variant} on the Hub must be a .safetensors file, got {cfg.hf_hub_filename} of '
            f'{cfg.hf_hub_id}: other files can hold code')
    return cfg


def _available() -> str:
    return ', '.join(list_models(module=MODULES, pretrained=True))
