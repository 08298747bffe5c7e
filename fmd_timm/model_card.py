"""A run record (`result.json`, which training writes) -> the README.md of a Hub repository, and `.eval_results`.

Every number of a card comes from the record, so a card can't state what nobody measured.
"""
import json
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from timm.models._hub import generate_readme

from .card_details import ARXIV, comparison, details
from .card_exported import exported_section
from .card_template import ARTICLE, DESCRIPTION, DYNAMICS, REST, TABLE, USAGE, number, percent

__all__ = ['as_text', 'check_complete', 'make_card', 'make_eval_results', 'results_table']

REQUIRED = (
    'model', 'model_args', 'command', 'dataset', 'train_split', 'train_images', 'validation_split',
    'validation_images', 'num_classes', 'top1', 'top5', 'loss', 'epochs', 'infer_batch', 'parameters', 'gmacs', 'macts',
    'device', 'device_count', 'precision', 'input_size', 'global_batch', 'seed', 'versions', 'finished',
    'unread_images',
)
# None where it could not be measured: a score without accuracy, the memory of a CPU, code outside of git; `init` where
# training started from random weights, `teacher` where there was none, `temperature` where it was left alone, `method`
# of a static network, and what its attention does.
MAY_BE_NONE = (
    'init', 'teacher', 'method', 'temperature', 'preset', 'median_epoch_seconds', 'data_wait_share', 'ies', 'rcs',
    'ies_infer', 'rcs_infer', 'train_images_per_second', 'infer_images_per_second', 'peak_memory_mib', 'git_commit',
    *DYNAMICS,
)


def check_complete(record: dict[str, Any]) -> None:
    """Refuse a record of which no card can be made.

    Raises:
        ValueError: Fields are missing, or None where a value is needed; names them all.
    """
    missing = [name for name in REQUIRED if record.get(name) is None]
    missing += [name for name in MAY_BE_NONE if name not in record]
    if missing:
        raise ValueError(f'the run record has no {", ".join(missing)}')


def results_table(record: dict[str, Any]) -> str:
    """What the run achieved, on what hardware, as a Markdown table.

    Args:
        record: What training wrote to `result.json`.
    """
    return TABLE.substitute(
        record,
        top1=f'{record["top1"]:.2f}',
        top5=f'{record["top5"]:.2f}',
        loss=f'{record["loss"]:.4f}',
        validation_images=number(record['validation_images']),
        median_epoch_seconds=number(record['median_epoch_seconds'], 's'),
        data_wait_share=percent(record['data_wait_share']),
        ies=number(record['ies'], 's'),
        rcs=number(record['rcs'], '1/s'),
        ies_infer=number(record['ies_infer'], 'ms'),
        rcs_infer=number(record['rcs_infer'], '1/s'),
        train_images_per_second=number(record['train_images_per_second'], 'images/s'),
        infer_images_per_second=number(record['infer_images_per_second'], 'images/s'),
        peak_memory_mib=number(record['peak_memory_mib'], 'MiB'),
        parameters=number(record['parameters']),
        gmacs=number(record['gmacs']),
        dynamics=''.join(
            f'| {label} | {record[name]:.3f} |\n' for name, label in DYNAMICS.items() if record[name] is not None),
        input_size=' x '.join(map(str, record['input_size'])),
    ).rstrip()


def as_text(table: str) -> str:
    """A Markdown table of two columns as lines for a terminal, `name   value`, without its head."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]]
    width = max(len(name) for name, _ in rows)
    return '\n'.join(f'{name:{width}}  {value}' for name, value in rows)


def _convolutions(method: str | None) -> str:
    if method is None:
        return 'static convolutions'
    return f'the dynamic convolutions of [{method}](https://arxiv.org/abs/{ARXIV[method]})'


def _origin(init: dict[str, Any] | None) -> str:
    if init is None:
        return 'random weights'
    kind, revision = init['revision'].split()
    network = f'a static `{init["architecture"]}`, inflated' if init['inflated'] else f'`{init["architecture"]}`'
    return f'`{init["weights"]}` ({network}), {kind} `{revision}`, {init["classifier"]} classifier'


def _teacher(teacher: dict[str, Any] | None) -> str:
    if teacher is None:
        return '-'
    kind, revision = teacher['revision'].split()
    return (
        f'`{teacher["weights"]}` (`{teacher["architecture"]}`), {kind} `{revision}`, licence '
        f'`{teacher["license"] or "unknown"}`')


def _unread(images: dict[str, int | None]) -> str:
    """How many of each split; None where nobody looked, as in large ones."""
    return ', '.join(f'{number(count)} of {part}' for part, count in images.items())


def _licence(licence: str, init: dict[str, Any] | None) -> str:
    if licence == 'apache-2.0':
        return 'The weights and the code are under the Apache License 2.0.'
    return (
        f'The code is under the Apache License 2.0. The weights started from `{init["weights"]}`, '
        f'whose licence is `{licence}`.'
    )


def _differences(record: dict[str, Any]) -> str:
    """The section on what is not as in the method's paper, as far as this run is concerned."""
    method, lines = record['method'], []
    if method == 'CondConv':
        lines.append("The paper's networks have 8 kernels for each convolution; the default here is 4.")
    elif method and record['temperature'] is None:
        lines.append('The temperature of the attention was not annealed; it is that of the first weights.')
    elif method == 'FMDConv':
        lines.append(
            f'The temperature of the kernel attention was annealed from {record["temperature"]:g} to 1, as the paper '
            "says. In the authors' code it stays 34 and only that of the channel attentions is annealed.")
    elif method:
        lines.append(f'The temperature of the attention was annealed from {record["temperature"]:g} to 1.')
    if method == 'FMDConv':
        lines.append('The dynamic convolutions have no bias unless `conv_bias=True`; a BatchNorm follows each.')
    if method in ('ODConv', 'FMDConv'):
        lines.append(
            "A training batch of one image uses the running statistics of the attention's BatchNorm, where the "
            "authors' code fails.")
    if not lines:
        return ''
    return '\n'.join(['## Differences from the paper', '', *(f'- {line}' for line in lines), '', ''])


