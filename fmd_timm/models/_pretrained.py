"""Weights: the tags that `hub_cards/` records, those grown out of timm's static checkpoints, and loading them with
errors that name the repository.

A record `hub_cards/<model>.<tag>.json` is written by publishing. Its `hub` entry holds `repo`, `commit` and `sha256` of
the weights, `pretrained_cfg` what timm needs to know of them. A tag is pinned to that commit, so that nobody else's
upload is ever loaded under our names.

A tag `inflated_<tag>` is a static checkpoint of timm that is inflated while it is loaded, see `fmd_timm/inflate.py`:
the network has the accuracy of the static one, and its attention is untrained. It is the default as long as no trained
one is published.
"""
import json
from pathlib import Path
from typing import Any

import torch.nn as nn
from huggingface_hub import hf_hub_download
from timm.models import build_model_with_cfg, get_pretrained_cfg, list_models, resolve_pretrained_cfg

from ..inflate import checkpoint_filter_fn

__all__ = ['HUB_CARDS', 'MODULES', 'WEIGHTS_NAME', 'build_model', 'inflated_cfgs', 'with_published_tags']

MODULES = ['cifar_resnet', 'dynamic_mobilenetv3', 'dynamic_resnet']  # of our models in timm's registry

WEIGHTS_NAME = 'model.safetensors'  # timm falls back to a pickle where no name is given

_PACKAGE = Path(__file__).parents[1]
_INSTALLED, _CHECKOUT = _PACKAGE / 'hub_cards', _PACKAGE.parent / 'hub_cards'
HUB_CARDS = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def with_published_tags(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add a configuration '<architecture>.<tag>' for every record of an architecture in `cfgs`, in order of the names.

    timm takes the first tag with weights for the architecture's default: published ones come first.
    """
    architectures = {name.partition('.')[0] for name in cfgs}
    published = {}
    for path in sorted(HUB_CARDS.glob('*.json')):
        architecture = path.name.partition('.')[0]
        if architecture in architectures:
            record = json.loads(path.read_text(encoding='utf-8'))
            published[path.name.removesuffix('.json')] = dict(
                record['pretrained_cfg'],
                hf_hub_id=f'{record["hub"]["repo"]}@{record["hub"]["commit"]}',
                hf_hub_filename=WEIGHTS_NAME,
            )
    return {**published, **cfgs}


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
        pretrained_cfg: str | dict[str, Any] | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, with the weights fetched first, and inflated if they are a static network's.

    A network with random weights has its own configuration, not that of the checkpoint it could have had.

    Raises:
        RuntimeError: `pretrained` and there are no weights to load, or they can't be fetched: names what there is, or
            the Hub repository.
    """
    if pretrained:
        _fetch_weights(variant, pretrained_cfg, pretrained_cfg_overlay, cache_dir)
    elif pretrained_cfg is None and f'{variant}.untrained' in list_models(f'{variant}.*', include_tags=True):
        pretrained_cfg = 'untrained'
        pretrained_cfg_overlay = {'tag': None, **(pretrained_cfg_overlay or {})}
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        cache_dir=cache_dir,
        pretrained_filter_fn=checkpoint_filter_fn,
        **kwargs,
    )


def _fetch_weights(variant, pretrained_cfg, pretrained_cfg_overlay, cache_dir) -> None:
    available = ', '.join(list_models(module=MODULES, pretrained=True))
    try:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    except RuntimeError as error:
        raise RuntimeError(f'{error} With weights: {available}.') from error
    if not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'{variant} has no published weights (with weights: {available}). Use pretrained=False for random weights.')
    if cfg.hf_hub_id and cfg.source in (None, 'hf-hub') and not (cfg.file or cfg.state_dict):
        repo, _, revision = cfg.hf_hub_id.partition('@')
        try:
            hf_hub_download(repo, cfg.hf_hub_filename or WEIGHTS_NAME, revision=revision or None, cache_dir=cache_dir)
        except Exception as error:  # the Hub's client has no common class for its own and its transport's errors
            raise RuntimeError(
                f'the weights of {variant} could not be loaded from the Hub repository {cfg.hf_hub_id}: '
                f'{type(error).__name__}: {error}'
            ) from error
