"""Pictures of comparisons, accuracy against time with lines of equal score, of a run and of attention. In black."""
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _record import replacing
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MARKERS = 'osD^vP*X<>'


def draw(comparison: dict[str, Any], time: str, time_label: str, score_label: str) -> Figure:
    """Top-1 against a time, with lines of equal score: accuracy = time / score, straight lines through the origin.

    Args:
        comparison: As `compare` makes it.
        time: 'epoch_seconds' or 'infer_ms_per_image'; the bars span its rounds, those of top-1 the standard deviation.
        time_label: Of the axis.
        score_label: Of the lines.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    times, accuracies = [], []
    for (name, figures), marker in zip(comparison['models'].items(), itertools.cycle(MARKERS)):
        value, (low, high), top1 = figures[time], figures[f'{time}_range'], figures['top1']
        times += [low, high]
        accuracies += [top1['mean'] - (top1['std'] or 0), top1['mean'] + (top1['std'] or 0)]
        axes.errorbar(
            value, top1['mean'], xerr=[[value - low], [high - value]], yerr=top1['std'], fmt=marker,
            color='black', markerfacecolor='black' if name == comparison['static'] else 'white', markersize=8,
            capsize=3, elinewidth=0.8, label=name, zorder=3,
        )
    margin = max(0.25 * (max(accuracies) - min(accuracies)), 0.5)
    bottom, top = max(min(accuracies) - margin, 0), max(accuracies) + margin
    padding = 0.1 * (max(times) - min(times)) or 0.1 * max(times)
    left, right = max(min(times) - padding, 0), max(times) + padding
    lowest, highest = 100 * left / top, 100 * right / max(bottom, 1)
    for score in MaxNLocator(7).tick_values(lowest, highest):
        if lowest < score < highest:
            axes.plot([0, right], [0, 100 * right / score], color='gray', linestyle='--', linewidth=0.7)
            if top * score / 100 < right:
                end, alignment = (top * score / 100, top), dict(ha='center', va='bottom')
            else:
                end, alignment = (right, 100 * right / score), dict(ha='left', va='center')
            axes.annotate(f' {score:.4g}', end, color='dimgray', fontsize=8, **alignment)
    axes.plot([], [], color='gray', linestyle='--', linewidth=0.7, label=score_label)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel=time_label, ylabel='Top-1, %')
    axes.legend(fontsize=8)
    return figure


def draw_training(comparison: dict[str, Any]) -> Figure:
    return draw(comparison, 'epoch_seconds', 'Training epoch, s', 'equal IES, s')


def draw_inference(comparison: dict[str, Any]) -> Figure:
    return draw(comparison, 'infer_ms_per_image', 'Inference of one image, ms', 'equal IES of inference, ms')


def draw_run(history: list[dict[str, float]]) -> Figure:
    """Loss and top-1 after each epoch.

    Args:
        history: Of a record: `train_loss` of the last batch, `loss` and `top1` of the validation images.
    """
    figure = Figure(figsize=(7, 3.5), layout='constrained')
    epochs = range(1, len(history) + 1)
    for axes, label, curves in zip(figure.subplots(1, 2), ('Cross-entropy', 'Top-1, %'), (
            dict(train_loss=('--', 'training, last batch'), loss=('-', 'validation')), dict(top1=('-', 'validation')))):
        for name, (style, title) in curves.items():
            axes.plot(epochs, [epoch[name] for epoch in history], style, color='black', marker='.', label=title)
        axes.set(xlabel='Epoch', ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)
    return figure


def draw_layers(layers: dict[str, dict[str, float | None]]) -> Figure:
    """What the attention of each layer does, from the first layer at the top; see recipes/inspect_attention.py."""
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(layers)), layout='constrained')
    parts = figure.subplots(1, 3, sharey=True)
    for axes, label, drawn in (
            (parts[0], 'entropy over log K', dict(kernel_entropy='of an image', usage_entropy='of the mean')),
            (parts[1], 'deviation of a gate', dict(gate_std=None)),
            (parts[2], 'distance of the kernels', dict(kernel_distance=None))):
        for (number, name), marker in zip(drawn.items(), MARKERS):
            values = [layer[number] for layer in layers.values()]
            if None not in values:
                axes.plot(
                    values, range(len(values)), marker, color='black', label=name,
                    markerfacecolor='black' if marker == MARKERS[0] else 'white')
        axes.set(xlabel=label)
        axes.set_xlim(0, max(1.05, axes.get_xlim()[1]) if len(drawn) > 1 else None)
        axes.grid(axis='y', color='lightgray', linewidth=0.5)
    parts[0].set_yticks(range(len(layers)), layers, fontsize=8)
    parts[0].invert_yaxis()
    if parts[0].lines:
        parts[0].legend(fontsize=8)
    return figure


def draw_mixes(
        mixes: dict[str, list[float]], means: dict[str, list[float]] | None = None, name: str | None = None) -> Figure:
    """How an image mixes the kernels, a panel for each layer and a bar for each kernel.

    Args:
        mixes: kernel_attn (K) of each layer.
        means: The same of a dataset on average, which is marked.
        name: Of the dataset.
    """
    columns = min(len(mixes), 6)
    rows = math.ceil(len(mixes) / columns)
    figure = Figure(figsize=(12, 0.4 + 1.3 * rows), dpi=130, layout='constrained')
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (layer, mix) in zip(panels, mixes.items()):
        kernels = range(1, len(mix) + 1)
        bars = axes.bar(kernels, mix, color='darkgray', label='this image')
        drawn = [bars, axes.axhline(1 / len(mix), color='gray', linestyle=':', linewidth=0.8, label='equal shares')]
        if means:
            drawn += axes.plot(kernels, means[layer], '_', color='black', markersize=12, markeredgewidth=2,
                               label=f'mean over {name}')
        axes.set_title(layer, fontsize=8)
        axes.set_xticks(kernels)
        axes.tick_params(labelsize=7)
    for axes in panels[len(mixes):]:
        axes.remove()
    figure.legend(handles=drawn, loc='outside upper left', ncols=len(drawn), fontsize=8, frameon=False)
    return figure


FORMATS = {'.png': dict(dpi=150), '.svg': dict(metadata=dict(Date=None))}


def save(figure: Figure, stem: Path, suffixes: Iterable[str] = FORMATS) -> None:
    """The figure as PNG and as SVG, whose text stays text and which is the same file for the same figure."""
    for suffix in suffixes:
        with replacing(stem.with_suffix(suffix)) as unfinished:
            with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'fmd_timm'}):
                figure.savefig(unfinished, **FORMATS[suffix])