def _legs(record: dict[str, Any]) -> str:
    """The limit of a run that was continued on other hardware, or none."""
    epochs = {}
    for leg in record.get('legs', []):
        kind = f'{leg["device_count"]} x {leg["device"]} ({leg["precision"]})'
        epochs[kind] = epochs.get(kind, 0) + len(leg['epoch_seconds'])
    if len(epochs) < 2:
        return ''
    parts = ', '.join(f'{number} epochs on {kind}' for kind, number in epochs.items())
    times = 'are of the epochs on the hardware of the table' if record['median_epoch_seconds'] else (
        'are missing: no epoch was trained on the hardware of the table')
    return f'- The run was continued on other hardware: {parts}. Times and scores of training {times}.\n'


def make_card(record: dict[str, Any], repo: str) -> ModelCard:
    """The model card of a training run.

    Args:
        record: What training wrote to `result.json`, see `REQUIRED` and `MAY_BE_NONE`. `exported`, if it is there, are
            records of recipes/export.py, of files that are published with the weights; `twin` is what
            `card_details.TWIN` names of that of the static network. Other entries are not used.
        repo: Hub repository 'owner/name' that the card is for.

    Raises:
        ValueError: The record is not complete, see `check_complete`, or that of an exported file is not.
    """
    check_complete(record)
    dataset, dataset_type, init = record['dataset'], _dataset_type(record), record['init']
    licence = (init['license'] or 'unknown') if init else 'apache-2.0'
    method, version = record['method'], record['versions'].get('fmd-timm')
    channels, height, width = record['input_size']
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=dataset_type,
            dataset_config=record.get('dataset_config'),
            dataset_name=dataset,
            dataset_split=record['validation_split'],
            metric_type='accuracy',
            metric_name=metric,
            metric_value=round(top / 100, 6),
        )
        for metric, top in (('top-1', record['top1']), ('top-5', record['top5']))
    ]
    name = repo.rpartition('/')[2]
    data = ModelCardData(
        library_name='timm',
        license=licence,
        pipeline_tag='image-classification',
        tags=[
            'image-classification', 'timm', 'transformers', 'fmd_timm',
            *([method.lower(), 'dynamic-convolution'] if method else [])],
        datasets=[dataset_type] if '/' in dataset_type else None,
        base_model=init['repo'] if init else None,
        metrics=['accuracy'],
        model_name=name,
        eval_results=results,
    )
    sections = dict(
        description=DESCRIPTION.substitute(
            record, convolutions=_convolutions(method), table=results_table(record)).rstrip(),
        details=details(record),
        usage=USAGE.substitute(
            repo=repo, mode='L' if channels == 1 else 'RGB', width=width, height=height,
            topk=min(5, record['num_classes'])).rstrip())
    if record.get('twin'):
        sections['comparison'] = comparison(record)
    rest = REST.substitute(
        record,
        package=f'fmd-timm=={version}' if version else 'fmd-timm',
        train_images=number(record['train_images']),
        validation_images=number(record['validation_images']),
        model_args=f'`{json.dumps(record["model_args"])}`' if record['model_args'] else 'default arguments',
        differences=_differences(record),
        legs=_legs(record),
        exported=exported_section(record.get('exported', []), repo, height, width),
        article=ARTICLE if method == 'FMDConv' else '',
        init=_origin(init),
        teacher=_teacher(record['teacher']),
        unread_images=_unread(record['unread_images']),
        licence=_licence(licence, init),
        preset=record['preset'] or '-',
        versions=', '.join(f'{package} {version}' for package, version in record['versions'].items()),
        git_commit=f'commit `{record["git_commit"]}`' if record['git_commit'] else '-',
    )
    _, _, text = generate_readme(sections, name).partition('\n---\n')  # whose header has no model-index
    return ModelCard(f'---\n{data.to_yaml()}\n---\n{text}{rest}')


def make_eval_results(record: dict[str, Any], repo: str) -> str | None:
    """The run's top-1 in percent as a file of `.eval_results`, by which the Hub fills the leaderboards of datasets.

    Args:
        record: Of which `make_card` makes a card.
        repo: Of the card; its `result.json` is named as the source.

    Returns:
        None where the dataset is not one of the Hub.
    """
    dataset = _dataset_type(record)
    if '/' not in dataset:
        return None
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=record.get('dataset_config') or 'default',
        value=round(record['top1'], 4),
        date=record['finished'],
        source_url=f'https://huggingface.co/{repo}/blob/main/result.json',
        source_name='Run record',
        notes=f'top-1 accuracy in percent, split {record["validation_split"]}',
    )
    return yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def _dataset_type(record: dict[str, Any]) -> str:
    """An id on the Hub, which has a '/', or a word."""
    return record.get('dataset_type') or record['dataset']  # None but of a folder
