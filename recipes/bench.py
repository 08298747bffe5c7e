"""Time dynamic networks against static ones:  python recipes/bench.py [--models resnet18 resnet50] [--layers]

Training steps and inference at 224 px on whatever device there is: timm's static network, ours, ours prepared for
inference, ours by each algorithm alone ('reference' is the authors' way, a grouped convolution over materialised
kernels), and the other methods. All take turns in every round, the order reversed each time; a ratio is the median of
those within the rounds, to the static network in the memory format that is faster. With --layers it times single
layers by each algorithm instead: what the rules in `fmd_timm/ops` are chosen from.

Writes recipes/results/bench/<device>.json (<device>.layers.json). `--table` prints the README's table from all such
files and measures nothing.
"""
import argparse
import contextlib
import datetime
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F
from _measure import synchronize
from _record import command_line, device_name, git_commit, versions
from torch import nn
from tqdm import tqdm

from fmd_timm import FMDConv2d, dynamic_conv2d, prepare_for_inference
from fmd_timm.ops import c_conv, cpu, cuda, hybrid, im2col, per_image, per_kernel, reference

RESULTS = Path(__file__).parent / 'results' / 'bench'
IMAGE_SIZE = 224  # pixels
METHODS = 'fmd', 'od', 'dy', 'cond'
STATIC = 'static', 'static channels_last'
CPU_ALGORITHMS = {
    'reference': reference, 'per_kernel': per_kernel, 'im2col': im2col, 'per_image': per_image, 'hybrid': hybrid,
    'c_conv': c_conv}
CUDA_ALGORITHMS = 'reference', 'per_kernel', 'materialised', 'fused'
WHAT = {  # case of the table -> its label, the variant that it is about
    'train': ('training step', 'fmd'),
    'infer': ('inference', 'fmd prepared'),
}


@contextlib.contextmanager
def algorithm(device: torch.device, name: str | None) -> Iterator[None]:
    """All dynamic convolutions by one algorithm, or by the rules."""
    if name is None:
        yield
    elif device.type == 'cuda':
        with patch.object(cuda, 'choose', lambda *args, **kwargs: name):
            yield
    else:
        with patch.object(cpu, 'choose', lambda **kwargs: CPU_ALGORITHMS[name]):
            yield


def algorithms(device: torch.device, is_forward: bool) -> tuple[str, ...]:
    if device.type == 'cuda':
        return CUDA_ALGORITHMS
    has_native = is_forward and c_conv.is_available()
    return tuple(name for name in CPU_ALGORITHMS if name != 'c_conv' or has_native)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')


def make_images(batch: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)


def train_step(model: nn.Module, images: torch.Tensor) -> None:
    with autocast(images.device):
        loss = model(images).float().square().mean()
    loss.backward()
    model.zero_grad()


@torch.inference_mode()
def infer(model: nn.Module, images: torch.Tensor) -> None:
    with autocast(images.device):
        model(images)


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph: its launches cost no time of the CPU."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def variants(name: str, mode: str, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """What is timed: its name -> one step of it."""
    images = make_images(batch, device)
    of_format = {memory_format: images.contiguous(memory_format=memory_format) for memory_format in (
        torch.contiguous_format, torch.channels_last)}
    step = train_step if mode == 'train' else infer
    runs = {}

    def add(label: str, model: nn.Module, memory_format=torch.channels_last, by: str | None = None) -> None:
        model = model.to(device, memory_format=memory_format).train(mode == 'train')

        def run() -> None:
            with algorithm(device, by):
                step(model, of_format[memory_format])

        runs[label] = captured(run) if device.type == 'cuda' and mode == 'infer' and batch == 1 else run

    add('static', timm.create_model(name), torch.contiguous_format)
    add('static channels_last', timm.create_model(name))
    for method in METHODS:
        add(method, timm.create_model(f'{name}_{method}'))
    if mode == 'infer':
        add('static prepared', prepare_for_inference(timm.create_model(name)))
        add('fmd prepared', prepare_for_inference(timm.create_model(f'{name}_fmd')))
    for by in algorithms(device, mode == 'infer'):
        add(f'fmd by {by}', timm.create_model(f'{name}_fmd'), by=by)
    return runs


def take_turns(
        runs: dict[str, Callable[[], None]], device: torch.device, rounds: int, label: str,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each run in each round, after one that warms up, and the peak memory of the device in MiB."""
    milliseconds, peak = {name: [] for name in runs}, {}
    bar = tqdm(total=(1 + rounds) * len(runs), desc=label, leave=False, mininterval=1)
    repeats = dict.fromkeys(runs, 1)
    for turn in range(1 + rounds):
        for name in runs if turn % 2 else reversed(runs):
            if device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            runs[name]()  # which has its memory and its data in the caches again, after the others
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                runs[name]()
            synchronize(device)
            seconds = (time.perf_counter() - start) / repeats[name]
            if turn:
                milliseconds[name].append(1000 * seconds)
            else:
                repeats[name] = min(max(int(0.3 / seconds), 1), 100)
            if device.type == 'cuda':
                peak[name] = torch.cuda.max_memory_allocated() / 2**20
            bar.update()
    bar.close()
    return milliseconds, peak


