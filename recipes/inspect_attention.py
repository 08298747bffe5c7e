"""Is a dynamic network dynamic?  python recipes/inspect_attention.py <checkpoint> --dataset <digits, Hub id or folder>

Counts the attention of every dynamic convolution over the images, and prints for each layer:

    kernel entropy   of kernel_attn over log K, mean of the images: 1 is an equal mix of all kernels, 0 a single one
    usage entropy    the same of the mean kernel_attn: 0 where all images take the same kernel. Where it is above the
                     kernel entropy, different images mix in different ways
    gates            standard deviation of a gate (in_attn, out_attn, tap_attn) over the images, mean of all gates
    kernel distance  of the K kernels from their mean, over its norm: at 0 it does not matter how they are mixed

Then it scores the network three times: as it is, with the mean kernel_attn of these images in place of each one's own,
and with the mean of all its attention, which makes a static network of it. What that costs is what the attention of an
image is worth. --output writes the table, a record of it and a picture into a folder.
"""
import sys

from _arguments_checkpoint import parse_inspect_attention

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_inspect_attention(sys.argv[1:], __doc__)

import statistics
from pathlib import Path
from typing import Any

from _accelerator import auto_precision, use_all_cores
from _data import refuse_bad_images
from _dynamics import averaged, check_dynamic, watched
from _loaders import Normalize
from _measure import score
from _pictures import draw_layers, save
from _record import circumstances, hardware, public, write_json, write_text
from accelerate import Accelerator
from evaluate import make_loader, open_scored
from timm.data import resolve_model_data_config

NUMBERS = 'kernel_entropy', 'usage_entropy', 'gate_std', 'kernel_distance'
HEAD = 'layer', 'kernel entropy', 'usage entropy', 'gates', 'kernel distance'


@refuse_bad_images()
def main(checkpoint: str, batch_size: int, num_workers: int, output: Path | None, **images_of) -> dict[str, Any]:
    """Returns the record that `attention.json` holds; `images_of` are the other options of evaluate.py."""
    precision = auto_precision()
    accelerator = Accelerator(mixed_precision='no' if precision == 'fp32' else precision)
    use_all_cores(accelerator)
    if accelerator.num_processes > 1:
        raise SystemExit(f'inspect_attention.py is for one process, got {accelerator.num_processes}')
    if batch_size < 1:
        raise SystemExit(f'--batch-size must be at least 1, got {batch_size}')
    model, images = open_scored(accelerator, checkpoint, **images_of)
    check_dynamic(model, f'checkpoint {checkpoint!r}')
    data_config = resolve_model_data_config(model)
    loader, model = make_loader(accelerator, images, batch_size, num_workers), accelerator.prepare(model)
    normalize = Normalize(data_config['mean'], data_config['std']).to(accelerator.device)

    def top1() -> float:
        return score(accelerator, model, loader, normalize, len(images))['top1']

    with watched(model) as layers:
        scores = dict(top1=top1())
    with averaged(layers, kernels_only=True):
        scores['top1_of_mean_kernels'] = top1()
    with averaged(layers):
        scores['top1_of_mean'] = top1()
    record = dict(
        **public(dict(checkpoint=checkpoint, dataset=images_of['dataset'])), model=model.pretrained_cfg['architecture'],
        split=images.split, images=len(images), **scores,
        layers={name: {number: getattr(layer, number)() for number in NUMBERS} for name, layer in layers.items()},
        **hardware(accelerator), **circumstances('inspect_attention.py'))
    rows, findings = layer_rows(record['layers']), say(record)
    print(as_text([HEAD, *rows]), findings, sep='\n\n')
    if output:
        write_text(output / 'attention.md', f'{as_markdown([HEAD, *rows])}\n\n{findings}\n')
        write_json(output / 'attention.json', record)
        save(draw_layers(record['layers']), output / 'attention')
        print(f'\nwrote {output}: attention.md, attention.json, attention.png, attention.svg')
    return record


def layer_rows(layers: dict[str, dict[str, float | None]]) -> list[list[str]]:
    """A row of each layer, and the medians; a dash for what its method does not have."""
    columns = [[layer[number] for layer in layers.values()] for number in NUMBERS]
    medians = [None if None in column else statistics.median(column) for column in columns]
    return [
        [name, *('-' if value is None else f'{value:.3f}' for value in values)]
        for name, values in (*((name, layer.values()) for name, layer in layers.items()), ('median', medians))]


def say(record: dict[str, Any]) -> str:
    """What the accuracies are, with which attention."""
    top1 = record['top1']
    return '\n'.join([
        f'top-1 of {record["images"]} images, {record["dataset"]} {record["split"]}: {top1:.2f} %',
        *(f'with their mean {what}: {record[name]:.2f} % ({record[name] - top1:+.2f} points)'
          for what, name in (('kernel_attn', 'top1_of_mean_kernels'), ('attention', 'top1_of_mean')))])


def as_text(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows)


def as_markdown(rows: list[list[str]]) -> str:
    head, *rows = (f'| {" | ".join(row)} |' for row in rows)
    return '\n'.join([head, '|---' + '|---:' * (len(HEAD) - 1) + '|', *rows])


if __name__ == '__main__':
    main(**vars(arguments))
