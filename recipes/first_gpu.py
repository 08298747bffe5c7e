"""Try everything on a GPU and write down what it does:  python recipes/first_gpu.py [--output gpu_report.md]

The operator's tests, a first training step from cold, single layers and whole networks timed, digits on one GPU and on
two. It takes about an hour and needs the checkout with its tests. Whatever fails is part of the report, which is
written after each section. `--dry-run` does all of it on the CPU in a few minutes, with small networks and images:
that tests this script and says nothing about a GPU.
"""
import sys
from pathlib import Path

from _arguments import parse_first_gpu

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_first_gpu(sys.argv[1:], __doc__)

import json
import os
import shutil
import subprocess
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import timm
import torch
import torch.nn.functional as F
from _measure import synchronize
from torch import nn
from torch.utils import collect_env

import fmd_timm
from fmd_timm.ops import fastest

ROOT = Path(__file__).parents[1]
DRY_RUN = '**A dry run on the CPU: it tests this script. Nothing in it is a statement about any GPU.**'
SANITIZED = 'test_result_and_gradients and 3x3'  # the tests that run under compute-sanitizer, which is slow
STEPS = 3


@dataclass
class Trial:
    """One run of this script."""
    device: torch.device
    folder: Path  # for what the commands write
    warnings: list[str] = field(default_factory=list)

    @property
    def is_dry(self) -> bool:
        return self.device.type == 'cpu'

    def run(self, *command: str | Path, **environment: str) -> str:
        """What a command prints, in Markdown; its warnings are noted.

        Raises:
            RuntimeError: It failed; with the end of what it printed.
        """
        words = [*map(str, command)]
        print(f'$ {" ".join(words)}', flush=True)
        paths = os.pathsep.join([*map(str, (ROOT, ROOT / 'recipes')), os.environ.get('PYTHONPATH', '')])
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace',
            env=dict(os.environ, PYTHONPATH=paths, **environment))
        lines = []
        for line in process.stdout:
            if line.strip() and '%|' not in line:  # a progress bar
                print(line, end='', flush=True)
                lines.append(line.rstrip())
        self.warnings += [line for line in lines if 'Warning' in line or 'WARNING' in line]
        shown = quoted([f'$ {" ".join(words)}', *lines[-60:]])
        if process.wait():
            raise RuntimeError(f'exit code {process.returncode}\n\n{shown}')
        return shown


def quoted(lines: list[str]) -> str:
    return '\n'.join(['```', *lines, '```'])


