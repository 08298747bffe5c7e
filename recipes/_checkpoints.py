"""Checkpoints of a training run: written beside their place and renamed, found again, and checked before use.

A checkpoint is `<output>/checkpoints/epoch_<n>`, with n epochs done, or `epoch_<n>_step_<s>` where s steps of the next
one are done too. What else is in that folder is left alone. Its `manifest.json`, which is written last, has size and
sha256 of every file. Reading a checkpoint runs no code from it: weights, averaged ones too, are safetensors, progress
is JSON, and accelerate reads the states of optimizer and random generators with `weights_only`.
"""
import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
from _accelerator import on_all
from _data import LabelledImages
from _record import read_json, sha256, write_json
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from timm.utils import ModelEmaV3

KEPT = 2  # the last ones: one could be damaged
AVERAGED, PROGRESS, MANIFEST = 'averaged.safetensors', 'progress.json', 'manifest.json'
MPS_STATE = 'mps_random_state.safetensors'  # which accelerate leaves out
UNFINISHED, REPLACED = '.unfinished', '.replaced'  # what is being written, what is taken away


def find(checkpoints: Path) -> dict[tuple[int, int], Path]:
    """The checkpoints in the folder by their epochs and steps."""
    return {
        (int(match[1]), int(match[2] or 0)): path for path in checkpoints.iterdir()
        if (match := re.fullmatch(r'epoch_(\d+)(?:_step_(\d+))?', path.name)) and path.is_dir()}


def name_of(progress: dict[str, Any]) -> str:
    name = f'epoch_{progress["epochs_done"]:04d}'
    return f'{name}_step_{progress["step"]:06d}' if progress['step'] else name


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are what was written, all of them and no others."""
    try:
        expected = {name: (size, digest) for name, size, digest in read_json(checkpoint / MANIFEST)['files']}
    except FileNotFoundError:
        return f'it has no {MANIFEST}'
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f'{MANIFEST} cannot be read ({type(error).__name__}: {error})'
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f'{name} is missing'
        if path.stat().st_size != size:
            return f'{name} has {path.stat().st_size} bytes, {size} were written'
        if sha256(path) != digest:
            return f'{name} has changed since it was written'
    others = {path.name for path in checkpoint.iterdir() if path.name[0] != '.'} - {*expected, MANIFEST}
    return f'{min(others)} does not belong to it' if others else None


def read_progress(checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The progress of a whole checkpoint; refuses one whose settings are others."""
    progress = read_json(checkpoint / PROGRESS)
    for name, value in settings.items():
        theirs = progress['settings'].get(name)
        if theirs != value:
            raise SystemExit(f'--resume {checkpoint} is of a run with {name} {theirs!r}, this one has {value!r}')
    return progress


def check_images(
        checkpoint: Path | None, theirs: dict[str, Any] | None, images: dict[str, LabelledImages]) -> dict[str, Any]:
    """What the images are, wherever they are: the same for all processes and in every part of a run.

    Args:
        checkpoint: That the run goes on from, if it does.
        theirs: What this function returned in the run of the checkpoint.
        images: Of each part.

    Raises:
        SystemExit: They aren't those of the checkpoint.
    """
    ours = {
        part: dict(
            split=of.split, number=len(of), label_names=of.label_names,
            labels_sha256=of.labels_sha256(),
        ) for part, of in images.items()}
    for part in ours if theirs else ():
        for name, value in ours[part].items():
            if theirs[part][name] != value:
                raise SystemExit(
                    f'--resume {checkpoint} is of a run on other images: its {part} images have {name} '
                    f'{theirs[part][name]}, these have {value}')
    return ours


def load(accelerator: Accelerator, checkpoint: Path, ema: ModelEmaV3 | None) -> None:
    """Load what `save` saved.

    Raises:
        SystemExit: It can't be read.
    """
    processes = len(list(checkpoint.glob('random_states_*.pkl')))
    if processes != accelerator.num_processes:
        accelerator.print(f'{checkpoint} is of {processes} processes: on {accelerator.num_processes} the run goes on '
                          f'with other random numbers')

    def read():
        random_states = checkpoint / f'random_states_{accelerator.process_index}.pkl'
        if random_states.exists():
            accelerate.utils.load(random_states)  # which load_state keeps quiet about where it can't
        accelerator.load_state(str(checkpoint))
        if accelerator.device.type == 'mps' and (checkpoint / MPS_STATE).exists():
            torch.mps.set_rng_state(load_file(checkpoint / MPS_STATE)['state'])
        if ema:
            load_model(ema.module, checkpoint / AVERAGED)

    on_all(accelerator, f'--resume {checkpoint} could not be loaded', read)


def save(accelerator: Accelerator, checkpoints: Path, progress: dict[str, Any], ema: ModelEmaV3 | None) -> Path:
    """Save the accelerator's state, the averaged weights and `progress`, and drop the checkpoints no longer kept.

    Raises:
        SystemExit: It can't be written. Older ones are as they were.
    """
    def write_state(folder: Path):
        accelerator.save_state(str(folder))
        if accelerator.device.type == 'mps':
            save_file(dict(state=torch.mps.get_rng_state()), folder / MPS_STATE)
        if ema and accelerator.is_main_process:
            save_model(ema.module, str(folder / AVERAGED))

    return write(accelerator, checkpoints, progress, write_state)


def write(
        accelerator: Accelerator, checkpoints: Path, progress: dict[str, Any], write_state: Callable[[Path], None],
) -> Path:
    """Write a checkpoint: what `write_state` writes into a folder, which it makes, on every process, and `progress`.

    Raises:
        SystemExit: It can't be written. Older ones are as they were.
    """
    unfinished, folder = checkpoints / UNFINISHED, checkpoints / name_of(progress)
    failed = f'the checkpoint {folder} could not be written, older ones are whole'

    def finish():
        write_json(unfinished / PROGRESS, progress)
        write_manifest(unfinished)
        if folder.exists():  # of a run that was then resumed from an earlier one
            folder.replace(checkpoints / REPLACED)
        unfinished.replace(folder)
        sync(checkpoints)
        drop_old(checkpoints, progress)

    try:
        on_all(accelerator, failed, lambda: remove_unfinished(checkpoints), main_only=True)
        on_all(accelerator, failed, lambda: write_state(unfinished))
        on_all(accelerator, failed, finish, main_only=True)
    except SystemExit:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def write_manifest(folder: Path) -> None:
    """All files of the checkpoint are on the disk before the manifest says so."""
    files = sorted(folder.iterdir())
    for path in files:
        sync(path)
    write_json(folder / MANIFEST, dict(files=[(path.name, path.stat().st_size, sha256(path)) for path in files]))
    sync(folder / MANIFEST)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk; Windows and some network disks can't for folders."""
    is_folder = path.is_dir()
    with contextlib.suppress(OSError) if is_folder else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop_old(checkpoints: Path, progress: dict[str, Any]) -> None:
    """Keep the one just written and the last before it; later ones stay, of a run that was resumed from an earlier."""
    found, present = find(checkpoints), (progress['epochs_done'], progress['step'])
    for old in sorted(key for key in found if key < present)[:1 - KEPT]:
        shutil.rmtree(found[old])
    remove_unfinished(checkpoints)


def remove_unfinished(checkpoints: Path) -> None:
    for name in UNFINISHED, REPLACED:
        if (checkpoints / name).exists():
            shutil.rmtree(checkpoints / name)
