"""Records of what was measured: written whole or not at all, with the circumstances they were made under."""
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that every program can read.

    Raises:
        ValueError: A number is NaN or infinite, which JSON has no word for.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding='utf-8'))


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
    """How this process was started, as one would type it."""
    launcher = 'accelerate launch' if 'ACCELERATE_MIXED_PRECISION' in os.environ else 'python'
    return f'{launcher} recipes/{script} {shlex.join(sys.argv[1:])}'.strip()


def git_commit() -> str | None:
    """The checkout's commit, '-dirty' if files differ from it; None outside of one, and without git."""
    command = ['git', 'describe', '--always', '--abbrev=40', '--dirty', '--exclude=*']
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() if found.returncode == 0 else None
