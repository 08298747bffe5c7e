"""Write a network to a file for another runtime:  python recipes/export.py <checkpoint> --format FORMAT

The checkpoint is a folder (of a training run, or any that timm's `local-dir:` loads), a Hub repository
(`hf-hub:owner/name`) or a model with a tag that is registered in timm (`resnet18_fmd.<tag>`). It is prepared for
inference, exported, and the file is run by its own runtime on images: those that the run validated on, or --images. A
file that computes something else is not kept.

Beside the file stands its record, <file>.json: the largest difference to PyTorch, how often the two have the same best
class, the accuracy of both where the images have labels, the file's size, and the latency of one image. The file itself
says how images are prepared and what the classes are called.
"""
import sys

from _arguments import parse_export

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_export(sys.argv[1:], __doc__)

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _accelerator import use_all_cores
from _arguments import EXPORT_SUFFIXES
from _compared import BATCH, calibration_images, compare, open_compared
from _data import refuse_bad_images
from _exported import FORMATS, Metadata, export_program
from _measure import median_seconds
from _record import circumstances, hardware, sha256, write_json
from _sources import Source, find_source, load_network, origin_of
from _start import first_dynamic
from _stored import STORED
from accelerate import Accelerator

from fmd_timm import prepare_for_inference

LARGEST_DIFFERENCE = {'fp32': 1e-4, 'fp16': 1e-2, 'int8': 0.1, 'int8-static': 0.5}  # relative to the largest logit


@refuse_bad_images()
def main(
        checkpoint: str,
        format: str,
        batch: str,
        weights: str,
        output: Path | None,
        images: str | None,
) -> dict[str, Any]:
    """Returns the record, which is written beside the file."""
    runtime, what = FORMATS[format], f'checkpoint {checkpoint!r}'
    runtime.check_installed()
    accelerator = Accelerator(cpu=True)
    use_all_cores(accelerator)
    source = find_source(checkpoint, 'checkpoint')
    network = load_network(source, 'checkpoint').eval()
    metadata = Metadata.of(network, what)
    input_size = metadata.data_config['input_size']
    if input_size[0] != 3:
        raise SystemExit(f'{what} must be a network for images of 3 channels, got {input_size[0]}')
    if weights == 'int8' and first_dynamic(network) is None:
        raise SystemExit(f'--weights int8 is for the kernels of dynamic convolutions: {what} has none')
    compared = open_compared(source, images, network, what)
    output = output or default_output(source, EXPORT_SUFFIXES[format])
    output.parent.mkdir(parents=True, exist_ok=True)

    largest_batch = 1 if batch == '1' else runtime.largest_batch
    program = export_program(STORED[weights](prepare_for_inference(network)), input_size, batch, largest_batch)
    with TemporaryDirectory(dir=output.parent, prefix='.export-') as folder:
        unchecked = Path(folder, output.name)
        facts = runtime.save(program, metadata, unchecked) or {}
        if weights == 'int8-static':
            runtime.quantize(unchecked, calibration_images(compared.others, metadata.data_config))
        run, _ = runtime.open(unchecked)
        result = compare(
            network, run, compared, metadata.data_config, largest_batch or BATCH, LARGEST_DIFFERENCE[weights])
        seconds = median_seconds(partial(run, torch.randn(1, *input_size)), accelerator.device)
        del run  # Windows removes no file that is open
        files = {
            file.name: dict(bytes=file.stat().st_size, sha256=sha256(file)) for file in sorted(Path(folder).iterdir())}
        for name in files:
            Path(folder, name).replace(output.with_name(name))
    made_by = circumstances('export.py')
    record = dict(
        format=format, batch=batch, largest_batch=largest_batch, weights=weights, files=files,
        checkpoint=origin_of(source, network), compared_on=compared.name, **result, **facts,
        infer_ms_per_image=1000 * seconds, **hardware(accelerator),
        **dict(made_by, versions={**made_by['versions'], **runtime.versions()}))
    write_json(output.with_name(f'{output.name}.json'), record)
    report(output, record)
    return record


def default_output(source: Source, suffix: str) -> Path:
    """In the folder of a run, or named like the model in the current folder."""
    if source.name.startswith('local-dir:'):
        return Path(source.name.removeprefix('local-dir:'), f'model{suffix}')
    return Path(f'{(source.repo if source.name.startswith("hf-hub:") else source.name).rpartition("/")[2]}{suffix}')


def report(output: Path, record: dict[str, Any]) -> None:
    print(f'wrote {output} and its record {output.name}.json')
    print(f'MB: {sum(file["bytes"] for file in record["files"].values()) / 1e6:.1f}')
    print(f'largest difference to PyTorch, relative: {record["largest_relative_difference"]:.2g}')
    print(f'images with the same best class: {record["top1_agreement"]} of {record["images"]}')
    if record['top1'] is not None:
        print(f'top-1: {record["top1"]:.2f}, in PyTorch {record["pytorch_top1"]:.2f}')
    print(f'ms per image at batch 1: {record["infer_ms_per_image"]:.4g}')
    print(f'device: {record["device"]}')


if __name__ == '__main__':
    main(**vars(arguments))
