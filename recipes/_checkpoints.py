"""Checkpoints of a training run: written beside their place and renamed, found again, and checked before use.

A checkpoint is `<output>/checkpoints/epoch_<n>`. What else is in that folder is left alone. Reading a checkpoint runs
no code from it: weights, averaged ones too, are safetensors, progress is JSON, and accelerate reads the states of
optimizer and random generators with `weights_only`.
"""
import os
import re
import shutil
from pathlib import Path

from _record import read_json, write_json
from accelerate import Accelerator
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3

KEPT = 2  # the last ones; the best is kept besides
AVERAGED = 'averaged.safetensors'


def check_output(output: Path, resume: str | None, model_bytes: int) -> Path | None:
    """Check that results can be written to `output`, and find the checkpoint to resume from.

    Args:
        output: Folder of the run.
        resume: 'auto' for its last checkpoint (none yet: start anew), the folder of a checkpoint, or None to start.
        model_bytes: Size of the parameters.

    Raises:
        SystemExit: The folder can't be written, has too little space or holds another run, or there is no checkpoint.
    """
    checkpoints = output / 'checkpoints'
    probe = checkpoints / f'.writable-{os.getpid()}'
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(f'--output {output} cannot be written: {error}') from error
    found = find(checkpoints)
    # Weights, averaged weights and at most two optimizer states, in each kept checkpoint and the one being written.
    needed, free = 4 * model_bytes * (KEPT + 2), shutil.disk_usage(output).free
    # Those that are there already are among them.
    taken = sum(path.stat().st_size for folder in found.values() for path in folder.rglob('*'))
    if free + taken < needed:
        raise SystemExit(
            f'--output {output} has {free // 2**20} MiB free, checkpoints need {(needed - taken) // 2**20} MiB')
    if resume == 'auto':
        return found[max(found)] if found else None
    if resume is not None:
        if not (Path(resume) / 'progress.json').is_file():
            raise SystemExit(f"--resume must be 'auto' or the folder of a checkpoint with progress.json, got {resume}")
        return Path(resume)
    if found or (output / 'result.json').exists():
        raise SystemExit(f'--output {output} holds another run: name another folder, or go on with --resume auto')
    return None


def find(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in the folder by their epoch."""
    return {
        int(match[1]): path for path in checkpoints.iterdir()
        if (match := re.fullmatch(r'epoch_(\d+)', path.name)) and path.is_dir()}


def read_progress(checkpoint: Path, settings: dict) -> dict:
    """The checkpoint's progress.json; refuses one whose settings are others."""
    progress = read_json(checkpoint / 'progress.json')
    for name, value in settings.items():
        theirs = progress['settings'].get(name)
        if theirs != value:
            raise SystemExit(f'--resume {checkpoint} is of a run with {name} {theirs!r}, this one has {value!r}')
    return progress


def load(accelerator: Accelerator, checkpoint: Path, ema: ModelEmaV3 | None) -> None:
    accelerator.load_state(str(checkpoint))
    if ema:
        load_model(ema.module, checkpoint / AVERAGED)


def save(accelerator: Accelerator, checkpoints: Path, progress: dict, ema: ModelEmaV3 | None) -> None:
    """Save the accelerator's state, the averaged weights and `progress`, and drop the checkpoints no longer kept."""
    epoch = progress['epochs_done']
    folder = checkpoints / f'epoch_{epoch:04d}'
    unfinished = checkpoints / f'.{folder.name}'
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if ema:
            save_model(ema.module, str(unfinished / AVERAGED))
        write_json(unfinished / 'progress.json', progress)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was then resumed from an earlier one
        unfinished.replace(folder)
        for old, path in find(checkpoints).items():
            if old <= epoch - KEPT and old != progress['best_epoch']:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()