def table(head: list[str], rows: list[list]) -> str:
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in [head, ['---'] * len(head), *rows])


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Mean of some runs, after two that warm up."""
    run(), run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def describe_device(trial: Trial) -> str:
    size, rows = (2**10, []) if trial.is_dry else (2**13, [])
    if not trial.is_dry:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            rows.append([
                f'GPU {index}', f'{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} SMs, '
                f'{gpu.total_memory / 2**30:.0f} GiB'])
    source = torch.empty(16 * size**2, dtype=torch.uint8, device=trial.device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), trial.device)
    rows.append(['copy, read and written', f'{2 * source.numel() / seconds / 1e12:.2f} TB/s'])
    matrix = torch.randn(size, size, device=trial.device).to(half_precision(trial.device))
    seconds = seconds_of(lambda: matrix @ matrix, trial.device)
    rows.append([f'{size} x {size} matrices, {matrix.dtype}', f'{2 * size**3 / seconds / 1e12:.1f} TFLOP/s'])
    return table(['', ''], rows)


def half_precision(device: torch.device) -> torch.dtype:
    is_emulated = device.type == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if is_emulated else torch.bfloat16


def describe_environment(trial: Trial) -> str:
    found = collect_env.get_env_info()
    names = (
        'os', 'libc_version', 'python_version', 'torch_version', 'cuda_compiled_version', 'cuda_runtime_version',
        'cudnn_version', 'nvidia_driver_version', 'nvidia_gpu_models', 'pip_packages')
    lines = [f'{name}: {value}' for name in names if (value := getattr(found, name))]
    lines += [f'timm: {timm.__version__}', f'fmd_timm: {fmd_timm.__version__}']
    commit = trial.run('git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    return f'{commit}\n\n{quoted(lines)}'


def take_first_steps(trial: Trial) -> str:
    """Seconds of the first steps, with nothing compiled yet, and what was chosen for each convolution."""
    name, pixels, batch = ('resnet18_fmd_cifar', 16, 4) if trial.is_dry else ('resnet18_fmd', 224, 128)
    model = timm.create_model(name).to(trial.device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, pixels, pixels, device=trial.device).to(memory_format=torch.channels_last)
    rows = []
    for label, is_timed in ('in order', False), ('timed', True):
        with torch.backends.cudnn.flags(enabled=True, benchmark=is_timed), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            seconds = [train_step(model, images) for _ in range(STEPS)]
        trial.warnings += [str(warning.message) for warning in said]
        peak = '' if trial.is_dry else f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB'
        rows.append([label, *(f'{s:.3f} s' for s in seconds), peak])
    head = [f'{name}, batch {batch} at {pixels} px', *(f'step {number + 1}' for number in range(STEPS)), 'peak']
    chosen = [
        [question, f'{case.in_channels} to {case.out_channels}', *(
            'x'.join(map(str, pair)) for pair in (case.kernel_size, case.stride, case.image_size)), short(algorithm)]
        for (question, case, *_), algorithm in fastest._chosen.items()]
    head_chosen = ['', 'channels', 'kernel', 'stride', 'image', 'chosen']
    return f'{table(head, rows)}\n\n{table(head_chosen, chosen)}'


def short(algorithm) -> str:
    return algorithm.__name__.rpartition('.')[2]


def train_step(model: nn.Module, images: torch.Tensor) -> float:
    """The seconds of one."""
    synchronize(images.device)
    start = time.perf_counter()
    with torch.autocast(images.device.type, half_precision(images.device)):
        loss = F.cross_entropy(model(images).float(), torch.zeros(len(images), dtype=torch.long, device=images.device))
    loss.backward()
    model.zero_grad()
    synchronize(images.device)
    return time.perf_counter() - start


def check_operator(trial: Trial) -> str:
    which = ['-k', 'each_algorithm'] if trial.is_dry else ['-m', 'slow or not slow', '-k', 'not interpreter']
    return trial.run(
        sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-rs', 'tests/ops/test_cuda.py',
        'tests/ops/test_triton.py', *which)


def sanitize(trial: Trial) -> str:
    sanitizer = shutil.which('compute-sanitizer')
    if sanitizer is None:
        return 'Not done: compute-sanitizer is not installed.'
    return trial.run(
        sanitizer, '--error-exitcode', '99', sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
        'tests/ops/test_triton.py', '-k', SANITIZED, PYTORCH_NO_CUDA_MEMORY_CACHING='1')


def bench(trial: Trial, *options: str) -> str:
    if not trial.is_dry:
        return trial.run(sys.executable, 'recipes/bench.py', *options)
    # Small, and not among the results, where a dry run would take the place of what was measured.
    small = (
        'import pathlib, sys, bench\n'
        'of = bench.layers_of\n'
        f'bench.IMAGE_SIZE, bench.RESULTS = 32, pathlib.Path({str(trial.folder)!r})\n'
        'bench.layers_of = lambda name: of(name)[:1]\n'
        'bench.main(**vars(bench.parse_bench(sys.argv[1:])))'
    )
    return trial.run(sys.executable, '-c', small, '--models', 'resnet18', '--rounds', '1', *options)


def bench_layers(trial: Trial) -> str:
    shown = bench(trial, '--layers')
    written = [Path(line.removeprefix('wrote ')) for line in shown.splitlines() if line.startswith('wrote ')]
    rows = []
    for case in (case for path in written for case in json.loads(path.read_text())['cases']):
        times = {name: min(milliseconds) for name, milliseconds in case['milliseconds'].items()}
        static, *dynamic = times
        best = min(dynamic, key=times.get)
        layer = '{in_channels}->{out_channels} {kernel}x{kernel}/{stride} at {pixels}'.format(**case)
        rows.append([
            case['mode'], case['batch'], layer, f'{times[static]:.3f} ms',
            *(f'{name} {times[name] / times[static]:.2f}' for name in (dynamic[0], best))])
    head = ['', 'batch', 'layer', 'static', 'first of the order', 'fastest']
    return f'{table(head, rows)}\n\n{shown}'


def bench_networks(trial: Trial) -> str:
    return bench(trial)


def train_digits(trial: Trial) -> str:
    """The same training on one and on two processes, with averaged weights."""
    rows = []
    for processes in 1, 2:
        if not trial.is_dry and torch.cuda.device_count() < processes:
            rows.append([processes, f'not done: {torch.cuda.device_count()} GPU', '', ''])
            continue
        output = trial.folder / f'digits_{processes}'
        launcher = ['--cpu', '--num_cpu_threads_per_process', '1'] if trial.is_dry else []
        options = ['--epochs', '1', '--warmup-epochs', '0'] if trial.is_dry else []
        trial.run(
            sys.executable, '-m', 'accelerate.commands.launch', '--num_machines', '1', '--mixed_precision', 'no',
            '--dynamo_backend', 'no', '--num_processes', str(processes), *launcher, 'recipes/train.py', 'digits',
            '--ema-decay', '0.99', '--tracker', 'none', '--output', output, *options)
        result = json.loads((output / 'result.json').read_text())
        rows.append([processes, *(result[name] for name in ('top1', 'loss', 'device'))])
    return table(['processes', 'top-1 in percent', 'loss', ''], rows)


def list_warnings(trial: Trial) -> str:
    return quoted(list(dict.fromkeys(trial.warnings))) if trial.warnings else 'None.'


SECTIONS = {
    'Device': describe_device,
    'First steps': take_first_steps,  # before other sections compile anything
    'Environment': describe_environment,
    'Tests of the operator': check_operator,
    'compute-sanitizer': sanitize,
    'Single layers': bench_layers,
    'Networks': bench_networks,
    'Digits on one GPU and on two': train_digits,
    'Warnings': list_warnings,
}


def main(output: Path, dry_run: bool) -> None:
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit(
            f'torch {torch.__version__} sees no GPU; --dry-run tries this script on the CPU')
    title = f'# {"Dry run" if dry_run else torch.cuda.get_device_name()}'
    parts, failed = [DRY_RUN if dry_run else title], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ['TRITON_CACHE_DIR'] = str(Path(folder, 'triton'))  # so that all is compiled anew
        trial = Trial(torch.device('cpu' if dry_run else 'cuda'), Path(folder))
        for name, section in SECTIONS.items():
            print(f'\n== {name}', flush=True)
            try:
                body = section(trial)
            except Exception as error:  # the rest is worth as much
                failed.append(name)
                told = str(error) if isinstance(error, RuntimeError) else quoted([traceback.format_exc()])
                body = f'**Failed.** {told}'
            parts.append(f'## {name}\n\n{body}')
            output.write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
    print(f'\nwrote {output}' + (f'; failed: {", ".join(failed)}' if failed else ''))
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    main(**vars(arguments))
