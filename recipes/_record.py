"""Records of what was measured: written whole or not at all, with the circumstances they were made under."""
import datetime
import hashlib
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fmd_timm.scores import ies, rcs

# What an epoch's time depends on, besides the recipe. A CPU's name says how many threads it computed with.
HARDWARE = 'device', 'device_type', 'device_count', 'precision', 'cudnn_benchmark'
SECRET = re.compile(r'\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=://)[^/@\s]+(?=@)')  # a token, a password in an address
SECRET_OPTION = re.compile(r'--?[\w-]*(?:token|secret|password|api-?key)', re.IGNORECASE)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, which takes the place of `path` once it is complete; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}')
    yield unfinished
    unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding='utf-8', newline='\n')


def check_writable(path: Path, option: str) -> None:
    """See that a file can be written, before the work that it is for; makes its folder.

    Raises:
        SystemExit: It can't.
    """
    try:
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open('a').close()  # leaves what is there
        if is_new:
            path.unlink()
    except OSError as error:
        raise SystemExit(f'{option} {path} cannot be written: {error}') from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that every program can read.

    Raises:
        ValueError: A number is NaN or infinite, which JSON has no word for.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def write_for_device(folder: Path, kind: str, record: dict[str, Any]) -> None:
    """Write a record as <device><kind>.json, in the place of the one that was measured on such a device before."""
    device = re.sub(r'[^A-Za-z0-9]+', '_', record['device']).strip('_').lower()
    path = folder / f'{device}{kind}.json'
    write_json(path, record)
    print(f'wrote {path}')


def read_json(path: Path) -> Any:
    """What a file of JSON holds.

    Raises:
        OSError: It can't be read.
        ValueError: It is no JSON, which has no NaN and no infinity either.
    """
    def refuse(constant: str):
        raise ValueError(f'{constant} is not JSON')

    return json.loads(path.read_text(encoding='utf-8'), parse_constant=refuse)


def sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def public(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as records, cards and trackers may have them, see `_public`."""
    return {name: _public(value) if isinstance(value, str) else value for name, value in settings.items()}


def _public(argument: str) -> str:
    """An argument with no token in it, and with the name of a folder elsewhere for its path.

    Where somebody's folders are is nobody's business. A path within the current folder stays: it says where things are
    from a checkout.
    """
    prefix, rest = re.fullmatch('((?:--[^=]*=)?(?:inflated:)?(?:local-dir:)?)(.*)', argument, re.DOTALL).groups()
    path = Path(rest)
    if rest and (path.is_absolute() or '..' in path.parts or path == Path('.')):
        rest = Path(os.path.abspath(path)).name
    return SECRET.sub('***', prefix + rest)


def circumstances(script: str) -> dict[str, Any]:
    """How a record is made: by which command, with which versions and code, and when."""
    return dict(
        command=command_line(script), versions=versions(), git_commit=git_commit(),
        finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
    )


def hardware(accelerator: Accelerator) -> dict[str, Any]:
    """What a record is made on; `cudnn_benchmark`: whether the fastest algorithms were timed and chosen."""
    device, precision = accelerator.device, accelerator.mixed_precision
    return dict(
        device=device_name(device), device_type=device.type, device_count=accelerator.num_processes,
        precision='fp32' if precision == 'no' else precision, cudnn_benchmark=torch.backends.cudnn.benchmark,
    )


def new_leg(accelerator: Accelerator) -> dict[str, Any]:
    """A part of a run: what one start of it trains on, and the seconds of each epoch that it finishes.

    `data_wait_seconds` are those in which the main process waited for images. Its device may have been busy with the
    step before, so it waited for no more than that. `images_on_device` is added: whether they stay there.
    """
    return dict(
        hardware(accelerator), versions=versions(), git_commit=git_commit(), epoch_seconds=[], data_wait_seconds=[])


def training_times(record: dict[str, Any]) -> dict[str, float | None]:
    """Times of training and the scores from them, of the epochs on the hardware that the record names.

    The first epoch of each start is left out: it warms up. All are None where no epoch was trained on that hardware,
    but the run was only finished there.
    """
    legs = [leg for leg in record['legs'] if all(leg[name] == record[name] for name in HARDWARE)]
    epochs = [(leg, list(zip(leg['epoch_seconds'], leg['data_wait_seconds'], strict=True))) for leg in legs]
    warm = sum((of_leg[1:] for _, of_leg in epochs), [])
    # an epoch that another start began, perhaps elsewhere, is of both
    timed = warm or sum((of_leg[1 if leg.get('step') else 0:] for leg, of_leg in epochs), [])
    if not timed:
        return dict.fromkeys(('median_epoch_seconds', 'data_wait_share', 'ies', 'rcs', 'train_images_per_second'))
    seconds, accuracy = statistics.median(seconds for seconds, _ in timed), record['top1'] / 100
    return dict(
        median_epoch_seconds=seconds, data_wait_share=statistics.median(waited / all for all, waited in timed),
        ies=ies(seconds, accuracy), rcs=rcs(seconds, accuracy),
        train_images_per_second=record['steps_per_epoch'] * record['global_batch'] / seconds,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its vectors and threads: a virtual machine hides which EPYC or Xeon it is."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text(errors='replace').splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    name = names[0] if names else platform.processor() or platform.machine()
    return f'{name} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)'


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None of a package that runs without being installed."""
    found = dict(python=platform.python_version())
    for package in 'fmd-timm', 'torch', 'timm', 'accelerate', 'datasets':
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def command_line(script: str) -> str:
    """How this process was started, as one would type it and may publish it."""
    launcher = 'accelerate launch' if 'ACCELERATE_MIXED_PRECISION' in os.environ else 'python'
    arguments, is_secret = [], False
    for argument in sys.argv[1:]:
        option, has_value, _ = argument.partition('=')
        names_secret = SECRET_OPTION.fullmatch(option)
        arguments.append('***' if is_secret else f'{option}=***' if names_secret and has_value else _public(argument))
        is_secret = names_secret and not has_value
    return f'{launcher} recipes/{script} {shlex.join(arguments)}'.strip()


def git_commit() -> str | None:
    """The checkout's commit, '-dirty' if files differ from it; None outside of one, and without git."""
    command = ['git', 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
