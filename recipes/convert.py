"""A checkpoint of the authors' code as one of timm:  python recipes/convert.py <file.pth> --model NAME

For what the code of FMDConv (github.com/tianyu00824/FMDConv) and of ODConv (github.com/OSVAI/ODConv) saves, such as
ODConv's published ResNets and MobileNetV2. The folder gets `model.safetensors` and `config.json`: evaluate.py,
predict.py, export.py and train.py --init take it. The number of kernels is that of the file, the temperature that
which the authors end with.
"""
import sys

from _arguments import parse_convert

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_convert(sys.argv[1:], __doc__)

from pathlib import Path
from pickle import UnpicklingError

import timm
import torch
from torch import Tensor

from fmd_timm import load_authors_state_dict, set_temperature
from fmd_timm.hub import save_for_hub

KERNEL_TEMPERATURE = dict(od=1.0, fmd=34.0)  # at the end of the authors' training
PREPROCESSING = dict(interpolation='bilinear', crop_pct=0.875)  # theirs, by torchvision


def main(checkpoint: Path, model: str, output: Path) -> None:
    if not timm.is_model(model):
        raise SystemExit(f'--model must be a model registered in timm, such as resnet18_od, got {model!r}')
    state_dict = read_checkpoint(checkpoint)
    kernels = [tensor for tensor in state_dict.values() if tensor.ndim == 5]  # (K, O, I, kh, kw)
    if not kernels:
        raise SystemExit(f'{checkpoint} has no dynamic convolution: expected kernels of 5 dimensions')
    method = model.split('_')[-1]
    model_args = dict(num_kernels=len(kernels[0]), num_classes=num_classes(state_dict))
    if method == 'fmd':
        model_args['conv_bias'] = True
    network = timm.create_model(model, **model_args)
    try:
        load_authors_state_dict(network, state_dict)
    except ValueError as error:
        raise SystemExit(f'{checkpoint} is not of a {model}: {error}') from error
    set_temperature(network, kernel=KERNEL_TEMPERATURE[method])
    save_for_hub(network, output, model_args=model_args, data_config=PREPROCESSING)
    print(f'wrote {output}: {model}, {model_args}')


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file of torch.save, as training with DistributedDataParallel leaves it or bare.

    Raises:
        SystemExit: There is none, it would execute code, or it holds something else.
    """
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        saved = saved.get('state_dict', saved)
        weights = {name.removeprefix('module.'): tensor for name, tensor in saved.items()}
    except UnpicklingError as error:  # whose text says how to load the file all the same
        raise SystemExit(f'{path} is not loaded: it is no file of torch.save, or holds more than weights') from error
    except (OSError, RuntimeError, AttributeError) as error:
        raise SystemExit(f'{path} can not be read as weights: {error}') from error
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise SystemExit(f'{path} must hold tensors by their names, or such a state_dict')
    return weights


def num_classes(state_dict: dict[str, Tensor]) -> int:
    return len(next((state_dict[name] for name in ('fc.bias', 'classifier.1.bias') if name in state_dict), ()))


if __name__ == '__main__':
    main(**vars(arguments))