def cases(device: torch.device) -> list[tuple[str, int, int]]:
    """Mode, batch and threads of the CPU."""
    if device.type == 'cuda':
        return [('train', 128, 0), ('train', 256, 0), ('infer', 128, 0), ('infer', 1, 0)]
    cores = len(os.sched_getaffinity(0))
    return [('infer', 1, threads) for threads in sorted({1, cores})] + [('infer', 16, cores), ('train', 16, cores)]


def bench_networks(models: list[str], device: torch.device, rounds: int) -> list[dict]:
    results = []
    for name in models:
        for mode, batch, threads in cases(device):
            if threads:
                torch.set_num_threads(threads)
            label = f'{name} {mode} {batch}' + (f' on {threads} threads' if threads else '')
            milliseconds, peak = take_turns(variants(name, mode, batch, device), device, rounds, label)
            results.append(dict(
                model=name, mode=mode, batch=batch, threads=threads or None, milliseconds=milliseconds,
                peak_memory_mib=peak or None))
            print(f'{label}: ' + ', '.join(
                f'{run} {ratio(milliseconds, run):.2f}' for run in milliseconds), flush=True)
    return results


def ratio(milliseconds: dict[str, list[float]], run: str) -> float:
    """Median over the rounds of a run's time against the static network's in the same round."""
    static = min((name for name in milliseconds if name in STATIC), key=lambda name: statistics.median(
        milliseconds[name]))
    return statistics.median(a / b for a, b in zip(milliseconds[run], milliseconds[static]))


