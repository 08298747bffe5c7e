"""Run records -> the table and the pictures of a comparison:  python recipes/_report.py <folder>

The records are those of recipes/compare.py, which calls this at its end; every number comes from them.

Times are those of `timing.json`, measured in turn; accuracies are those of the runs. A figure relative to the static
network's is a ratio, of times and rates the median of the ratios within each round; of accuracies it is the difference
in percentage points, the mean over the seeds that both were trained with.
"""
import sys

from _arguments import parse_report

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_report(sys.argv[1:], __doc__)

import statistics
from pathlib import Path
from typing import Any

import _pictures
from _record import read_json, write_json, write_text

from fmd_timm.scores import ies, ies_infer, rcs, rcs_infer

# The same in all records of a comparison, besides the recipe
CONDITIONS = (
    'device', 'device_type', 'device_count', 'precision', 'input_size', 'global_batch', 'train_images',
    'validation_images', 'num_classes', 'versions',
)
NOT_OF_THE_RECIPE = ('model', 'seed', 'tracker')  # these may differ between the runs
# name in the JSON, label in the table, factor to its unit
ROWS = (
    ('parameters', 'Parameters, M', 1e-6),
    ('gmacs', 'GMACs', 1),
    ('top1', 'Top-1, %', 1),
    ('top5', 'Top-5, %', 1),
    ('epoch_seconds', 'Epoch, s', 1),
    ('ies', 'IES, s', 1),
    ('rcs', 'RCS, 1/s', 1),
    ('train_images_per_second', 'Training, images/s', 1),
    ('training_epoch_seconds', 'Epoch in the training run, s', 1),
    ('data_wait_share', 'Waiting for images in it, %', 100),
    ('peak_memory_mib', 'Peak memory, MiB', 1),
    ('infer_ms_per_image', 'Latency at batch 1, ms', 1),
    ('infer_images_per_second', 'Inference, images/s', 1),
    ('ies_infer', 'IES of inference, ms', 1),
    ('rcs_infer', 'RCS of inference, 1/s', 1),
)
SUMMARY = 'parameters', 'gmacs', 'top1', 'epoch_seconds', 'infer_ms_per_image'


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """What the records of one comparison must agree in, flat."""
    flat = {name: value for name, value in record['recipe'].items() if name not in NOT_OF_THE_RECIPE}
    flat |= {name: record.get(name) for name in CONDITIONS if name != 'versions'}
    return flat | {f'version of {package}': version for package, version in record['versions'].items()}


def read_records(folder: Path) -> dict[Path, dict[str, Any]]:
    """timing.json and the records of the finished runs, as far as they are there."""
    paths = [folder / 'timing.json', *sorted(folder.glob('*/seed_*/result.json'))]
    return {path: read_json(path) for path in paths if path.exists()}


def check_comparable(records: dict[Path, dict[str, Any]]) -> None:
    """Refuse records of different devices or settings.

    Raises:
        SystemExit: Names the first two records that differ, and in what.
    """
    (first, record), *others = records.items()
    expected = settings(record)
    for path, other in others:
        found = settings(other)
        differences = [
            f'{name} is {found.get(name)!r}, not {expected.get(name)!r}'
            for name in {**expected, **found} if found.get(name) != expected.get(name)
        ]
        if differences:
            raise SystemExit(f'{path} cannot be compared with {first}: {"; ".join(differences)}')


def compare(static: str, runs: dict[str, list[dict[str, Any]]], timing: dict[str, Any]) -> dict[str, Any]:
    """The comparison, as `comparison.json` holds it.

    Args:
        static: The model that the others are compared with.
        runs: Per model the records of its seeds, see recipes/train.py.
        timing: The record of recipes/_timing.py.
    """
    return dict(
        static=static,
        models={name: _figures(records, runs[static], timing) for name, records in runs.items()},
        epoch_against_od={
            name: _epoch_against(timing, name, other) for name in runs
            if '_fmd' in name and (other := name.replace('_fmd', '_od')) in runs
        },
        rounds=timing['rounds'], steps=timing['steps'], infer_batch=timing['infer_batch'],
        epochs=timing['recipe']['epochs'], dataset=next(iter(runs.values()))[0]['dataset'],
        **{name: timing[name] for name in CONDITIONS},
        git_commits=sorted({str(r['git_commit']) for r in [timing, *sum(runs.values(), [])]}),
    )


