"""The table of the runs of recipes/laboratory.py."""
import json
import statistics
from pathlib import Path

from _arms import ARMS, Arm
from _paired import paired_difference, with_error


def read_runs(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


FROZEN = {
    None: 'all of it learns', 'backbone': 'classifier and attention learn', 'kernels': 'BatchNorms learn, too'}


def make_table(path: Path) -> str:
    """Every arm of a file of runs, in Markdown, against the best static arm of which as much is frozen.

    A difference is the mean over the seeds of both, with its standard error; it is paired by seed.
    """
    runs = read_runs(path)
    by_arm: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_arm.setdefault(run['arm'], {})[run['seed']] = run
    best = best_static(by_arm)
    settings = runs[0]['settings']
    of_parts = '; '.join(
        f'{what}: {mean(by_arm[best[part]], "top1"):.2f} % (`{best[part]}`)'
        for part, what in FROZEN.items() if part in best)
    lines = [
        f'{settings["dataset"]}: {settings["images"]:,} images to train on and {settings["epochs"]} epochs, '
        f'{runs[0]["validation_images"]:,} to validate. Best static networks, where {of_parts}.',
        '',
        '| arm | | learning rate | seeds | top-1, % | against the best static, points | kernel entropy | '
        'gates, deviation | mean attention costs, points |',
        '|---|---|---|---|---|---|---|---|---|',
    ]
    for arm, values in ARMS.items():
        if arm in by_arm:
            other = best.get(values.freeze) or best[None]
            lines.append('| ' + ' | '.join(row(arm, values, by_arm[arm], by_arm[other])) + ' |')
    return '\n'.join(lines) + '\n'


def best_static(by_arm: dict[str, dict[int, dict]]) -> dict[str | None, str]:
    """By what is frozen, the static arm with the highest mean, of those with the most seeds."""
    best = {}
    for arm in (arm for arm in by_arm if ARMS[arm].method is None):
        part = ARMS[arm].freeze
        best[part] = max(
            (arm, best.get(part, arm)), key=lambda name: (len(by_arm[name]), mean(by_arm[name], 'top1')))
    return best


def row(arm: str, values: Arm, runs: dict[int, dict], best: dict[int, dict]) -> list[str]:
    costs = [run['top1'] - run['top1_of_mean'] for run in runs.values() if 'top1_of_mean' in run]
    return [
        f'`{arm}`', values.about, f'{values.lr:g}', str(len(runs)), f'{mean(runs, "top1"):.2f}',
        '' if runs is best else with_error(*paired_difference(runs, best), '+'),
        *(f'{mean(runs, number):.2f}' if number in next(iter(runs.values())) else ''
          for number in ('kernel_entropy', 'gate_std')),
        f'{statistics.mean(costs):+.2f}' if costs else '',
    ]


def mean(runs: dict[int, dict], number: str) -> float:
    return statistics.mean(run[number] for run in runs.values())
