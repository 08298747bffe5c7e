"""Networks outside of PyTorch, a few images at a time: what `recipes/bench.py --edge` measures.

In each runtime that is installed, timm's static network and ours take turns, all prepared for inference and with random
weights. Files are written as recipes/export.py writes them. Each is compared with the network in PyTorch in float64.
Its size is noted, and how much memory a new process takes that opens it and classifies three images.
"""
import copy
import importlib
import multiprocessing
import statistics
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import psutil
import timm
import torch
from _accelerator import usable_cores
from _arguments import EXPORT_SUFFIXES, METHODS
from _exported import FORMATS, Metadata, Run, export_program
from _record import circumstances, device_name, read_json, write_for_device
from _stored import STORED
from _turns import ratio, take_turns
from torch import nn
from tqdm import tqdm

from fmd_timm import prepare_for_inference

RESULTS = Path(__file__).parent / 'results' / 'edge'
IMAGE_SIZE = 224  # pixels
BATCH = 8  # of the runtimes that are also given more than one image
PYTORCH = 'pytorch'
LABELS = {PYTORCH: 'PyTorch', 'onnx': 'onnxruntime', 'openvino': 'OpenVINO', 'executorch': 'ExecuTorch'}
WEIGHTS = {  # of FMDConv, besides fp32
    PYTORCH: ('int16',), 'onnx': ('fp16', 'int8'), 'openvino': ('fp16', 'int8'), 'executorch': ()}
BATCHED = 'onnx',
PACKAGES = 'torch', 'onnxruntime', 'openvino', 'executorch'


class Exported(NamedTuple):
    """A network for one runtime."""
    model: str  # the static one
    runtime: str
    variant: str  # 'static', a method, or FMDConv with its weights in fewer bytes: 'fmd int8'
    batch: str  # '1' or 'dynamic', see recipes/export.py

    @property
    def network(self) -> str:
        method = self.variant.partition(' ')[0]
        return self.model if method == 'static' else f'{self.model}_{method}'

    @property
    def weights(self) -> str:
        return self.variant.partition(' ')[2] or 'fp32'

    def folder(self, root: Path) -> Path:
        return root / '.'.join(self).replace(' ', '_')

    def path(self, root: Path) -> Path:
        return self.folder(root) / f'model{EXPORT_SUFFIXES[self.runtime]}'


def main(models: list[str], rounds: int) -> None:
    unknown = [name for name in models if not (timm.is_model(name) and timm.is_model(f'{name}_fmd'))]
    if unknown:
        raise SystemExit(f'--models must have a form with FMDConv, got {", ".join(unknown)}')
    runtimes = installed()
    for model in models:
        torch.set_num_threads(usable_cores())
        device = device_name(torch.device('cpu'))
        with TemporaryDirectory() as folder:
            files, cases = measure(model, runtimes, Path(folder), rounds)
        made_by = circumstances('bench.py')
        for runtime in runtimes:
            made_by['versions'] |= FORMATS[runtime].versions() if runtime in FORMATS else {}
        write_for_device(RESULTS, f'.{model}', dict(
            what='edge', device=device, precision='fp32', model=model, image_size=IMAGE_SIZE, rounds=rounds, **made_by,
            files=files, cases=cases))


def measure(model: str, runtimes: list[str], folder: Path, rounds: int) -> tuple[list[dict], list[dict]]:
    """What the networks take, and how long they take in turn. Writing the files takes longest, and is not timed."""
    files = []
    every = [network for runtime in runtimes for network in networks(model, runtime)]
    for network in tqdm(every, f'{model}, writing', leave=False):
        files.append(dict(network._asdict(), **write(network, folder)))
        if network.batch == '1':
            files[-1]['resident_mib'] = in_new_process(partial(resident_mib, network, folder, IMAGE_SIZE))
    print(f'{model} is written', flush=True)
    return files, [time_case(model, *case, folder, rounds) for case in cases_of(runtimes)]


def installed() -> list[str]:
    """The runtimes that can be measured here; says which can't."""
    found = []
    for runtime in WEIGHTS:
        try:
            if runtime in FORMATS:
                FORMATS[runtime].check_installed()
            found.append(runtime)
        except SystemExit as missing:
            print(f'{LABELS[runtime]} is left out: {missing}')
    return found


def networks(model: str, runtime: str) -> list[Exported]:
    methods = [method for method in METHODS if timm.is_model(f'{model}_{method}')]
    stored = [f'fmd {weights}' for weights in WEIGHTS[runtime]]
    variants = [('1', variant) for variant in ('static', *methods, *stored)]
    if runtime in BATCHED:
        variants += [('dynamic', 'static'), ('dynamic', 'fmd')]
    return [Exported(model, runtime, variant, batch) for batch, variant in variants]


def cases_of(runtimes: list[str]) -> list[tuple[str, int, int]]:
    """Runtime, images and threads."""
    cores = usable_cores()
    return [
        (runtime, batch, threads) for runtime in runtimes
        for batch, threads in [*((1, threads) for threads in sorted({1, cores})), (BATCH, cores)]
        if batch == 1 or runtime in BATCHED]


def make_network(name: str) -> nn.Module:
    """With random BatchNorms. The last ones of a new ResNet are zeros, behind which nobody would see wrong kernels."""
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    return network


def prepare(network: nn.Module, weights: str) -> nn.Module:
    return prepare_for_inference(network, inplace=True, kernel_dtype=torch.int16 if weights == 'int16' else None)


