"""Time dynamic networks against static ones:  python recipes/bench.py [--models resnet18 resnet50] [--layers]

Or the images of a recipe, without training:  python recipes/bench.py --data imagenet [--dataset FOLDER ...]
Or exported networks in other runtimes:  python recipes/bench.py --edge [--models resnet18 ...]

Training steps and inference at 224 px on whatever device there is: timm's static network, ours, ours prepared for
inference, ours as the authors compute it (a grouped convolution over the kernels of all images), and the other methods.
'timed' is with `torch.backends.cudnn.benchmark`, which has each convolution take the algorithm that is fastest here;
the rest is without. All take turns in every round, the order reversed each time; a ratio is the median of those within
the rounds, to the static network in the memory format that is faster. With --layers it times single convolutions by
each algorithm instead.

Writes recipes/results/bench/<device>.<model>.json (<device>.<model>.layers.json), and with --results-file the columns
of timm's benchmark.py. `--table` prints the documentation's table from all such files and measures nothing.
"""
import sys

from _arguments import METHODS, parse_bench

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_bench(sys.argv[1:], __doc__)

import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path

import _bench_data
import _bench_edge
import timm
import torch
import torch.nn.functional as F
from _accelerator import usable_cores
from _record import check_writable, circumstances, device_name, read_json, write_for_device
from _results_file import benchmark_rows, write_results
from _turns import STATIC, ratio, take_turns
from torch import nn

from fmd_timm import DynamicConv2d, prepare_for_inference
from fmd_timm.ops import im2col, per_image, per_kernel, reference
from fmd_timm.ops.case import Attention, case_of
from fmd_timm.ops.operator import algorithms

RESULTS = Path(__file__).parent / 'results' / 'bench'
IMAGE_SIZE = 224  # pixels
WHAT = {  # case of the table -> its label, the variant that it is about
    'train': ('training step', 'fmd timed'),
    'infer': ('inference', 'fmd prepared'),
}


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')


def make_images(batch: int, device: torch.device) -> torch.Tensor:
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)


def make_network(name: str, method: str | None = None, **kwargs) -> nn.Module:
    """timm's network, or the one with dynamic convolutions: by its name, or as `make_dynamic` makes it."""
    if method is None:
        return timm.create_model(name, **kwargs)
    if timm.is_model(f'{name}_{method}'):
        return timm.create_model(f'{name}_{method}', **kwargs)
    return timm.create_model('dynamic_cnn', static=name, dynamic=method, **kwargs)


def train_step(model: nn.Module, images: torch.Tensor) -> None:
    with autocast(images.device):
        loss = model(images).float().square().mean()
    loss.backward()
    model.zero_grad()


@torch.inference_mode()
def infer(model: nn.Module, images: torch.Tensor) -> None:
    with autocast(images.device):
        model(images)


def as_the_authors(model: nn.Module) -> nn.Module:
    """Its dynamic convolutions by the reference, differentiated by PyTorch."""
    def forward(conv: DynamicConv2d, x: torch.Tensor) -> torch.Tensor:
        attention = Attention(*conv.attention(x))
        case = case_of(x, conv.weight, attention, conv.stride, conv.padding, conv.dilation, conv.groups)
        return reference.forward(x, conv.weight, attention, case)

    for module in model.modules():
        if isinstance(module, DynamicConv2d):
            module.forward = partial(forward, module)
    return model


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

    def add(label: str, model: nn.Module, memory_format=torch.channels_last, timed: bool = False) -> None:
        model = model.to(device, memory_format=memory_format).train(mode == 'train')

        def run() -> None:
            with torch.backends.cudnn.flags(enabled=True, benchmark=timed):
                step(model, of_format[memory_format])

        runs[label] = captured(run) if device.type == 'cuda' and mode == 'infer' and batch == 1 else run

    add('static', make_network(name), torch.contiguous_format)
    add('static channels_last', make_network(name))
    add('fmd', make_network(name, 'fmd'))
    for method in METHODS:
        add(f'{method} timed', make_network(name, method), timed=True)
    if mode == 'infer':
        add('static prepared', prepare_for_inference(make_network(name)))
        add('fmd prepared', prepare_for_inference(make_network(name, 'fmd')))
    add('fmd by reference', as_the_authors(make_network(name, 'fmd')))
    return runs


def cases(device: torch.device) -> list[tuple[str, int, int]]:
    """Mode, batch and threads of the CPU."""
    if device.type == 'cuda':
        return [('train', 128, 0), ('train', 256, 0), ('infer', 128, 0), ('infer', 1, 0)]
    cores = usable_cores()
    return [
        *(('infer', 1, threads) for threads in sorted({1, cores})),
        *(('infer', batch, cores) for batch in (8, 16)), ('train', 16, cores)]


def bench_network(name: str, device: torch.device, rounds: int) -> list[dict]:
    results = []
    for mode, batch, threads in cases(device):
        if threads:
            torch.set_num_threads(threads)
        label = f'{name} {mode} {batch}' + (f' on {threads} threads' if threads else '')
        milliseconds, peak = take_turns(variants(name, mode, batch, device), device, rounds, label)
        results.append(dict(
            model=name, mode=mode, batch=batch, threads=threads or None, milliseconds=milliseconds,
            peak_memory_mib=peak or None))
        print(f'{label}: ' + ', '.join(f'{run} {ratio(milliseconds, run):.2f}' for run in milliseconds), flush=True)
    return results


