"""A model as the files of a Hub repository, for timm (`hf-hub:`, `local-dir:`) and for transformers (TimmWrapper)."""
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch.nn as nn
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from .layers.prepared import PreparedConv2d
from .models._pretrained import WEIGHTS_NAME
from .models.dynamic_cnn import describe

__all__ = ['save_for_hub']


def save_for_hub(
        model: nn.Module,
        folder: str | Path,
        model_config: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
) -> None:
    """Write `model.safetensors` and `config.json`: timm's `save_for_hf`, for channels_last models and transformers too.

    A network that `make_dynamic` or `inflate` has changed is saved as a `dynamic_cnn`, which says of what network and
    which convolutions. Whoever has imported fmd_timm loads it as any other.

    Each file is written beside its place and then renamed, so that it is never half there.

    Args:
        model: A model that `timm.create_model` made, without a wrapper (DDP, compile).
        folder: Where the files go; made if it isn't there.
        model_config: Entries over those of the model, such as `label_names`.
        model_args: Serializable arguments in place of those that `timm.create_model` got.
        data_config: Preprocessing over that of the model, such as `mean`, `std`, `crop_pct`.

    Raises:
        ValueError: An argument of the model can't be written as JSON, such as a class, or the files could not be
            loaded: `timm.create_model` with the model's arguments gives other weights. Nothing is written then.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix='.') as tmp:
        weights, config_path = Path(tmp, WEIGHTS_NAME), Path(tmp, 'config.json')
        # safetensors refuses channels_last tensors, hence not timm's save_for_hf
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, weights, metadata={'format': 'pt'})
        save_config_for_hf(model, config_path, model_config, model_args, data_config)

        config = json.loads(config_path.read_text())
        # transformers passes the number of classes itself (5.23: 'multiple values for keyword argument'); timm takes
        # it from the top level
        config.get('model_args', {}).pop('num_classes', None)
        _make_loadable(config, model)
        config_path.write_text(json.dumps(config, indent=2))
        for path in weights, config_path:
            path.replace(folder / path.name)


def _make_loadable(config: dict[str, Any], model: nn.Module) -> None:
    """Let the configuration be that of a network with the model's weights.

    Raises:
        ValueError: There is none.
    """
    created = _create(config)
    if _sizes(created) == _sizes(model):
        return
    args = config.setdefault('model_args', {})
    args['static'] = args.get('static', config['architecture'])
    args.pop('dynamic', None)
    if config['architecture'] == 'dynamic_cnn':
        created = _create(dict(config, architecture=args['static'], model_args={
            key: value for key, value in args.items() if key != 'static'}))
    args['dynamic'] = describe(model, created)
    config['architecture'] = 'dynamic_cnn'
    if args['dynamic'] and _sizes(_create(config)) == _sizes(model):
        return
    if any(isinstance(module, PreparedConv2d) for module in model.modules()):
        raise ValueError('a network that is prepared for inference can not be loaded: save it before')
    sizes, others = _sizes(model), _sizes(created)
    differs = next(name for name in [*sizes, *others] if sizes.get(name) != others.get(name))
    raise ValueError(
        f'{args["static"]} with the arguments of this model has other weights, which could not be loaded: {differs} is '
        f'{sizes.get(differs, "missing")}, expected {others.get(differs, "none of that name")}')


def _create(config: dict[str, Any]) -> nn.Module:
    return timm.create_model(
        config['architecture'], num_classes=config['num_classes'], device='meta', **config.get('model_args', {}))


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