def _figures(records: list[dict], static_records: list[dict], timing: dict) -> dict[str, Any]:
    model, static = records[0]['model'], static_records[0]['model']
    own, reference = _of_model(records, timing), _of_model(static_records, timing)
    relative = {name: own[name] / reference[name] for name in ('parameters', 'gmacs', 'peak_memory_mib')}
    in_training = own['training_epoch_seconds'], reference['training_epoch_seconds']
    relative['training_epoch_seconds'] = in_training[0] / in_training[1] if None not in in_training else None
    relative['data_wait_share'] = None
    for name in 'epoch_seconds', 'infer_ms_per_image', 'infer_images_per_second':
        relative[name] = _median_ratio(timing[name][model], timing[name][static])
    relative['train_images_per_second'] = _median_ratio(
        timing['epoch_seconds'][static], timing['epoch_seconds'][model])
    theirs = {record['seed']: record for record in static_records}
    for name in 'top1', 'top5':
        differences = [r[name] - theirs[r['seed']][name] for r in records if r['seed'] in theirs]
        relative[name] = statistics.mean(differences) if differences else None
    accuracy = own['top1']['mean'] / reference['top1']['mean'] if reference['top1']['mean'] else 0
    relative |= dict(
        ies=relative['epoch_seconds'] / accuracy if accuracy else None,
        rcs=accuracy / relative['epoch_seconds'] if accuracy else None,
        ies_infer=relative['infer_ms_per_image'] / accuracy if accuracy else None,
        rcs_infer=accuracy * relative['infer_images_per_second'] if accuracy else None,
    )
    return dict(own, relative=relative)


def _of_model(records: list[dict], timing: dict) -> dict[str, Any]:
    model = records[0]['model']
    epoch_seconds, ms, rate = (
        statistics.median(timing[name][model])
        for name in ('epoch_seconds', 'infer_ms_per_image', 'infer_images_per_second'))
    top1, top5 = (_mean_and_std([record[name] for record in records]) for name in ('top1', 'top5'))
    accuracy = top1['mean'] / 100
    # None of a run that was finished on other hardware than it was trained on
    in_training, waits = (
        [value for record in records if (value := record.get(name)) is not None]
        for name in ('median_epoch_seconds', 'data_wait_share'))
    return dict(
        seeds=[record['seed'] for record in records], parameters=records[0]['parameters'], gmacs=records[0]['gmacs'],
        top1=top1, top5=top5, epoch_seconds=epoch_seconds,
        epoch_seconds_range=[min(timing['epoch_seconds'][model]), max(timing['epoch_seconds'][model])],
        ies=ies(epoch_seconds, accuracy), rcs=rcs(epoch_seconds, accuracy),
        train_images_per_second=timing['steps_per_epoch'] * timing['global_batch'] / epoch_seconds,
        training_epoch_seconds=statistics.median(in_training) if in_training else None,
        data_wait_share=statistics.median(waits) if waits else None,
        peak_memory_mib=max(record['peak_memory_mib'] for record in records),
        infer_ms_per_image=ms, infer_images_per_second=rate,
        infer_ms_per_image_range=[min(timing['infer_ms_per_image'][model]), max(timing['infer_ms_per_image'][model])],
        ies_infer=ies_infer(ms, accuracy), rcs_infer=rcs_infer(rate, accuracy),
    )


def _mean_and_std(values: list[float]) -> dict[str, float | None]:
    return dict(mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else None)


def _median_ratio(values: list[float], references: list[float]) -> float:
    return statistics.median(value / reference for value, reference in zip(values, references))


def _epoch_against(timing: dict, name: str, other: str) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(timing['epoch_seconds'][name], timing['epoch_seconds'][other])]
    return dict(other=other, median=statistics.median(ratios), min=min(ratios), max=max(ratios))