def layers_of(name: str) -> list[dict]:
    """The different dynamic convolutions of a network without groups, their input's pixels and how often they occur."""
    found = {}

    def note(conv: DynamicConv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        layer = dict(
            in_channels=conv.in_channels, out_channels=conv.out_channels, kernel=conv.kernel_size[0],
            stride=conv.stride[0], pixels=inputs[0].shape[-1])
        count = found.setdefault(tuple(layer.values()), dict(layer, count=0))
        count['count'] += 1

    model = make_network(name, 'fmd', device='meta')
    for module in model.modules():
        if isinstance(module, DynamicConv2d) and module.groups == 1:
            module.register_forward_hook(note)
    model(torch.empty(2, 3, IMAGE_SIZE, IMAGE_SIZE, device='meta'))
    return list(found.values())


def layer_variants(layer: dict, mode: str, batch: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """A static convolution, and the dynamic one by each algorithm, those of the device's order first."""
    I, O, kernel, K = layer['in_channels'], layer['out_channels'], layer['kernel'], 4
    dtype = torch.bfloat16 if device.type == 'cuda' else torch.float32
    make = partial(torch.randn, device=device)
    x = make(batch, I, layer['pixels'], layer['pixels']).to(dtype, memory_format=torch.channels_last)
    weight = make(K * O, I, kernel, kernel).to(memory_format=torch.channels_last)
    attention = Attention(make(batch, K).softmax(1), make(batch, I).sigmoid(), make(batch, O).sigmoid())
    pairs = [(number, number) for number in (layer['stride'], kernel // 2, 1)]
    one_kernel = weight[:O].to(dtype, memory_format=torch.channels_last)
    case = case_of(x, weight, attention, *pairs, 1)
    grad_y = make(batch, O, *case.output_size).to(dtype, memory_format=torch.channels_last)

    def static() -> None:
        if mode == 'forward':
            F.conv2d(x, one_kernel, None, *pairs)
        else:
            torch.ops.aten.convolution_backward(
                grad_y, x, one_kernel, None, *pairs, False, [0, 0], 1, [True, True, False])

    def dynamic(algorithm) -> None:
        arguments = (x, weight, attention, case) if mode == 'forward' else (grad_y, x, weight, attention, case)
        getattr(algorithm, mode)(*arguments)

    ordered = algorithms(mode, case)
    others = [per_kernel, im2col, per_image]
    tried = [*ordered, *(a for a in others if a not in ordered and hasattr(a, mode) and a.supports(case))]
    return dict(static=static, **{a.__name__.rpartition('.')[2]: partial(dynamic, a) for a in tried})


def bench_layers(name: str, device: torch.device, rounds: int) -> list[dict]:
    batches = (128,) if device.type == 'cuda' else (1, 16)
    results = []
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
    """The table of fmd_timm/ops/README.md, in Markdown: ratios of every device's file."""
    lines, records = [], [read_json(path) for path in sorted(RESULTS.glob('*.json'))]
    networks = [record for record in records if record['what'] == 'networks']
    for device, of_device in groupby(networks, lambda record: record['device']):
        of_device = list(of_device)
        first = of_device[0]
        lines += [
            f'{device}, {first["precision"]}, torch {first["versions"]["torch"]}, median of {first["rounds"]} rounds:',
            '',
            "| | static, ms | **FMDConv** | not timed | as the authors' | ODConv | DyConv | CondConv |",
            '|---|---|---|---|---|---|---|---|',
        ]
        for case in (case for record in of_device for case in record['cases']):
            mode, chosen = WHAT[case['mode']]
            times = case['milliseconds']
            static = min(statistics.median(times[name]) for name in STATIC)
            threads = f', {case["threads"]} thread{"s" * (case["threads"] > 1)}' if case['threads'] else ''
            runs = [chosen, 'fmd', 'fmd by reference', 'od timed', 'dy timed', 'cond timed']
            ratios = [f'{ratio(times, run if run in times else run.removesuffix(" timed")):.2f}' for run in runs]
            ratios = ' | '.join([f'**{ratios[0]}**', *ratios[1:]])
            lines.append(f'| {case["model"]}, {mode}, batch {case["batch"]}{threads} | {static:.1f} | {ratios} |')
        lines.append('')
    return '\n'.join(lines).strip()


def main(
        models: list[str], layers: bool, edge: bool, rounds: int, table: bool, results_file: Path | None,
        data: Namespace | None,
) -> None:
    if table:
        print(make_table(), _bench_data.make_table(), _bench_edge.make_tables(), sep='\n\n')
        return
    if data:
        _bench_data.main(data.preset, data.recipe, rounds)
        return
    if edge:
        _bench_edge.main(models, rounds)
        return
    for name in models:
        try:
            make_network(name, 'fmd', device='meta')
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f'--models must be static CNNs of timm, got {name}: {error}') from None
    if results_file:
        check_writable(results_file, '--results-file')
    device, measured = torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu'), []
    for name in models:
        of_model = (bench_layers if layers else bench_network)(name, device, rounds)
        measured += of_model
        write_for_device(RESULTS, f'.{name}.layers' if layers else f'.{name}', dict(
            what='layers' if layers else 'networks', device=device_name(device), device_type=device.type,
            precision='bf16' if device.type == 'cuda' else 'fp32', image_size=IMAGE_SIZE, rounds=rounds,
            **circumstances('bench.py'), cases=of_model,
        ))
    if results_file:
        write_results(results_file, benchmark_rows(measured, IMAGE_SIZE, make_network))


if __name__ == '__main__':
    main(**vars(arguments))
