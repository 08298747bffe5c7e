"""Classify images:  python recipes/predict.py <checkpoint> <images ...> [--top K]

Prints the most probable classes of each image with their names. The checkpoint is a folder (of a training run, or any
that timm's `local-dir:` loads), a Hub repository (`hf-hub:owner/name`) or a model with a tag that is registered in timm
(`resnet18_fmd.<tag>`). An image is a file that Pillow reads, or a folder of such files.
"""
import sys

from _arguments import parse_predict

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_predict(sys.argv[1:], __doc__)

from pathlib import Path

import torch
from _start import find_source, load_network
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import nn

import fmd_timm  # noqa: F401, registers the models


def main(checkpoint: str, images: list[Path], top: int) -> None:
    paths = find_images(images)
    model = load_network(find_source(checkpoint, 'checkpoint'), 'checkpoint').eval()
    if not model.num_classes:
        raise SystemExit(f'checkpoint {checkpoint!r} has no classifier')
    names = class_names(model)
    data_config = resolve_model_data_config(model)
    transform = create_transform(**data_config, is_training=False)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    model.to(device)

    for path in paths:
        image = read_image(path, 'L' if data_config['input_size'][0] == 1 else 'RGB')
        with torch.inference_mode():
            probabilities = model(transform(image).unsqueeze(0).to(device)).float().softmax(dim=1)[0]
        print(path)
        for probability, index in zip(*probabilities.topk(min(top, model.num_classes))):
            print(f'{100 * probability.item():8.2f} %  {names[index]}')


def find_images(arguments: list[Path]) -> list[Path]:
    """The files among the arguments and, sorted, the images in the folders among them."""
    suffixes = Image.registered_extensions()
    paths = []
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = sorted(path for path in argument.rglob('*') if path.suffix.lower() in suffixes and path.is_file())
            if not found:
                raise SystemExit(f'folder {argument} has no images')
        elif not argument.is_file():
            raise SystemExit(f'image {argument} was not found, expected a file or a folder')
        paths += found
    return paths


def read_image(path: Path, mode: str) -> Image.Image:
    """The image in the mode, turned upright."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # Pillow's plugins raise what they like
        raise SystemExit(f'image {path} cannot be decoded: {error}') from error


def class_names(model: nn.Module) -> list[str]:
    """From the checkpoint, or ImageNet's where the checkpoint is of ImageNet and has no names; else the numbers."""
    cfg, labels = model.pretrained_cfg, range(model.num_classes)
    names, descriptions = cfg.get('label_names'), cfg.get('label_descriptions') or {}
    if isinstance(names, dict):  # where some indices have no name; as JSON has it, with strings for indices
        names = [names.get(str(i), f'class {i}') for i in labels]
    if names:
        return [descriptions.get(name, name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in labels]
    return [f'class {i}' for i in labels]


if __name__ == '__main__':
    main(**vars(arguments))
