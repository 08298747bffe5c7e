"""A model as the files of a Hub repository, for timm (`hf-hub:`, `local-dir:`) and for transformers (TimmWrapper)."""
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.nn as nn
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from .models._pretrained import WEIGHTS_NAME

__all__ = ['save_for_hub']


def save_for_hub(
        model: nn.Module,
        folder: str | Path,
        model_config: dict[str, Any] | None = None,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
) -> None:
    """Write `model.safetensors` and `config.json`: timm's `save_for_hf`, for channels_last models and transformers too.

    Each file is written beside its place and then renamed, so that it is never half there.

    Args:
        model: A model that `timm.create_model` made, without a wrapper (DDP, compile).
        folder: Where the files go; made if it isn't there.
        model_config: Entries over those of the model, such as `label_names`.
        model_args: Serializable arguments in place of those that `timm.create_model` got.
        data_config: Preprocessing over that of the model, such as `mean`, `std`, `crop_pct`.

    Raises:
        ValueError: An argument of the model can't be written as JSON, such as a class; nothing is written then.
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
        config_path.write_text(json.dumps(config, indent=2))
        for path in weights, config_path:
            path.replace(folder / path.name)
