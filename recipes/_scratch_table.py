"""The table and the picture of the runs of recipes/scratch.py, from their records."""
import statistics
from pathlib import Path
from typing import Any

from _paired import mean_and_error, paired_difference, with_error
from _record import read_json
from _scratch_arms import ARMS, Arm
from matplotlib.figure import Figure

COLUMNS = (
    'arm', '', 'parameters, M', 'GMACs', 'epochs', 'top-1, %', 'against static, points', 'time of an epoch',
    'kernel entropy', 'gates, deviation', 'kernels, distance')


def read_records(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """The records of each arm, by their seeds, in the order of the arms."""
    found = {}
    for arm in ARMS:
        records = [read_json(path) for path in sorted(folder.glob(f'{arm}/seed_*/result.json'))]
        if records:
            found[arm] = {record['seed']: record for record in records}
    return found


def time_of(timing: dict[str, Any], arm: Arm) -> float:
    """Time of a training step over the static network's, median of the rounds in which they took turns."""
    seconds = timing['epoch_seconds']
    return statistics.median(own / static for own, static in zip(seconds[arm.same_network()], seconds['static']))


def make_table(folder: Path) -> str:
    """Every arm, in Markdown, against the static network with the same recipe.

    Top-1 and the difference are means over the seeds, with their standard errors; the difference is paired by seed.
    """
    records, timing = read_records(folder), read_json(folder / 'timing.json')
    static = records['static']
    first = next(iter(static.values()))
    lines = [
        f'{first["dataset"]}: {first["train_images"]:,} images to train, {first["validation_images"]:,} to validate, '
        f'{len(static)} seeds, {first["device"]}, torch {first["versions"]["torch"]}',
        '',
        '| ' + ' | '.join(COLUMNS) + ' |', '|---' * len(COLUMNS) + '|',
    ]
    return '\n'.join([*lines, *(row(arm, records[arm], static, timing) for arm in records)]) + '\n'


def row(arm: str, records: dict[int, dict], static: dict[int, dict], timing: dict[str, Any]) -> str:
    one = next(iter(records.values()))
    dynamics = (
        [record[name] for record in records.values()] for name in ('kernel_entropy', 'gate_std', 'kernel_distance'))
    cells = [
        f'`{arm}`', ARMS[arm].about, f'{one["parameters"] / 1e6:.2f}', f'{one["gmacs"]:.4f}', str(one['epochs']),
        with_error(*mean_and_error([record['top1'] for record in records.values()])),
        '' if records is static else with_error(*paired_difference(records, static), '+'),
        f'{time_of(timing, ARMS[arm]):.2f}',
        *('' if None in values else f'{statistics.mean(values):.2f}' for values in dynamics),
    ]
    return '| ' + ' | '.join(cells) + ' |'


def draw(folder: Path) -> Figure:
    """Top-1 of the validation images, mean of the seeds: after each epoch, and against the time in static epochs."""
    timing = read_json(folder / 'timing.json')
    figure = Figure(figsize=(10, 4), layout='constrained')
    for axes, in_time in zip(figure.subplots(1, 2, sharey=True), (False, True)):
        for arm, records in read_records(folder).items():
            curves = [[epoch['top1'] for epoch in record['history']] for record in records.values()]
            means = [statistics.mean(of_epoch) for of_epoch in zip(*curves)]
            unit = time_of(timing, ARMS[arm]) if in_time else 1
            style = dict(linestyle='-' if ARMS[arm].method is None else '--', linewidth=1.2)
            axes.plot([unit * (i + 1) for i in range(len(means))], means, label=arm, **style)
        axes.set(xlabel='time, in epochs of the static network' if in_time else 'epoch', ylabel='Top-1, %')
    axes.legend(fontsize=7)
    return figure
