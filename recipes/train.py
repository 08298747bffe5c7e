"""Train an image classifier:  python recipes/train.py <preset> [--output FOLDER] [--option value ...]

On several GPUs:  accelerate launch recipes/train.py <preset> ...

A preset is a whole recipe; an option changes one value of it. `train.py <preset> --help` shows them all. The output
folder gets `model.safetensors` and `config.json` (timm and the Hub load them), `result.json` (the run record, which the
model card is made from), `results.md` (its table), `curves.png` (loss and top-1 of each epoch), `checkpoints/` to go on
from and the tracker's `logs/`.
"""
import sys

from _arguments import parse_train
from _interruptions import end_with_launcher

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_train(sys.argv[1:], __doc__)
    end_with_launcher()

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import _broken
import _checkpoints
import torch
from _accelerator import images_per_pass, make_accelerator, on_main, tracked
from _data import LabelledImages, open_images, refuse_bad_images
from _dataset import dataset_name
from _distillation import load_teacher, make_teacher
from _dynamics import observe, summarized
from _loaders import make_loaders, stay_on_device
from _loop import train_epochs
from _measure import count_gmacs, count_macts, peak_memory_mib, time_inference
from _output import open_output
from _recipe import EXECUTION, Recipe
from _recipe_checks import check_recipe
from _record import (
    circumstances,
    hardware,
    new_leg,
    public,
    read_json,
    sha256,
    training_times,
    write_json,
    write_text,
)
from _start import (
    check_names,
    check_pass,
    complete,
    data_config,
    first_dynamic,
    first_network,
    fit_network,
)
from _training import Training, make_training
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import nn

from fmd_timm.hub import save_for_hub
from fmd_timm.model_card import as_text, results_table
from fmd_timm.models._pretrained import WEIGHTS_NAME
from fmd_timm.scores import ies_infer, rcs_infer


@refuse_bad_images()
def main(preset: str, recipe: Recipe, output: Path, resume: str | None) -> dict[str, Any] | None:
    """Train, and return the run record that `result.json` holds; None on the other processes than the main one."""
    # Check: everything that can be refused, the cheapest first
    check_recipe(recipe)
    check_names(recipe)
    accelerator = make_accelerator(recipe, output)
    device, is_main = accelerator.device, accelerator.is_main_process
    if device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
    with accelerator.local_main_process_first():  # downloads once on every machine
        network, origin = first_network(recipe)
        teacher, teacher_origin = load_teacher(recipe)
    asked, recipe = recipe, complete(recipe, network)
    check_pass(recipe, network, images_per_pass(accelerator, recipe))
    model_bytes = 4 * sum(p.numel() for p in network.parameters())
    settings = run_settings(
        preset, dataclasses.replace(asked, num_workers=recipe.num_workers), accelerator.num_processes, origin,
        teacher_origin)
    lock, checkpoint, progress = open_output(accelerator, output, resume, model_bytes, settings)  # until main ends
    progress = progress or dict(
        settings=settings, images=None, epochs_done=0, step=0, seconds=0.0, waited=0.0, train_loss=None, legs=[],
        history=[], metrics=None, best_epoch=0, best_top1=-1.0)
    progress['legs'].append(dict(new_leg(accelerator), epochs_done=progress['epochs_done'], step=progress['step']))
    with accelerator.local_main_process_first():
        images = open_images(recipe)
    unread = _broken.check(accelerator, recipe, images)
    if is_main:
        _broken.warn_of_images(images, recipe)
    progress['images'] = _checkpoints.check_images(checkpoint, progress['images'], images)

    # Build: network, batches, optimization
    set_seed(recipe.seed)
    network, label_names = fit_network(recipe, network, origin, images, accelerator.print)
    if teacher:
        teacher = make_teacher(teacher, label_names, recipe.train_sizes(), accelerator.print)
    config = data_config(recipe, network)
    loaders = make_loaders(accelerator, recipe, images, config)
    progress['legs'][-1]['images_on_device'] = stay_on_device(loaders)
    train_loader, validation_loader = accelerator.prepare(*loaders)
    steps_per_epoch = math.ceil(len(train_loader) / recipe.accumulate)
    training = make_training(
        accelerator, recipe, network, config, images['train'], recipe.epochs * steps_per_epoch, teacher)
    training.step = progress['epochs_done'] * steps_per_epoch + progress['step']
    on_main(accelerator, partial(start_tracker, accelerator, asked))
    set_seed(recipe.seed, device_specific=True)  # mixup and dropout differ between the processes
    if checkpoint:
        _checkpoints.load(accelerator, checkpoint, training.ema)

    if is_main:
        print(first_lines(training, images, output), flush=True)
    train_epochs(training, train_loader, validation_loader, progress, output / 'checkpoints')

    # Write
    record = None
    if is_main:
        final = accelerator.unwrap_model(training.evaluated)
        try:  # the weights first: what measures them could fail
            save_for_hub(final, output, model_config=dict(label_names=label_names), data_config=config)
            model_args = read_json(output / 'config.json').get('model_args', {})
            model_args = {k: v for k, v in model_args.items() if k not in ('in_chans', 'global_pool')}  # always there
            record = dict(preset=preset, recipe=public(dataclasses.asdict(asked)), init=origin, teacher=teacher_origin)
            record |= dict(model_args=model_args, weights_sha256=sha256(output / WEIGHTS_NAME), unread_images=unread)
            record |= make_record(training, final, images, progress)
            record |= training_times(record)
            write_json(output / 'result.json', record)
            write_text(output / 'results.md', results_table(record) + '\n')
            save_curves(record, output)
        except (OSError, SafetensorError) as error:
            raise SystemExit(
                f'the results could not be written to {output}, --resume auto tries again: {error}') from error
        print(last_lines(record, output))
    tracked(accelerator.end_training)
    return record


