"""Runs that are part of an experiment: each is trained once, and its record is what counts."""
import dataclasses
import shutil
from pathlib import Path
from typing import Any

from _recipe import Recipe
from _record import public, read_json
from train import main as train


def run(preset: str, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The record of a run; of one that is finished already, or that goes on from where it was stopped."""
    if not (folder / 'result.json').exists():
        print(f'{folder}:', flush=True)
        train(preset, recipe, folder, 'auto')
        shutil.rmtree(folder / 'checkpoints')
    record = read_json(folder / 'result.json')
    if record['recipe'] != public(dataclasses.asdict(recipe)):
        raise SystemExit(f'{folder} holds a run with other settings: name another --output')
    return record
