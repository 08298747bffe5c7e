"""Records of federated runs -> the table and the picture:  python recipes/_federated_report.py <folder>

The records are those of recipes/federated.py, which calls this at its end; every number comes from them.
"""
import sys

from _arguments import parse_report

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_report(sys.argv[1:], __doc__)

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import _pictures
from _record import read_json, write_text
from matplotlib.figure import Figure

MEGABYTE = 1e6


def read_records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The finished runs by their network."""
    found = {}
    for path in sorted(folder.glob('*/seed_*/federated.json')):
        record = read_json(path)
        found.setdefault(record['model'], []).append(record)
    return dict(sorted(found.items(), key=lambda item: item[1][0]['parameters']))


def make_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each network: what it reached, and what was sent for it."""
    lines = [
        '| network | parameters, M | exchanged, M | top-1, % | MB down | MB up | of them in a round | s of a round |',
        '|---|---|---|---|---|---|---|---|']
    for name, records in runs.items():
        top1 = [record['top1'] for record in records if record['top1'] is not None] or [math.nan]
        spread = f' ± {statistics.stdev(top1):.2f}' if len(top1) > 1 else ''
        down, up = (statistics.mean(record[way] for record in records) / MEGABYTE for way in ('bytes_down', 'bytes_up'))
        rounds = records[0]['federation']['num_server_rounds']
        seconds = statistics.median(of['seconds'] for record in records for of in record['rounds'])
        lines.append(
            f'| {name} | {records[0]["parameters"] / 1e6:.2f} | {records[0]["exchanged"] / 1e6:.2f} | '
            f'{statistics.mean(top1):.2f}{spread} | {down:,.0f} | {up:,.0f} | {(down + up) / rounds:,.1f} | '
            f'{seconds:.1f} |')
    record = next(iter(runs.values()))[0]
    federation, seeds = record['federation'], {len(records) for records in runs.values()}
    given = ''.join(f', {argument}' for argument in record['recipe']['model_kwargs'] or ())
    lines += ['', (
        f'{record["dataset"]}{given}: {record["train_images"]:,} images to train, {record["validation_images"]:,} to '
        f'validate, {federation["num_supernodes"]} clients, Dir({federation["alpha"]:g}), '
        f'{federation["num_server_rounds"]} rounds of {federation["local_epochs"]} local epochs, '
        f'{federation["strategy"]}'
        f'{", FedBN" if federation["fedbn"] else ""}{", kernels in fp16" if federation["fp16_kernels"] else ""}, '
        f'{" or ".join(map(str, sorted(seeds)))} seed{"s" if max(seeds) > 1 else ""} of each'
        f'{" (mean ± standard deviation)" if max(seeds) > 1 else ""}. {record["device"]}, {record["precision"]}, '
        + ', '.join(f'{package} {of}' for package, of in record['versions'].items()) + '.')]
    return '\n'.join(lines) + '\n'


def draw(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Top-1 of every run after each round, by rounds and by what was sent."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    by_round, by_bytes = figure.subplots(1, 2, sharey=True)
    for (name, records), style in zip(runs.items(), itertools.cycle(('-', '--', ':', '-.'))):
        for i, record in enumerate(records):
            scored = [of for of in record['rounds'] if 'top1' in of]
            sent = list(itertools.accumulate(of['bytes_down'] + of['bytes_up'] for of in record['rounds']))
            line = dict(color='black', linestyle=style, linewidth=0.9, label=None if i else name)
            top1 = [of['top1'] for of in scored]
            by_round.plot([of['round'] for of in scored], top1, **line)
            by_bytes.plot([sent[of['round'] - 1] / MEGABYTE for of in scored], top1, **line)
    by_round.set(xlabel='Round', ylabel='Top-1, %')
    by_bytes.set(xlabel='MB sent, down and up', xscale='log')
    by_round.legend(fontsize=8)
    return figure


def write(folder: Path) -> str:
    """Write table.md and the picture of the records in the folder; returns the table.

    Raises:
        SystemExit: There are none.
    """
    runs = read_records(folder)
    if not runs:
        raise SystemExit(f'{folder} has no finished run: see recipes/federated.py')
    table = make_table(runs)
    write_text(folder / 'table.md', table)
    _pictures.save(draw(runs), folder / 'accuracy')
    return table


if __name__ == '__main__':
    print(write(**vars(arguments)))
