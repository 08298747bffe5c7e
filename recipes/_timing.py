"""Time models in turn:  accelerate launch recipes/_timing.py <preset> --models NAME ... [--output FOLDER] [--option ..]

A machine that gets warm, slow or busy must not favour the model whose turn is early: in each of 5 rounds every model
trains a few steps and classifies a few batches, in the opposite order of the round before, so that the models can be
compared within a round. The steps are those of `recipes/train.py` on the images of the recipe, from loading to the
optimizer; an epoch is said to take as long as its number of steps. Writes `timing.json` with all rounds.
"""
import argparse
import dataclasses
import datetime
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import _optim
import timm
import torch
from _data import LabelledImages, Normalize, train_transform
from _measure import command_line, device_name, git_commit, synchronize, time_inference, versions
from accelerate import Accelerator
from timm.data import Mixup, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from train import (
    Recipe,
    check_finite,
    check_recipe,
    make_accelerator,
    open_images,
    parse_arguments,
)

ROUNDS = 5  # after one that warms up
STEPS = 5  # of the optimizer, per model and round
INFERENCES = 3  # of one image and of a batch, per model and round


def make_trainer(
        accelerator: Accelerator,
        recipe: Recipe,
        model: nn.Module,
        normalize: Normalize,
        num_classes: int,
) -> tuple[nn.Module, Callable[[Iterable], float]]:
    """The prepared model, and a function that trains it on batches as recipes/train.py does and returns the seconds.

    The learning rate is 0: the weights stay as they are, and no loss diverges.
    """
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.compile:
        model.compile()
    optimizer = create_optimizer_v2(
        model, opt=recipe.opt, lr=0.0, momentum=recipe.momentum,
        param_group_fn=partial(
            _optim.parameter_groups, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
            head_lr_scale=recipe.head_lr_scale),
    )
    ema = ModelEmaV3(model, decay=recipe.ema_decay, device=accelerator.device) if recipe.ema_decay else None
    model, optimizer = accelerator.prepare(model, optimizer)
    erase = RandomErasing(recipe.reprob, mode='pixel', device=accelerator.device)
    mixup = None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else recipe.smoothing)

    def train(batches: Iterable) -> float:
        model.train()
        synchronize(accelerator.device)
        start, last_loss = time.perf_counter(), None
        for batch, labels in batches:
            with accelerator.accumulate(model):
                batch = erase(normalize(batch))
                if mixup:
                    batch, labels = mixup(batch, labels)
                with accelerator.autocast():
                    loss = criterion(model(batch), labels)
                check_finite(last_loss, 0, optimizer)
                last_loss = loss.detach()
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and ema:
                ema.update(accelerator.unwrap_model(model))
        check_finite(last_loss, 0, optimizer)
        synchronize(accelerator.device)
        return time.perf_counter() - start

    return model, train


def make_loader(
        accelerator: Accelerator,
        recipe: Recipe,
        images: LabelledImages,
        model: str,
) -> tuple[DataLoader, Normalize]:
    """The recipe's training batches and their normalisation, which the models share."""
    config = resolve_model_data_config(timm.create_model(model, device='meta'))
    images.transform = train_transform(
        recipe.image_size, recipe.crop, recipe.hflip, recipe.aa, config['interpolation'], config['mean'])
    loader = DataLoader(
        images, batch_size=recipe.batch_size // recipe.accumulate, shuffle=True, drop_last=True,
        num_workers=recipe.num_workers, persistent_workers=recipe.num_workers > 0,
        pin_memory=accelerator.device.type == 'cuda',
    )
    normalize = Normalize(config['mean'], config['std'], recipe.channels_last).to(accelerator.device)
    return accelerator.prepare(loader), normalize


def endless(loader: DataLoader) -> Iterator:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def main(preset: str, recipe: Recipe, models: list[str], output: Path) -> None:
    for name in models:
        check_recipe(dataclasses.replace(recipe, model=name))
    accelerator = make_accelerator(recipe, output)
    device, is_main = accelerator.device, accelerator.is_main_process
    with accelerator.main_process_first():
        images = open_images(recipe)
        if is_main:
            for part in images.values():
                part.check_decodable()
    num_classes, input_size = len(images['train'].label_names), (3, recipe.image_size, recipe.image_size)
    infer_batch = min(recipe.batch_size, len(images['validation']))
    loader, normalize = make_loader(accelerator, recipe, images['train'], models[0])
    trainers = {
        name: make_trainer(
            accelerator, recipe, timm.create_model(name, num_classes=num_classes), normalize, num_classes)
        for name in models
    }
    steps_per_epoch = math.ceil(len(loader) / recipe.accumulate)
    batches = endless(loader)
    # What the workers have ready at the start of a turn came for free: it is used up before the clock starts.
    ready = recipe.accumulate * math.ceil(max(2 * recipe.num_workers, 1) / recipe.accumulate)

    figures = 'epoch_seconds', 'infer_ms_per_image', 'infer_images_per_second'
    timings = {figure: {name: [] for name in models} for figure in figures}
    bar = tqdm(total=(1 + ROUNDS) * len(models), desc='timing', leave=False, disable=not is_main)
    for turn in range(1 + ROUNDS):
        for name in models if turn % 2 else reversed(models):
            model, train = trainers[name]
            train(itertools.islice(batches, ready))
            seconds = train(itertools.islice(batches, STEPS * recipe.accumulate))
            measured = dict(epoch_seconds=seconds / STEPS * steps_per_epoch)
            if is_main:
                measured |= time_inference(
                    accelerator, accelerator.unwrap_model(model), input_size, infer_batch, recipe.channels_last,
                    INFERENCES)
                if turn:
                    for figure in figures:
                        timings[figure][name].append(measured[figure])
            accelerator.wait_for_everyone()
            bar.update()
    bar.close()

    if is_main:
        record = dict(
            preset=preset, recipe=dataclasses.asdict(recipe), command=command_line('_timing.py'), models=models,
            rounds=ROUNDS, steps=STEPS, steps_per_epoch=steps_per_epoch, **timings, infer_batch=infer_batch,
            train_images=len(images['train']), validation_images=len(images['validation']), num_classes=num_classes,
            device=device_name(device), device_type=device.type, device_count=accelerator.num_processes,
            precision='fp32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision,
            input_size=input_size, global_batch=recipe.batch_size, versions=versions(), git_commit=git_commit(),
            finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        )
        output.mkdir(parents=True, exist_ok=True)
        unfinished = output / '.timing.json'
        unfinished.write_text(json.dumps(record, indent=2))
        unfinished.rename(output / 'timing.json')
    accelerator.end_training()


def parse_timing(argv: list[str]) -> argparse.Namespace:
    """preset, recipe, models and output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--models', nargs='+', required=True, metavar='NAME', help='models registered in timm')
    args, rest = parser.parse_known_args(argv)
    run = parse_arguments(rest)
    return argparse.Namespace(preset=run.preset, recipe=run.recipe, models=args.models, output=run.output)


if __name__ == '__main__':
    main(**vars(parse_timing(sys.argv[1:])))
