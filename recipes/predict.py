"""Classify images:  python recipes/predict.py <checkpoint> <images ...> [--top K] [--format csv|json] [--output FILE]

Prints the most probable classes of each image with their names. The checkpoint is a folder (of a training run, or any
that timm's `local-dir:` loads), a Hub repository (`hf-hub:owner/name`) or a model with a tag that is registered in timm
(`resnet18_fmd.<tag>`), or an ONNX file of recipes/export.py, which onnxruntime computes with nothing but the file. An
image is a file that Pillow reads, or a folder of such files.

--format prints them in another form once all are there, and --output also writes them to a file, by its ending: as CSV
a row for each image and class, as JSON a list of images with their classes. An image that can't be read is left out
with a warning, and the exit code is then 1.
"""
import sys

from _arguments_checkpoint import parse_predict

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_predict(sys.argv[1:], __doc__)

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _classes import printable
from _exported import FORMATS, Metadata, Run
from _images import BadImage, read_file, suffixes
from _record import check_writable, write_text
from _sources import find_source, load_network
from timm.data import create_transform
from torch import Tensor, nn

import fmd_timm  # noqa: F401, registers the models


def main(checkpoint: str, images: list[Path], top: int, format: str, output: Path | None) -> None:
    paths = find_images(images)
    if output:
        check_writable(output, '--output')
    classify, (data_config, names) = open_checkpoint(checkpoint)
    read = reader(data_config)

    predictions = []
    for path in paths:
        try:
            image = read(path)
        except BadImage as error:
            print(f'warning: {printable(str(error))}', file=sys.stderr)
            continue
        with torch.inference_mode():
            best = best_classes(classify(image), names, top)
        predictions.append(dict(
            image=str(path), classes=[dict(label=name, probability=probability) for name, probability in best]))
        if format == 'text':
            print(printable(str(path)))
            for name, probability in best:
                print(f'{100 * probability:8.2f} %  {printable(name)}')
    if format != 'text':
        print(*map(printable, WRITTEN[format](predictions).split('\n')), sep='\n', end='')
    if output:
        write_text(output, WRITTEN[output.suffix[1:]](predictions))
    unread = len(paths) - len(predictions)
    if unread:
        raise SystemExit(f'{unread} of {len(paths)} images could not be read')


def reader(data_config: dict[str, Any]) -> Callable[[Path], Tensor]:
    """Image file -> (1, C, H, W), prepared for a network; raises BadImage."""
    transform = create_transform(**data_config, is_training=False)
    mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    return lambda path: transform(read_file(path).convert(mode)).unsqueeze(0)


def best_classes(logits: Tensor, names: list[str], top: int) -> list[tuple[str, float]]:
    """Names and probabilities of the most probable classes, the best one first, of logits (1, classes)."""
    probabilities = logits.float().softmax(dim=1)[0]
    return [(names[i], p.item()) for p, i in zip(*probabilities.topk(min(top, len(names))))]


def open_network(checkpoint: str, what: str) -> tuple[nn.Module, Metadata]:
    """The network, where there is an accelerator on it, and what must be known to use it; `what` is the argument."""
    network = load_network(find_source(checkpoint, what), what).eval()
    metadata = Metadata.of(network, f'{what} {checkpoint!r}')
    return network.to(torch.accelerator.current_accelerator(check_available=True) or 'cpu'), metadata


def open_checkpoint(checkpoint: str) -> tuple[Run, Metadata]:
    """What gives logits of images (B, C, H, W), and what must be known to use it."""
    if checkpoint.endswith('.onnx'):
        return open_file(Path(checkpoint))
    network, metadata = open_network(checkpoint, 'checkpoint')
    device = next(network.parameters()).device
    return lambda images: network(images.to(device)), metadata


def open_file(path: Path) -> tuple[Run, Metadata]:
    """The same of an ONNX file."""
    FORMATS['onnx'].check_installed()
    try:
        return FORMATS['onnx'].open(path)
    except KeyError as error:
        raise SystemExit(
            f'checkpoint {path} does not say how images are prepared: its metadata has no {error}, which '
            f'recipes/export.py writes') from error
    except Exception as error:  # onnxruntime has many
        raise SystemExit(f'checkpoint {path} could not be loaded: {type(error).__name__}: {error}') from error


def find_images(arguments: list[Path]) -> list[Path]:
    """The files among the arguments and, sorted, the images in the folders among them; no hidden ones."""
    paths, known = [], suffixes()
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = sorted(
                path for path in argument.rglob('*') if path.suffix.lower() in known and path.is_file()
                and not any(part.startswith('.') for part in path.relative_to(argument).parts))
            if not found:
                raise SystemExit(f'folder {argument} has no images')
        elif not argument.is_file():
            raise SystemExit(f'image {argument} was not found, expected a file or a folder')
        paths += found
    return paths


def as_csv(predictions: list[dict[str, Any]]) -> str:
    table = io.StringIO()
    rows = csv.writer(table, lineterminator='\n')
    rows.writerow(['image', 'rank', 'label', 'probability'])
    for prediction in predictions:
        for rank, found in enumerate(prediction['classes'], 1):
            rows.writerow([prediction['image'], rank, found['label'], found['probability']])
    return table.getvalue()


def as_json(predictions: list[dict[str, Any]]) -> str:
    return json.dumps(predictions, indent=2) + '\n'


WRITTEN = {'csv': as_csv, 'json': as_json}  # by --format, and by the ending of --output


if __name__ == '__main__':
    main(**vars(arguments))
