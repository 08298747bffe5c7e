"""Does it pay from scratch?  python recipes/scratch.py [preset] [--network NAME] [--arms ARM ...] [--seeds 3]
[--output FOLDER] [--option of train.py ...]

Trains a static network for small images and its dynamic twins, by the very same recipe for the same number of epochs.
The static one is also trained for as long as FMDConv takes, in more epochs. Other arms are FMDConv with one kernel,
without some of its gates, and with other temperatures (`_scratch_arms.py`). First recipes/_timing.py times the networks
in turn.

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


def recipe_of(name: str, arm: Arm, recipe: Recipe, network: str, seed: int, output: Path) -> Recipe:
    """What a run of an arm is trained by."""
    kwargs = [*(recipe.model_kwargs or ()), *arm.changes.get('model_kwargs', ())]
    recipe = dataclasses.replace(
        recipe, **dict(arm.changes, model=arm.model(network), model_kwargs=kwargs or None, seed=seed))
    if name == 'static_time':
        ratio = time_of(read_json(output / 'timing.json'), ARMS['fmd'].model(network))
        recipe = dataclasses.replace(recipe, epochs=round(recipe.epochs * ratio))
    if arm.hot or arm.open:
        start = make_start(recipe, arm, output / name / f'start_{seed}')
        recipe = dataclasses.replace(recipe, model_kwargs=None, init=start)
    return recipe


def main(preset: str, recipe: Recipe, network: str, arms: list[str], seeds: int, output: Path) -> None:
    if not (output / 'timing.json').exists():
        models = list(dict.fromkeys(arm.model(network) for arm in ARMS.values()))
        _timing.main(preset, dataclasses.replace(recipe, model=network), models, output)
    for seed in range(seeds):
        for name in arms:
            run(preset, recipe_of(name, ARMS[name], recipe, network, seed, output), output / name / f'seed_{seed}')
    print(make_table(output))
    _pictures.save(draw(output), output / 'curves')


if __name__ == '__main__':
    main(**vars(arguments))