def layers_of(name: str) -> list[dict]:
    """The different dynamic convolutions of a network, with the pixels of their input and how often they occur."""
    found = {}

    def note(conv: FMDConv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        layer = dict(
            in_channels=conv.in_channels, out_channels=conv.out_channels, kernel=conv.kernel_size[0],
            stride=conv.stride[0], pixels=inputs[0].shape[-1])
        count = found.setdefault(tuple(layer.values()), dict(layer, count=0))
        count['count'] += 1

    model = timm.create_model(f'{name}_fmd', device='meta')
    for module in model.modules():
        if isinstance(module, FMDConv2d):
            module.register_forward_hook(note)
    model(torch.empty(2, 3, IMAGE_SIZE, IMAGE_SIZE, device='meta'))
    return list(found.values())


def layer_variants(layer: dict, mode: str, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """A static convolution and the dynamic one by each algorithm; 'backward' is forward and backward together."""
    I, O, kernel, K = layer['in_channels'], layer['out_channels'], layer['kernel'], 4
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    make = partial(torch.randn, device=device)
    x = make(batch, I, layer['pixels'], layer['pixels']).to(dtype, memory_format=torch.channels_last)
    weight = make(K * O, I, kernel, kernel).to(memory_format=torch.channels_last)
    attention = make(batch, K).softmax(1), make(batch, I).sigmoid(), make(batch, O).sigmoid()
    conv_args = dict(stride=layer['stride'], padding=kernel // 2)
    one_kernel = weight[:O].to(dtype, memory_format=torch.channels_last)

    def run(convolve: Callable[..., torch.Tensor], *tensors: torch.Tensor, by: str | None = None) -> None:
        if mode == 'backward':
            tensors = [t.detach().requires_grad_() for t in tensors]
        with algorithm(device, by), torch.set_grad_enabled(mode == 'backward'):
            y = convolve(*tensors, **conv_args)
            if mode == 'backward':
                torch.autograd.grad(y, tensors, grad_y)

    with torch.no_grad():
        grad_y = torch.randn_like(F.conv2d(x, one_kernel, **conv_args))
    dynamic = {
        by: partial(run, dynamic_conv2d, x, weight, *attention, by=by)
        for by in algorithms(device, mode == 'forward')}
    return dict(static=partial(run, F.conv2d, x, one_kernel), **dynamic)


def bench_layers(models: list[str], device: torch.device, rounds: int) -> list[dict]:
    batches = (128,) if device.type == 'cuda' else (1, 16)
    results = []
    for name in models:
        for layer in layers_of(name):
            for batch in batches:
                for mode in ('forward', 'backward') if batch > 1 else ('forward',):
                    label = '{in_channels}->{out_channels} {kernel}x{kernel}/{stride} at {pixels}'.format(**layer)
                    label = f'{name} {label}, batch {batch}, {mode}'
                    milliseconds, _ = take_turns(layer_variants(layer, mode, batch, device), device, rounds, label)
                    results.append(dict(model=name, **layer, batch=batch, mode=mode, milliseconds=milliseconds))
                    print(f'{label}: ' + ', '.join(
                        f'{run} {ratio(milliseconds, run):.2f}' for run in milliseconds), flush=True)
    return results


def make_table() -> str:
    """The README's table, in Markdown: ratios of every device's file."""
    lines = []
    for path in sorted(RESULTS.glob('*.json')):
        record = json.loads(path.read_text())
        if record['what'] != 'networks':
            continue
        lines += [
            f'{record["device"]}, {record["precision"]}, torch {record["versions"]["torch"]}, '
            f'median of {record["rounds"]} rounds:', '',
            '| | static | **FMDConv** | FMDConv, grouped convolutions | ODConv | DyConv | CondConv |',
            '|---|---|---|---|---|---|---|',
        ]
        for case in record['cases']:
            mode, chosen = WHAT[case['mode']]
            times = case['milliseconds']
            static = min(statistics.median(times[name]) for name in STATIC)
            threads = f', {case["threads"]} thread{"s" * (case["threads"] > 1)}' if case['threads'] else ''
            ratios = ' | '.join(
                f'{"**" * (run == chosen)}{ratio(times, run):.2f}{"**" * (run == chosen)}'
                for run in (chosen, 'fmd by reference', 'od', 'dy', 'cond'))
            lines.append(f'| {case["model"]}, {mode}, batch {case["batch"]}{threads} | {static:.1f} ms | {ratios} |')
        lines.append('')
    return '\n'.join(lines).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet18', 'resnet50'], help='static networks of timm')
    parser.add_argument('--layers', action='store_true', help='time single layers')
    parser.add_argument('--rounds', type=int, default=5, help='measurements of each (5)')
    parser.add_argument('--table', action='store_true', help="print the README's table")
    args = parser.parse_args()
    if args.table:
        print(make_table())
        return
    if args.rounds < 1:
        raise SystemExit(f'--rounds must be at least 1, got {args.rounds}')
    missing = [name for name in args.models if not all(timm.is_model(f'{name}_{method}') for method in METHODS)]
    if missing:
        raise SystemExit(f'--models must have dynamic forms ({", ".join(METHODS)}), got {", ".join(missing)}')

    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    measured = (bench_layers if args.layers else bench_networks)(args.models, device, args.rounds)
    record = dict(
        what='layers' if args.layers else 'networks', device=device_name(device), device_type=device.type,
        precision='bf16' if device.type == 'cuda' else 'fp32', image_size=IMAGE_SIZE, rounds=args.rounds,
        command=command_line('bench.py'), versions=versions(), git_commit=git_commit(),
        finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'), cases=measured,
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r'[^A-Za-z0-9]+', '_', record['device']).strip('_').lower()
    path = RESULTS / f'{stem}{".layers" if args.layers else ""}.json'
    unfinished = path.with_name(f'.{path.name}')
    unfinished.write_text(json.dumps(record, indent=2) + '\n')
    unfinished.rename(path)
    print(f'wrote {path}')


if __name__ == '__main__':
    main()