def first_lines(training: Training, images: dict[str, LabelledImages], output: Path) -> str:
    """What is trained, where, on what, and how to go on."""
    accelerator, recipe, train = training.accelerator, training.recipe, images['train']
    network, machine = accelerator.unwrap_model(training.model), hardware(accelerator)
    layer, parameters = first_dynamic(network), sum(p.numel() for p in network.parameters())
    return '\n'.join((
        f'model:   {recipe.model}, {parameters / 1e6:,.2f} M parameters, {layer.method if layer else "static"}',
        f'device:  {machine["device_count"]} x {machine["device"]}, {machine["precision"]}',
        f'images:  {dataset_name(recipe.dataset)}, {len(train):,} to train, {len(images["validation"]):,} to validate, '
        f'{len(train.label_names):,} classes',
        f'results: {output}; stopped, the same command with --resume auto goes on',
    ))


def save_curves(record: dict[str, Any], output: Path) -> None:
    import _pictures  # and matplotlib, which takes a second

    _pictures.save(_pictures.draw_run(record['history']), output / 'curves', ['.png'])


def last_lines(record: dict[str, Any], output: Path) -> str:
    """What came out, where it is, and what can be done with it."""
    return '\n'.join((
        as_text(results_table(record)),
        '',
        f'saved in {output}: {WEIGHTS_NAME} and config.json, result.json, results.md (this table), curves.png',
        'next:',
        f'  python recipes/predict.py {output} path/to/images',
        f'  python recipes/publish.py --run {output} --repo OWNER/NAME --dry-run',
    ))


def start_tracker(accelerator: Accelerator, asked: Recipe) -> None:
    given = {name: value for name, value in public(dataclasses.asdict(asked)).items() if value is not None}
    try:
        accelerator.init_trackers('fmd_timm', {k: str(v) if isinstance(v, list) else v for k, v in given.items()})
    except Exception as error:  # each tracker has its own
        raise SystemExit(f'--tracker {asked.tracker} could not be started: {type(error).__name__}: {error}') from error


def run_settings(
        preset: str,
        asked: Recipe,
        processes: int,
        origin: dict | None,
        teacher_origin: dict | None,
) -> dict[str, Any]:
    """What must be the same to go on with a run. Images and weights are compared by what they are, not where."""
    settings = dict(preset=preset, **dataclasses.asdict(asked), processes=processes)
    on_order = ('num_workers', 'processes')  # the order of streamed images depends on them
    for name in {*EXECUTION, *on_order, 'dataset', 'init', 'kd_model_name'}:
        if not (asked.streaming and name in on_order):
            del settings[name]
    return dict(
        settings, init=origin and f'{origin["revision"]}{", inflated" * origin["inflated"]}',
        teacher_revision=teacher_origin and teacher_origin['revision'])


def make_record(
        training: Training,
        network: nn.Module,
        images: dict[str, LabelledImages],
        progress: dict[str, Any],
) -> dict[str, Any]:
    """What the run was and reached; the rest of the record is what it was asked to be."""
    accelerator, recipe, metrics = training.accelerator, training.recipe, progress['metrics']
    train, validation, layer = images['train'], images['validation'], first_dynamic(network)
    accuracy, input_size = metrics['top1'] / 100, (3, recipe.test_size, recipe.test_size)
    inference = time_inference(
        accelerator, training.inferring, input_size, min(images_per_pass(accelerator, recipe), len(validation)),
        recipe.channels_last)
    return dict(
        model=recipe.model, method=layer and layer.method,
        temperature=recipe.temperature if training.anneals and recipe.annealed_by else None,
        dataset=dataset_name(recipe.dataset), dataset_type=train.kind if Path(recipe.dataset).is_dir() else None,
        dataset_config=recipe.dataset_config,
        train_split=train.split, train_images=len(train), validation_split=validation.split,
        validation_images=len(validation), num_classes=len(train.label_names), label_names=train.label_names,
        **metrics, best_top1=progress['best_top1'], best_epoch=progress['best_epoch'],
        epochs=recipe.epochs, history=progress['history'], legs=progress['legs'],
        epoch_seconds=[seconds for leg in progress['legs'] for seconds in leg['epoch_seconds']],
        steps_per_epoch=training.total_steps // recipe.epochs,
        **inference, ies_infer=ies_infer(inference['infer_ms_per_image'], accuracy),
        rcs_infer=rcs_infer(inference['infer_images_per_second'], accuracy),
        peak_memory_mib=peak_memory_mib(accelerator.device), parameters=sum(p.numel() for p in network.parameters()),
        gmacs=count_gmacs(network, input_size), macts=count_macts(network, input_size),
        **summarized(observe(network, validation, training.normalize, images_per_pass(accelerator, recipe))),
        **hardware(accelerator), channels_last=recipe.channels_last,
        input_size=input_size, global_batch=recipe.batch_size, seed=recipe.seed, **circumstances('train.py'),
    )


if __name__ == '__main__':
    main(**vars(arguments))
