"""Time models in turn:  accelerate launch recipes/_timing.py <preset> --models NAME ... [--output FOLDER] [--option ..]

A machine that gets warm, slow or busy must not favour the model whose turn is early: in each of 5 rounds every model
trains a few steps and classifies a few batches, in the opposite order of the round before, so that the models can be
compared within a round. The steps are those of `recipes/train.py`, by the same function (`_training.train_epoch`), on
the images of the recipe, from loading to the optimizer; an epoch is said to take as long as its number of steps, all
of `--image-size`. Writes `timing.json` with all rounds.
"""
import sys

from _arguments import parse_timing
from _interruptions import Interruptions, end_with_launcher

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_timing(sys.argv[1:], __doc__)
    end_with_launcher()

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import _broken
import torch
from _accelerator import images_per_pass, make_accelerator
from _data import open_images, refuse_bad_images
from _distillation import load_teacher, make_teacher
from _loaders import make_loaders, stay_on_device
from _measure import time_inference
from _recipe import Recipe
from _record import circumstances, hardware, public, write_json
from _start import check_names, check_pass, complete, data_config, new_network
from _training import Training, make_training, train_epoch
from torch.utils.data import DataLoader
from tqdm import tqdm

ROUNDS = 5  # after one that warms up
STEPS = 5  # of the optimizer, per model and round
INFERENCES = 3  # of one image and of a batch, per model and round


def main(preset: str, recipe: Recipe, models: list[str], output: Path) -> None:
    time_recipes(preset, recipe, {name: dataclasses.replace(recipe, model=name) for name in models}, output)


@refuse_bad_images()
def time_recipes(preset: str, recipe: Recipe, recipes: dict[str, Recipe], output: Path) -> None:
    """Time what differs from one recipe in the model and its arguments alone, by the names that it has in the file."""
    for of_model in recipes.values():
        check_names(of_model)
    accelerator = make_accelerator(recipe, output)
    torch.backends.cudnn.benchmark = True  # each method is timed with the algorithms that are fastest here
    is_main = accelerator.is_main_process
    with accelerator.local_main_process_first():
        images = open_images(recipe)
        teacher, _ = load_teacher(recipe)
    asked, recipe = recipe, complete(recipe, new_network(next(iter(recipes.values())), device='meta'))
    _broken.check(accelerator, recipe, images)
    input_size = (3, recipe.test_size, recipe.test_size)
    infer_batch = min(images_per_pass(accelerator, recipe), len(images['validation']))
    label_names = images['train'].label_names
    # The learning rate is 0: the weights stay as they are, and no loss diverges.
    timed = dataclasses.replace(recipe, lr=0.0, epochs=1, sched='constant', warmup_epochs=0, image_sizes=None)
    networks = {name: new_network(of_model, num_classes=len(label_names)) for name, of_model in recipes.items()}
    for name, network in networks.items():
        check_pass(dataclasses.replace(timed, model=recipes[name].model), network, images_per_pass(accelerator, recipe))
    config = data_config(recipe, next(iter(networks.values())))
    if teacher:
        teacher = make_teacher(teacher, label_names, timed.train_sizes(), accelerator.print)
    loaders = make_loaders(accelerator, timed, images, config)
    loader = accelerator.prepare(loaders[0])
    steps_per_epoch = math.ceil(len(loader) / recipe.accumulate)
    trainings = {
        name: make_training(accelerator, timed, network, config, images['train'], STEPS, teacher)
        for name, network in networks.items()
    }
    batches = endless(loader)
    # What the workers have ready at the start of a turn came for free: it is used up before the clock starts.
    ready = math.ceil(max(2 * recipe.num_workers, 1) / recipe.accumulate)

    figures = 'epoch_seconds', 'infer_ms_per_image', 'infer_images_per_second'
    timings = {figure: {name: [] for name in networks} for figure in figures}
    bar = tqdm(total=(1 + ROUNDS) * len(networks), desc='timing', leave=False, disable=not is_main)
    for turn in range(1 + ROUNDS):
        for name in networks if turn % 2 else reversed(networks):
            for _ in range(ready):
                train_steps(trainings[name], batches, 1)
            seconds = train_steps(trainings[name], batches, STEPS)
            measured = dict(epoch_seconds=seconds / STEPS * steps_per_epoch)
            if is_main:
                measured |= time_inference(
                    accelerator, trainings[name].inferring, input_size, infer_batch, recipe.channels_last, INFERENCES)
                if turn:
                    for figure in figures:
                        timings[figure][name].append(measured[figure])
            accelerator.wait_for_everyone()
            bar.update()
    bar.close()

    if is_main:
        write_json(output / 'timing.json', dict(
            preset=preset, recipe=public(dataclasses.asdict(asked)), models=list(networks), rounds=ROUNDS, steps=STEPS,
            steps_per_epoch=steps_per_epoch, **timings, infer_batch=infer_batch,
            train_images=len(images['train']), validation_images=len(images['validation']),
            num_classes=len(images['train'].label_names), **hardware(accelerator), channels_last=recipe.channels_last,
            images_on_device=stay_on_device(loaders), input_size=input_size, global_batch=recipe.batch_size,
            **circumstances('_timing.py'),
        ))
    accelerator.end_training()


def endless(loader: DataLoader) -> Iterator:
    for epoch in itertools.count():
        loader.set_epoch(epoch)
        yield from loader


def train_steps(training: Training, batches: Iterator, steps: int) -> float:
    """Seconds of the first steps of a training that has STEPS in all.

    So every turn is a whole training in small: its temperature falls within the same share of it.
    """
    training.step = 0

    def chosen() -> Iterator:
        while training.step < steps:
            yield next(batches)

    seconds, _ = train_epoch(training, chosen(), Interruptions())
    return seconds


if __name__ == '__main__':
    main(**vars(arguments))
