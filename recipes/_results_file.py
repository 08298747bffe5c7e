"""--results-file: the columns that timm's validate.py and benchmark.py write, for whatever reads their files."""
import csv
import io
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _arguments import METHODS
from _measure import count_gmacs, count_macts
from _record import write_text
from _turns import STATIC
from torch import nn


def write_results(path: Path, rows: list[dict[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def validation_row(
        checkpoint: str, model: nn.Module, metrics: dict[str, float], data_config: dict[str, Any]) -> dict[str, Any]:
    """A row of validate.py: accuracies and errors in percent, parameters in millions.

    Args:
        checkpoint: As it was asked for.
        model: The network, which was scored.
        metrics: Its top-1 and top-5 in percent.
        data_config: How the images were prepared.
    """
    top1, top5 = metrics['top1'], metrics['top5']
    return dict(
        model=checkpoint, top1=round(top1, 4), top1_err=round(100 - top1, 4), top5=round(top5, 4),
        top5_err=round(100 - top5, 4), param_count=count_millions(model), img_size=data_config['input_size'][-1],
        crop_pct=data_config['crop_pct'], interpolation=data_config['interpolation'])


def benchmark_rows(
        cases: list[dict[str, Any]], image_size: int, make_network: Callable[..., nn.Module]) -> list[dict[str, Any]]:
    """Rows of benchmark.py, the fastest inference first: of each static network, and of its form with each method.

    Those of the static network are of its faster memory format. The methods have their convolutions timed, as
    benchmark.py has them.

    Args:
        cases: Of the record of recipes/bench.py.
        image_size: Pixels.
        make_network: Of a static network's name, and of a method if it is to be dynamic.
    """
    rows = []
    for name in dict.fromkeys(case['model'] for case in cases):
        of_network = (case for case in cases if case['model'] == name)
        largest = {case['mode']: case for case in sorted(of_network, key=lambda case: case['batch'])}
        rows.append(benchmark_row(name, make_network(name), STATIC, largest, image_size))
        rows += [
            benchmark_row(f'{name}_{method}', make_network(name, method), [f'{method} timed'], largest, image_size)
            for method in METHODS]
    return sorted(rows, key=lambda row: row['infer_samples_per_sec'], reverse=True)


def benchmark_row(
        name: str, model: nn.Module, runs: Iterable[str], cases: dict[str, dict], image_size: int) -> dict[str, Any]:
    """Steps are medians of the rounds in milliseconds. GMACs, millions of activations and of parameters are counted."""
    input_size, row = (3, image_size, image_size), dict(model=name)
    for mode in 'infer', 'train':
        batch, milliseconds = cases[mode]['batch'], cases[mode]['milliseconds']
        step = min(statistics.median(milliseconds[run]) for run in runs)
        row |= {
            f'{mode}_samples_per_sec': round(1000 * batch / step, 2), f'{mode}_step_time': round(step, 3),
            f'{mode}_batch_size': batch, f'{mode}_img_size': image_size}
        if mode == 'infer':
            row |= dict(
                infer_gmacs=round(count_gmacs(model, input_size), 2),
                infer_macts=round(count_macts(model, input_size), 2))
    return dict(row, param_count=count_millions(model))


def count_millions(model: nn.Module) -> float:
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2)
