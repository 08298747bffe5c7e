"""Train an image classifier:  accelerate launch recipes/train.py <preset> [--output FOLDER] [--option value ...]

A preset is a whole recipe; an option changes one value of it. `train.py <preset> --help` shows them all. The output
folder gets `model.safetensors` and `config.json` (timm and the Hub load them), `result.json` (the run record, which the
model card is made from), `checkpoints/` to resume from and the tracker's `logs/`.
"""
import sys

from _arguments import parse_train

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_train(sys.argv[1:], __doc__)

import dataclasses
import math
from pathlib import Path
from typing import Any

import _checkpoints
import _optim
import torch
from _accelerator import broadcast_buffers, make_accelerator
from _data import LabelledImages, open_images
from _distillation import check_teacher, load_teacher
from _loaders import batches_of, make_loaders
from _measure import count_gmacs, peak_memory_mib, score, time_inference
from _recipe import EXECUTION, Recipe, check_recipe
from _record import circumstances, hardware, new_leg, public, read_json, sha256, training_times, write_json
from _start import check_names, complete, data_config, first_dynamic, first_network, fit_classifier, new_network
from _training import Training, learning_rate, make_training, train_epoch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fmd_timm.hub import save_for_hub
from fmd_timm.model_card import results_table
from fmd_timm.models._pretrained import WEIGHTS_NAME
from fmd_timm.scores import ies_infer, rcs_infer


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
    model_bytes = 4 * sum(p.numel() for p in network.parameters())
    checkpoint = _checkpoints.check_output(output, resume, model_bytes)
    settings = dict(
        preset=preset, **dataclasses.asdict(asked), init_revision=origin and origin['revision'],
        teacher_revision=teacher_origin and teacher_origin['revision'])
    settings = {name: value for name, value in settings.items() if name not in EXECUTION}
    progress = dict(settings=settings, epochs_done=0, legs=[], metrics=None, best_epoch=0, best_top1=-1.0)
    if checkpoint:
        progress = _checkpoints.read_progress(checkpoint, settings)
    progress['legs'].append(new_leg(accelerator))
    with accelerator.local_main_process_first():
        images = open_images(recipe)
        if is_main:
            for part in images.values():
                part.check_decodable()

    # Build: network, batches, optimization
    set_seed(recipe.seed)
    label_names = images['train'].label_names
    if origin:
        origin['classifier'] = fit_classifier(network, label_names)
        if recipe.freeze:
            _optim.freeze(network, recipe.freeze)
    else:
        network = new_network(recipe, num_classes=len(label_names))
    if teacher:
        check_teacher(teacher, label_names, recipe.train_sizes())
    config = data_config(recipe, network)
    train_loader, validation_loader = accelerator.prepare(
        *make_loaders(recipe, images, config, pin_memory=device.type == 'cuda'))
    steps_per_epoch = math.ceil(len(train_loader) / recipe.accumulate)
    training = make_training(
        accelerator, recipe, network, config, images['train'], recipe.epochs * steps_per_epoch, teacher)
    training.step = progress['epochs_done'] * steps_per_epoch
    set_seed(recipe.seed, device_specific=True)  # mixup and dropout differ between the processes
    if checkpoint:
        _checkpoints.load(accelerator, checkpoint, training.ema)
    if recipe.tracker != 'none':
        given = {name: value for name, value in public(settings).items() if value is not None}
        accelerator.init_trackers('fmd_timm', {k: str(v) if isinstance(v, list) else v for k, v in given.items()})

    # The loop
    for epoch in range(progress['epochs_done'], recipe.epochs):
        batches = batches_of(train_loader, epoch)
        bar = tqdm(batches, f'epoch {epoch + 1}/{recipe.epochs}', leave=False, mininterval=1, disable=not is_main)
        seconds, train_loss = train_epoch(training, bar)
        metrics = evaluate(training, validation_loader, len(images['validation']))
        progress |= dict(epochs_done=epoch + 1, metrics=metrics)
        progress['legs'][-1]['epoch_seconds'].append(seconds)
        if metrics['top1'] > progress['best_top1']:
            progress |= dict(best_top1=metrics['top1'], best_epoch=epoch + 1)
        logged = dict(metrics, train_loss=train_loss, lr=learning_rate(training.optimizer), epoch_seconds=seconds)
        accelerator.log(logged, step=epoch + 1)
        accelerator.print(f'epoch {epoch + 1}: ' + ', '.join(f'{name} {value:.4g}' for name, value in logged.items()))
        _checkpoints.save(accelerator, output / 'checkpoints', progress, training.ema)

    # Write
    record = None
    if is_main:
        final = accelerator.unwrap_model(training.evaluated)
        save_for_hub(final, output, model_config=dict(label_names=label_names), data_config=config)
        model_args = read_json(output / 'config.json').get('model_args', {})
        model_args = {k: v for k, v in model_args.items() if k not in ('in_chans', 'global_pool')}  # always there
        record = dict(preset=preset, recipe=public(dataclasses.asdict(asked)), init=origin, teacher=teacher_origin)
        record |= dict(model_args=model_args)
        record |= make_record(training, final, images, progress)
        record |= dict(training_times(record), weights_sha256=sha256(output / WEIGHTS_NAME))
        write_json(output / 'result.json', record)
        print(results_table(record))
    accelerator.end_training()
    return record


def evaluate(training: Training, loader: DataLoader, num_images: int) -> dict[str, float]:
    """The score of the network that counts.

    Raises:
        SystemExit: It is none, because training has diverged.
    """
    broadcast_buffers(training.model)
    if training.ema:
        broadcast_buffers(training.ema.module)
    metrics = score(training.accelerator, training.evaluated, loader, training.normalize, num_images)
    if not math.isfinite(metrics['loss']):
        raise SystemExit(
            f'the loss of the validation images is {metrics["loss"]} after step {training.step} with learning rate '
            f'{learning_rate(training.optimizer):.4g}: training has diverged; the last checkpoint is from before it'
        )
    return metrics


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
        accelerator, training.inferring, input_size, min(recipe.batch_size, len(validation)), recipe.channels_last)
    return dict(
        model=recipe.model, method=layer and layer.method,
        temperature=recipe.temperature if training.anneals and recipe.annealed_by else None,
        dataset=Path(recipe.dataset).name if Path(recipe.dataset).is_dir() else recipe.dataset,
        train_split=train.split, train_images=len(train), validation_split=validation.split,
        validation_images=len(validation), num_classes=len(train.label_names), label_names=train.label_names,
        **metrics, best_top1=progress['best_top1'], best_epoch=progress['best_epoch'],
        epochs=recipe.epochs, legs=progress['legs'],
        epoch_seconds=[seconds for leg in progress['legs'] for seconds in leg['epoch_seconds']],
        steps_per_epoch=training.total_steps // recipe.epochs,
        **inference, ies_infer=ies_infer(inference['infer_ms_per_image'], accuracy),
        rcs_infer=rcs_infer(inference['infer_images_per_second'], accuracy),
        peak_memory_mib=peak_memory_mib(accelerator.device), parameters=sum(p.numel() for p in network.parameters()),
        gmacs=count_gmacs(network, input_size), **hardware(accelerator), channels_last=recipe.channels_last,
        input_size=input_size, global_batch=recipe.batch_size, seed=recipe.seed, **circumstances('train.py'),
    )


if __name__ == '__main__':
    main(**vars(arguments))
