"""Compare the methods with the static network:  accelerate launch recipes/compare.py <preset> [--models NAME ...]
[--seeds 3] [--output FOLDER] [--option value ...]

Trains each model with the very same recipe, which is the preset's but for the options of `recipes/train.py` that are
given here too. First `recipes/_timing.py` times all models in turn, which also finds what can't run before hours of
training; then the models train one after the other, seed by seed, each run in a process of its own. The output folder
gets `timing.json`, the runs in `<model>/seed_<n>/`, and from their records `comparison.json`, `table.md` and the
pictures `training` and `inference` (PNG and SVG).

The same command goes on where it was stopped: finished runs are kept, an interrupted one resumes from its checkpoint. A
run that fails does not end the others. The checkpoints of a finished run are removed.
"""
import sys

from _arguments import parse_compare
from _interruptions import SIGNALS, end_with_launcher

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_compare(sys.argv[1:], __doc__)
    end_with_launcher()

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import _report
import timm
import torch
from _accelerator import runs_on_cuda, use_all_cores
from _output import lock
from _recipe import Recipe
from _record import device_name, public, versions
from _start import check_names, first_dynamic
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

RECIPES = Path(__file__).parent


def static_first(models: list[str]) -> list[str]:
    """The models, the one without dynamic convolutions first."""
    static = [name for name in models if first_dynamic(timm.create_model(name, device='meta')) is None]
    if len(static) != 1:
        raise SystemExit(
            f'--models must hold exactly one static network, which the others are compared with, got '
            f'{" and ".join(static) or "none"} among {", ".join(models)}'
        )
    return sorted(models, key=lambda name: name != static[0])


def run_recipe(state: PartialState, script: str, arguments: list[str]) -> bool:
    """Run a recipe in a process of its own beside each of ours, as `accelerate launch` would; False if one failed.

    So the peak memory of a run is its own, and what ends a run, a lack of memory say, does not end the comparison.
    """
    environment = dict(os.environ)
    if state.num_processes > 1:  # they meet at a port of their own: the launcher's is where we have met
        port = [None]
        if state.is_main_process:
            with socket.socket() as free:
                free.bind(('', 0))
                port = [free.getsockname()[1]]
        broadcast_object_list(port)
        environment |= dict(MASTER_PORT=str(port[0]), TORCHELASTIC_USE_AGENT_STORE='False')
    child = subprocess.Popen([sys.executable, RECIPES / script, *arguments], env=environment)
    try:
        codes = [None]
        while None in codes and not any(codes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1)
            codes = gather_object([child.poll()])
    finally:  # where another process failed, or this one is told to stop: training then saves where it is
        child.terminate()
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:  # it waits for the process that failed
            child.kill()
            child.wait()
    return not any(codes)


def main(preset: str, recipe: Recipe, models: list[str], seeds: int, output: Path, shared: list[str]) -> None:
    # What can be refused at once; recipes/_timing.py refuses the rest
    for name in models:
        check_names(dataclasses.replace(recipe, model=name))
    models = static_first(models)
    state = PartialState(cpu=True)  # it only starts and watches others: the GPU is theirs
    use_all_cores(state)
    device = torch.device('cuda', state.local_process_index) if runs_on_cuda() else state.device
    found = _report.read_records(output)
    if found:
        here = dict(
            next(iter(found.values())), recipe=public(dataclasses.asdict(recipe)), device=device_name(device),
            device_count=state.num_processes, versions=versions())
        _report.check_comparable({Path('this run'): here, **found})
    held = lock(output) if state.is_main_process else None
    state.wait_for_everyone()
    for number in SIGNALS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # and so end the child

    timed = found.get(output / 'timing.json', {}).get('models', [])
    if timed != models and not run_recipe(
            state, '_timing.py', [*shared, '--models', *models, '--output', str(output)]):
        raise SystemExit('a model could not be timed, and none was trained: see the error above')

    runs = [(name, seed, output / name / f'seed_{seed}') for seed in range(seeds) for name in models]
    failed = []
    for i, (name, seed, folder) in enumerate(runs, 1):
        if (folder / 'result.json').exists():
            continue
        state.print(f'run {i} of {len(runs)}: {name}, seed {seed}', flush=True)
        arguments = ['--model', name, '--seed', str(seed), '--output', str(folder), '--resume', 'auto']
        if not run_recipe(state, 'train.py', [*shared, *arguments]):
            failed.append(f'{name} with seed {seed}')
        elif state.is_main_process:
            shutil.rmtree(folder / 'checkpoints')
    if state.is_main_process:
        print(_report.write(output))
    if failed:
        raise SystemExit(f'failed, and left out of the table: {", ".join(failed)}; the same command tries again')
    if held:
        held.close()
    state.destroy_process_group()


if __name__ == '__main__':
    main(**vars(arguments))
