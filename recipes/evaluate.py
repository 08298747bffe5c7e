"""Score a checkpoint:  accelerate launch recipes/evaluate.py <checkpoint> --dataset <digits, Hub id or folder>

Prints one number per line; --results-file also writes the columns of timm's validate.py. The checkpoint is a folder (of
a training run, or any that timm's `local-dir:` loads), a Hub repository (`hf-hub:org/name`) or a model with a tag that
is registered in timm (`resnet18_fmd.<tag>`).

With --validation-share it is scored on the images that its training run held out by the same option.
"""
import sys

from _arguments_checkpoint import parse_evaluate
from _interruptions import end_with_launcher

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_evaluate(sys.argv[1:], __doc__)
    end_with_launcher()

from functools import partial
from pathlib import Path

from _accelerator import PROCESS_GROUP, auto_precision, on_main, usable_cores, use_all_cores
from _data import LabelledImages, StreamedImages, refuse_bad_images
from _dataset import choose_parts, open_dataset, take_parts
from _loaders import Normalize, eval_transform
from _matching import match_classes
from _measure import count_gmacs, peak_memory_mib, score, time_inference
from _recipe import VALIDATION_SPLITS
from _record import check_writable, device_name, read_json
from _results_file import validation_row, write_results
from _sources import find_source, load_network
from _streaming import OwnGroups
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

import fmd_timm  # noqa: F401, registers the models
from fmd_timm.scores import ies_infer, rcs_infer


@refuse_bad_images()
def main(
        checkpoint: str,
        dataset: str,
        dataset_config: str | None,
        split: str | None,
        validation_share: float | None,
        seed: int | None,
        image_column: str | None,
        label_column: str | None,
        streaming: bool,
        batch_size: int,
        num_workers: int,
        results_file: Path | None,
) -> None:
    precision = auto_precision()
    accelerator = Accelerator(
        mixed_precision='no' if precision == 'fp32' else precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True), kwargs_handlers=[PROCESS_GROUP],
    )
    use_all_cores(accelerator)
    if results_file:
        on_main(accelerator, partial(check_writable, results_file, '--results-file'))
    if batch_size < 1 or batch_size % accelerator.num_processes:
        raise SystemExit(
            f'--batch-size must be a multiple of the {accelerator.num_processes} processes, got {batch_size}')
    model, images = open_scored(
        accelerator, checkpoint, dataset, dataset_config, split, validation_share, seed, image_column, label_column,
        streaming)
    data_config = resolve_model_data_config(model)
    loader = make_loader(accelerator, images, batch_size, num_workers)
    model = accelerator.prepare(model)
    normalize = Normalize(data_config['mean'], data_config['std']).to(accelerator.device)
    metrics = score(accelerator, model, loader, normalize, len(images))
    if accelerator.is_main_process:
        model, accuracy = accelerator.unwrap_model(model), metrics['top1'] / 100
        inference = time_inference(accelerator, model, data_config['input_size'], min(batch_size, len(images)))
        if results_file:
            write_results(results_file, [validation_row(checkpoint, model, metrics, data_config)])
        print(f'top-1: {metrics["top1"]:.2f}')
        print(f'top-5: {metrics["top5"]:.2f}')
        print(f'loss: {metrics["loss"]:.4f}')
        print(f'images: {len(images)}')
        print(f'ms per image at batch 1: {inference["infer_ms_per_image"]:.4g}')
        print(f'images/s at batch {inference["infer_batch"]}: {inference["infer_images_per_second"]:.4g}')
        print(f'ies_infer: {format_score(ies_infer(inference["infer_ms_per_image"], accuracy))}')
        print(f'rcs_infer: {format_score(rcs_infer(inference["infer_images_per_second"], accuracy))}')
        print(f'peak memory MiB: {peak_memory_mib(accelerator.device):.0f}')
        print(f'parameters: {sum(p.numel() for p in model.parameters())}')
        print(f'GMACs: {count_gmacs(model, data_config["input_size"]):.4g}')
        print(f'device: {accelerator.num_processes} x {device_name(accelerator.device)}')
        print(f'precision: {precision}')
    accelerator.end_training()


def open_scored(
        accelerator: Accelerator,
        checkpoint: str,
        dataset: str,
        dataset_config: str | None = None,
        split: str | None = None,
        validation_share: float | None = None,
        seed: int | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        streaming: bool = False,
) -> tuple[nn.Module, LabelledImages]:
    """The network of a checkpoint, and the images to score it on, prepared for it and with its classes."""
    if validation_share:
        split, seed = find_hold_out(checkpoint, validation_share, split, seed)
    with accelerator.local_main_process_first():  # downloads once on every machine
        model = load_network(find_source(checkpoint, 'checkpoint'), 'checkpoint')
        splits = open_dataset(dataset, dataset_config, streaming)
    split, parts = choose_parts(splits, dataset, split, VALIDATION_SPLITS)
    images = (StreamedImages if streaming else LabelledImages)(
        take_parts(splits, parts), split, f'{dataset} split {split!r}',
        eval_transform(resolve_model_data_config(model)), image_column, label_column, seed or 0)
    if validation_share:
        _, images = images.hold_out(validation_share)
    match_classes(images, model, f'checkpoint {checkpoint!r}', accelerator.print)
    return model, images


def make_loader(
        accelerator: Accelerator, images: LabelledImages, batch_size: int, num_workers: int) -> DataLoader:
    """Batches of them, prepared by the accelerator."""
    num_workers = min(num_workers, usable_cores())
    order = None
    if isinstance(images, StreamedImages):
        order = OwnGroups(images.rows, batch_size, accelerator.num_processes, num_workers)
    return accelerator.prepare(DataLoader(images, sampler=order, batch_size=batch_size, num_workers=num_workers))


def find_hold_out(checkpoint: str, share: float, split: str | None, seed: int | None) -> tuple[str, int]:
    """The split of which a run held out a share, and the seed that chose it: of the run's record where there is one.

    Raises:
        SystemExit: The run held out other images, and was trained on some of these; or nobody says the seed.
    """
    record = Path(checkpoint, 'result.json')
    if not record.is_file():
        if seed is None:
            raise SystemExit(
                f'--validation-share needs --seed, that of the training run: {checkpoint} has no result.json to say it')
        return split or 'train', seed
    recipe = read_json(record)['recipe']
    if recipe.get('validation_share') is None:
        raise SystemExit(f'--validation-share must be left out: the run of {checkpoint} held out no images')
    for name, option, value in (
            ('validation_share', '--validation-share', share), ('train_split', '--split', split),
            ('seed', '--seed', seed)):
        if value not in (None, recipe.get(name)):
            raise SystemExit(
                f'{option} must be {recipe.get(name)}, as in the run of {checkpoint}, got {value}: it was trained on '
                f'some of these images')
    return recipe['train_split'], recipe['seed']


def format_score(value: float | None) -> str:
    return 'none (no image was right)' if value is None else f'{value:.4g}'


if __name__ == '__main__':
    main(**vars(arguments))
