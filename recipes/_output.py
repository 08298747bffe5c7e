"""The folder of a run: it can be written, has space, is this run's alone, and holds what the run goes on from."""
import errno
import os
import shutil
import socket
from pathlib import Path
from typing import IO, Any

import _checkpoints
from _accelerator import on_all, on_main
from accelerate import Accelerator

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None
    import msvcrt

LOCK = '.lock'  # nobody else opens it: POSIX gives up a process's lock when it closes the file anywhere
HOLDER = '.holder'  # says who has the lock


def open_output(
        accelerator: Accelerator, output: Path, resume: str | None, model_bytes: int, settings: dict[str, Any],
) -> tuple[IO | None, Path | None, dict[str, Any] | None]:
    """Check that the run can write to `output`, lock it, and find the checkpoint to go on from.

    Args:
        accelerator: Of the run. Its main process decides for all.
        output: Folder of the run.
        resume: 'auto' for its last whole checkpoint (none yet: start anew), the folder of a checkpoint, or None.
        model_bytes: Size of the parameters.
        settings: Of this run, which must be those of the checkpoint.

    Returns:
        The lock, which lasts until it is closed or the process ends; the checkpoint and its progress, or None.

    Raises:
        SystemExit: The folder can't be written, has too little space, is in use, holds another run, or not all
            processes see it; there is no checkpoint to resume from, or it isn't whole, or it is of other settings.
    """
    held = []

    def decide():
        held.append(lock(output))
        checkpoint = choose(output, resume)
        check_space(output, model_bytes)
        return read_holder(output), checkpoint, checkpoint and _checkpoints.read_progress(checkpoint, settings)

    holder, checkpoint, progress = on_main(accelerator, decide)

    def look():
        if read_holder(output) != holder:
            raise OSError(f'{socket.gethostname()} does not see what {holder} has written there')

    on_all(accelerator, f'--output {output} must be one folder on all machines', look)
    return held[0] if held else None, checkpoint, progress


def lock(output: Path) -> IO:
    """Lock a folder, which is made, until the file that comes back is closed or this process ends in whatever way.

    Raises:
        SystemExit: Another process has locked it, or it can't be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = open(output / LOCK, 'ab')
    except OSError as error:
        raise SystemExit(f'--output {output} cannot be written: {error}') from error
    try:
        if fcntl:  # not flock: the processes that load images would inherit its lock, and keep it for seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise SystemExit(f'--output {output} is in use by {read_holder(output)}: name another folder') from error
        print(f'--output {output} cannot be locked ({error}): see to it that no other run writes there', flush=True)
    try:
        with open(output / HOLDER, 'w', encoding='utf-8') as holder:
            holder.write(f'process {os.getpid()} on {socket.gethostname()}')
            holder.flush()
            os.fsync(holder.fileno())  # for the other machines
    except OSError as error:
        raise SystemExit(f'--output {output} cannot be written: {error}') from error
    return file


def read_holder(output: Path) -> str:
    try:
        return (output / HOLDER).read_text(encoding='utf-8')
    except OSError as error:
        return str(error)


def choose(output: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from; None to start anew."""
    checkpoints = output / 'checkpoints'
    try:
        (checkpoints / _checkpoints.UNFINISHED).mkdir(parents=True, exist_ok=True)
        _checkpoints.remove_unfinished(checkpoints)
    except OSError as error:
        raise SystemExit(f'--output {output} cannot be written: {error}') from error
    found = _checkpoints.find(checkpoints)
    if resume is None:
        if found or (output / 'result.json').exists():
            raise SystemExit(f'--output {output} holds another run: name another folder, or go on with --resume auto')
        return None
    if resume != 'auto':
        if problem := _checkpoints.damage(Path(resume)):
            raise SystemExit(f"--resume must be 'auto' or the folder of a whole checkpoint, got {resume}: {problem}")
        return Path(resume)
    for _, checkpoint in sorted(found.items(), reverse=True):
        problem = _checkpoints.damage(checkpoint)
        if problem is None:
            return checkpoint
        print(f'{checkpoint} is damaged and left out: {problem}', flush=True)
    if found:
        raise SystemExit(f'--resume auto: none of the checkpoints in {checkpoints} is whole; remove them to start anew')
    return None


def check_space(output: Path, model_bytes: int) -> None:
    # Weights, averaged weights and at most two optimizer states, in each kept checkpoint and the one being written.
    needed, free = 4 * model_bytes * (_checkpoints.KEPT + 1), shutil.disk_usage(output).free
    # Those that are there already are among them.
    found = _checkpoints.find(output / 'checkpoints')
    taken = sum(path.stat().st_size for folder in found.values() for path in folder.rglob('*'))
    if free + taken < needed:
        raise SystemExit(
            f'--output {output} has {free // 2**20} MiB free, checkpoints need {(needed - taken) // 2**20} MiB')