def make_table(comparison: dict[str, Any]) -> str:
    """The comparison in Markdown: a column per model, in parentheses relative to the static network."""
    models, static = comparison['models'], comparison['static']
    lines = ['| measured | ' + ' | '.join(models) + ' |', '|---' * (1 + len(models)) + '|']
    for row, label, factor in ROWS:
        if all(figures.get(row) is None for figures in models.values()):
            continue
        cells = [_cell(figures, row, factor, name == static) for name, figures in models.items()]
        lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
    seeds = {len(figures['seeds']) for figures in models.values()}
    _, height, width = comparison['input_size']
    lines += [
        '',
        f'{comparison["dataset"]}: {comparison["train_images"]:,} images of {height}x{width} pixels to train, '
        f'{comparison["validation_images"]:,} to validate, epochs: {comparison["epochs"]}, batch '
        f'{comparison["global_batch"]}, {" or ".join(map(str, sorted(seeds)))} seed{"s" if max(seeds) > 1 else ""} per '
        f'model{" (mean ± standard deviation)" if max(seeds) > 1 else ""}. {comparison["device_count"]} x '
        f'{comparison["device"]}, {comparison["precision"]}, '
        + ', '.join(f'{package} {version}' for package, version in comparison['versions'].items())
        + f'. Times are medians of {comparison["rounds"]} rounds in which the models take turns ({comparison["steps"]} '
        f'training steps, inference at batch 1 and {comparison["infer_batch"]}). In parentheses: relative to {static}, '
        f'times by the median ratio within a round, accuracies in points. GMACs are of one image with attention '
        f'and mixing. Peak memory is that of the process of a training run'
        f'{"" if comparison["device_type"] == "cpu" else ", allocated on the GPU"}.',
    ]
    for name, against in comparison['epoch_against_od'].items():
        lines += ['', (
            f'An epoch of {name} takes {_percent(against["median"])} time than one of {against["other"]} with the same '
            f'operator under both (median of {comparison["rounds"]} rounds; {_percent(against["min"])} to '
            f'{_percent(against["max"])}).'
        )]
    return '\n'.join(lines) + '\n'


def make_summary(comparison: dict[str, Any]) -> str:
    """Gain and price in Markdown: a row per model, in parentheses relative to the static network."""
    models, static = comparison['models'], comparison['static']
    rows = [row for row in ROWS if row[0] in SUMMARY]
    lines = ['| network | ' + ' | '.join(label for _, label, _ in rows) + ' |', '|---' * (1 + len(rows)) + '|']
    for name, figures in models.items():
        cells = [_cell(figures, row, factor, name == static) for row, _, factor in rows]
        lines.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def _cell(figures: dict, row: str, factor: float, is_static: bool) -> str:
    value, relative = figures[row], figures['relative'][row]
    if row in ('top1', 'top5'):
        text = f'{value["mean"]:.2f}' + ('' if value['std'] is None else f' ± {value["std"]:.2f}')
        return text if is_static or relative is None else f'{text} ({relative:+.2f})'
    if value is None:
        return '-'
    text = _number(value * factor)
    if is_static or relative is None:
        return text
    return f'{text} ({relative:.2f}x)' if relative >= 0.1 else f'{text} ({relative:.2g}x)'


def _number(value: float) -> str:
    """Three significant digits, or all before the point: 12,346 or 0.0123."""
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


def _percent(ratio: float) -> str:
    return f'{abs(1 - ratio):.1%} {"less" if ratio < 1 else "more"}'.replace('%', ' %')


def write(folder: Path) -> str:
    """Write comparison.json, table.md, summary.md and the pictures of the records in the folder; returns the table.

    The models are those that timing.json lists, the first of them the static network.

    Raises:
        SystemExit: There is no timing or no run of the static network, or records can't be compared.
    """
    records = read_records(folder)
    timing = records.get(folder / 'timing.json')
    if timing is None:
        raise SystemExit(f'{folder} has no timing.json: see recipes/compare.py')
    check_comparable(records)
    runs = {name: [r for path, r in records.items() if path.parents[1] == folder / name] for name in timing['models']}
    runs = {name: finished for name, finished in runs.items() if finished}
    static = timing['models'][0]
    if static not in runs:
        raise SystemExit(f'{folder} has no finished run of the static network {static}')
    comparison = compare(static, runs, timing)
    table = make_table(comparison)
    write_json(folder / 'comparison.json', comparison)
    write_text(folder / 'table.md', table)
    write_text(folder / 'summary.md', make_summary(comparison))
    _pictures.save(_pictures.draw_training(comparison), folder / 'training')
    _pictures.save(_pictures.draw_inference(comparison), folder / 'inference')
    return table


if __name__ == '__main__':
    print(write(**vars(arguments)))
