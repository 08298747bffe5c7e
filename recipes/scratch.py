"""Does it pay from scratch?  python recipes/scratch.py [preset] [--network NAME] [--arms ARM ...] [--seeds 3]
[--output FOLDER] [--option of train.py ...]

Trains a static network for small images and its dynamic twins, by the very same recipe for the same number of epochs.
The static one is also trained in more epochs, for as long as FMDConv takes with 4 kernels and with 1. Other arms are
FMDConv with one kernel, without some of its gates, and with other temperatures (`_scratch_arms.py`). First
recipes/_timing.py times the networks in turn.

Leaves timing.json, the runs, <arm>/seed_<n>/, and a picture, and prints their table. The same command goes on where it
was stopped.
"""
import sys

from _scratch_arms import ARMS, Arm, parse_scratch

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_scratch(sys.argv[1:], __doc__)

import dataclasses
from pathlib import Path

import _pictures
import _timing
import torch
from _recipe import Recipe
from _record import read_json
from _runs import run
from _scratch_table import draw, make_table, time_of
from _start import new_network
from accelerate.utils import set_seed

from fmd_timm import set_temperature
from fmd_timm.hub import save_for_hub
from fmd_timm.layers.fmd_conv import FMDAttention


def make_start(recipe: Recipe, arm: Arm, folder: Path) -> str:
    """A network with random weights and what training leaves as it is, saved in a folder: --init for the recipe.

    A gate whose bias is 40 and whose weights are 0 is 1 in float32, and has no gradient.
    """
    set_seed(recipe.seed)
    network = new_network(recipe)
    if arm.hot:
        set_temperature(network, kernel=34.0)
    with torch.no_grad():
        for attention in (module for module in network.modules() if isinstance(module, FMDAttention)):
            gates = zip(('input', 'output'), *(
                parameter.split([attention.in_channels, attention.out_channels])
                for parameter in (attention.gates.weight, attention.gates.bias)))
            for gate, weight, bias in gates:
                if gate in arm.open:
                    weight.zero_()
                    bias.fill_(40.0)
    save_for_hub(network, folder)
    return str(folder)


def recipe_of(arm: Arm, recipe: Recipe, network: str) -> Recipe:
    """What an arm's network is trained by, where nothing has to be measured or made before."""
    kwargs = [*(recipe.model_kwargs or ()), *arm.changes.get('model_kwargs', ())]
    return dataclasses.replace(recipe, **dict(arm.changes, model=arm.model(network), model_kwargs=kwargs or None))


def recipe_of_run(name: str, recipe: Recipe, network: str, seed: int, output: Path) -> Recipe:
    arm = ARMS[name]
    recipe = dataclasses.replace(recipe_of(arm, recipe, network), seed=seed)
    if arm.as_long_as:
        ratio = time_of(read_json(output / 'timing.json'), ARMS[arm.as_long_as])
        recipe = dataclasses.replace(recipe, epochs=round(recipe.epochs * ratio))
    if arm.hot or arm.open:
        start = make_start(recipe, arm, output / name / f'start_{seed}')
        recipe = dataclasses.replace(recipe, model_kwargs=None, init=start)
    return recipe


def main(preset: str, recipe: Recipe, network: str, arms: list[str], seeds: int, output: Path) -> None:
    if not (output / 'timing.json').exists():
        timed = dict.fromkeys(ARMS[name].same_network() for name in ARMS)
        recipes = {name: recipe_of(ARMS[name], recipe, network) for name in timed}
        _timing.time_recipes(preset, dataclasses.replace(recipe, model=network), recipes, output)
    for seed in range(seeds):
        for name in arms:
            run(preset, recipe_of_run(name, recipe, network, seed, output), output / name / f'seed_{seed}')
    print(make_table(output))
    _pictures.save(draw(output), output / 'curves')


if __name__ == '__main__':
    main(**vars(arguments))
