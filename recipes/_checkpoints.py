"""Checkpoints of a training run: written beside their place and renamed, found again, and checked before use."""
import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

KEPT = 2  # the last ones; the best is kept besides


def check_output(output: Path, resume: str | None, model_bytes: int) -> Path | None:
    """Check that results can be written to `output`, and find the checkpoint to resume from.

    Args:
        output: Folder of the run.
        resume: 'auto' for its last checkpoint (none yet: start anew), the folder of a checkpoint, or None to start.
        model_bytes: Size of the parameters.
    """
    checkpoints = output / 'checkpoints'
    probe = checkpoints / f'.writable-{os.getpid()}'
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SystemExit(f'--output {output} cannot be written: {error}') from error
    # Weights, averaged weights and at most two optimizer states, in each kept checkpoint and the one being written.
    needed, free = 4 * model_bytes * (KEPT + 2), shutil.disk_usage(output).free
    if free < needed:
        raise SystemExit(f'--output {output} has {free // 2**20} MiB free, checkpoints need {needed // 2**20} MiB')
    found = sorted(checkpoints.glob('epoch_*'))
    if resume == 'auto':
        return found[-1] if found else None
    if resume is not None:
        if not (Path(resume) / 'progress.json').is_file():
            raise SystemExit(f"--resume must be 'auto' or the folder of a checkpoint with progress.json, got {resume}")
        return Path(resume)
    if found or (output / 'result.json').exists():
        raise SystemExit(f'--output {output} holds another run: name another folder, or go on with --resume auto')
    return None


def read_progress(checkpoint: Path, settings: dict) -> dict:
    """The checkpoint's progress.json; refuses one whose settings are others."""
    progress = json.loads((checkpoint / 'progress.json').read_text())
    for name, value in settings.items():
        theirs = progress['settings'].get(name)
        if theirs != value:
            raise SystemExit(f'--resume {checkpoint} is of a run with {name} {theirs!r}, this one has {value!r}')
    return progress


def save(accelerator: Accelerator, checkpoints: Path, progress: dict) -> None:
    """Save the accelerator's state and `progress` (JSON), and drop the checkpoints no longer kept."""
    folder = checkpoints / _name(progress['epochs_done'])
    unfinished = checkpoints / f'.{folder.name}'
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / 'progress.json').write_text(json.dumps(progress, indent=2))
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was then resumed from an earlier one
        unfinished.rename(folder)
        saved = sorted(checkpoints.glob('epoch_*'))
        for old in saved[:-KEPT]:
            if old.name != _name(progress['best_epoch']):
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _name(epoch: int) -> str:
    return f'epoch_{epoch:04d}'