def write(exported: Exported, root: Path) -> dict[str, Any]:
    """Write the file; how large it is, and how far from the network in PyTorch."""
    network = make_network(exported.network)
    images = torch.randn(2 if exported.batch == '1' else BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.inference_mode():  # in float64: float32 would add the rounding of PyTorch's own order of sums
        expected = copy.deepcopy(network).double()(images.double())
    prepared = prepare(network, exported.weights)
    if exported.runtime == PYTORCH:
        size = sum(tensor.nbytes for tensor in prepared.state_dict().values())
    else:
        program = export_program(STORED[exported.weights](prepared), tuple(images.shape[1:]), exported.batch)
        exported.folder(root).mkdir()
        FORMATS[exported.runtime].save(program, Metadata.of(network, exported.network), exported.path(root))
        size = sum(file.stat().st_size for file in exported.folder(root).iterdir())
    run = open_network(exported, root)
    found = torch.cat([run(some) for some in images.split(1 if exported.batch == '1' else BATCH)])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    return dict(bytes=size, largest_relative_difference=difference)


def open_network(exported: Exported, root: Path) -> Run:
    """What computes logits, by as many threads as PyTorch has now."""
    if exported.runtime == PYTORCH:
        return torch.inference_mode()(prepare(make_network(exported.network), exported.weights))
    run, _ = FORMATS[exported.runtime].open(exported.path(root))
    return run


def resident_mib(exported: Exported, root: Path, image_size: int) -> float:
    """What this process takes more than before, once it has opened the network and classified three images."""
    for package in FORMATS[exported.runtime].packages if exported.runtime != PYTORCH else ():
        importlib.import_module(package)
    images = torch.zeros(1, 3, image_size, image_size)
    before = psutil.Process().memory_info().rss
    run = open_network(exported, root)
    for _ in range(3):
        run(images)
    return (psutil.Process().memory_info().rss - before) / 2**20


def in_new_process(measure: Callable[[], float]) -> float:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
    context.set_forkserver_preload(['datasets', 'timm', 'torch'])  # once, which takes seconds
    with context.Pool(1) as pool:
        return pool.apply(measure)


def time_case(model: str, runtime: str, batch: int, threads: int, root: Path, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    kind = '1' if batch == 1 else 'dynamic'
    runs = {
        exported.variant: partial(open_network(exported, root), images)
        for exported in networks(model, runtime) if exported.batch == kind}
    label = f'{model}, {LABELS[runtime]}, batch {batch}, {threads} thread{"s" * (threads > 1)}'
    milliseconds, _ = take_turns(runs, torch.device('cpu'), rounds, label)
    print(f'{label}: ' + ', '.join(f'{run} {ratio(milliseconds, run):.2f}' for run in milliseconds), flush=True)
    return dict(model=model, runtime=runtime, batch=batch, threads=threads, milliseconds=milliseconds)


def make_tables() -> str:
    """The tables of recipes/EXPORT.md, in Markdown: times, and then sizes and differences, of every device."""
    records = [read_json(path) for path in sorted(RESULTS.glob('*.json'))]
    tables = []
    for device in dict.fromkeys(record['device'] for record in records):
        of_device = [record for record in records if record['device'] == device]
        known = of_device[0]['versions']
        versions = ', '.join(f'{name} {known[name]}' for name in PACKAGES if name in known)
        tables += [
            f'{device}, fp32, {versions}, median of {of_device[0]["rounds"]} rounds:',
            time_table(sum((record['cases'] for record in of_device), [])),
            size_table(sum((record['files'] for record in of_device), []))]
    return '\n\n'.join(tables)


def time_table(cases: list[dict[str, Any]]) -> str:
    lines = [
        '| | static | **FMDConv** | in half the bytes | kernels in int8 | ODConv | DyConv | CondConv |',
        '|---|---|---|---|---|---|---|---|']
    for case in cases:
        times = case['milliseconds']
        ratios = [f'{ratio(times, run):.2f}' if run in times else '' for run in (
            'fmd', in_half(times), 'fmd int8', 'od', 'dy', 'cond')]
        lines.append('| ' + ' | '.join([
            f'{case["model"]}, {LABELS[case["runtime"]]}, batch {case["batch"]}, {case["threads"]} '
            f'thread{"s" * (case["threads"] > 1)}', f'{statistics.median(times["static"]):.1f} ms',
            f'**{ratios[0]}**', *ratios[1:]]) + ' |')
    return '\n'.join(lines)


def in_half(variants: Container[str]) -> str:
    """FMDConv in half the bytes: all weights, or the kernels in PyTorch."""
    return 'fmd int16' if 'fmd int16' in variants else 'fmd fp16'


def size_table(files: list[dict[str, Any]]) -> str:
    lines = [
        '| MB of the file, MiB of memory | static | **FMDConv** | in half the bytes | kernels in int8 | largest '
        'difference: FMDConv, half, int8 |', '|---|---|---|---|---|---|']
    single = [file for file in files if file['batch'] == '1']
    for model, runtime in dict.fromkeys((file['model'], file['runtime']) for file in single):
        found = {file['variant']: file for file in single if (file['model'], file['runtime']) == (model, runtime)}
        stored = [found.get(variant) for variant in ('fmd', in_half(found), 'fmd int8')]
        cells = [
            '' if file is None else f'{file["bytes"] / 1e6:.1f}, {file["resident_mib"]:.0f}'
            for file in (found['static'], *stored)]
        differences = [f'{file["largest_relative_difference"]:.1e}' for file in stored if file]
        lines.append(f'| {model}, {LABELS[runtime]} | {" | ".join([*cells, ", ".join(differences)])} |')
    return '\n'.join(lines)
