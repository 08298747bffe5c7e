"""Whether the record of a run can be true: publish.py refuses one that contradicts itself."""
import math
import re
from collections.abc import Iterator
from typing import Any

from _record import training_times

from fmd_timm.scores import ies_infer, rcs_infer

COUNTS = (
    'epochs', 'best_epoch', 'steps_per_epoch', 'train_images', 'validation_images', 'num_classes', 'parameters',
    'device_count', 'global_batch', 'infer_batch',
)
POSITIVE = 'gmacs', 'macts', 'infer_ms_per_image', 'infer_images_per_second'
POSITIVE_OR_NONE = (
    'median_epoch_seconds', 'ies', 'rcs', 'train_images_per_second', 'ies_infer', 'rcs_infer', 'peak_memory_mib')
PERCENT = 'top1', 'top5', 'best_top1'
NEEDED = (*COUNTS, *POSITIVE, *PERCENT, 'loss', 'recipe', 'legs', 'epoch_seconds', 'weights_sha256')
# Names in the record and in its recipe of what must be the same, unless the recipe leaves it open.
AS_ASKED = dict(
    model='model', epochs='epochs', global_batch='batch_size', seed='seed', precision='precision', dataset='dataset')
OPEN = None, 'auto'
DATASET_TYPE = r'(?:[\w-]+/)?[\w.-]+'  # that the Hub takes


def check_record(record: dict[str, Any]) -> None:
    """Check the values of a complete record (`fmd_timm.model_card` says which those are) and what follows from others.

    Raises:
        ValueError: It is of an older version of this package, or what it says can't be true; says all of it.
    """
    missing = [name for name in NEEDED if record.get(name) is None]
    if missing:
        raise ValueError(f'it has no {", ".join(missing)}: it is of an older fmd_timm, train again to publish')
    for rules in _impossible_values, _contradictions:  # the second computes with what the first has checked
        found = list(rules(record))
        if found:
            raise ValueError('; '.join(found))


def _impossible_values(record: dict[str, Any]) -> Iterator[str]:
    for name in COUNTS:
        if type(record[name]) is not int or record[name] < 1:
            yield f'{name} must be a whole number of at least 1, got {record[name]!r}'
    for name in POSITIVE + POSITIVE_OR_NONE:
        if not _is_number(record[name]) and (record[name] is not None or name in POSITIVE):
            yield f'{name} must be a number, got {record[name]!r}'
        elif record[name] is not None and record[name] <= 0:
            yield f'{name} must be positive, got {record[name]!r}'
    for name in PERCENT:
        if not _is_number(record[name]) or not 0 <= record[name] <= 100:
            yield f'{name} must be from 0 to 100, got {record[name]!r}'
    for name, most in ('kernel_entropy', 1 + 1e-6), ('gate_std', 1.0), ('kernel_distance', math.inf):
        if record[name] is not None and not (_is_number(record[name]) and 0 <= record[name] <= most):
            yield f'{name} must be from 0 to {most:g}, got {record[name]!r}'
    if not _is_number(record['loss']) or record['loss'] < 0:
        yield f'loss must be at least 0, got {record["loss"]!r}'
    seconds = record['epoch_seconds']
    if not isinstance(seconds, list) or not all(_is_number(s) and s > 0 for s in seconds):
        yield f'epoch_seconds must be positive numbers, got {seconds!r}'
    dataset_type = record.get('dataset_type') or record['dataset']
    if not re.fullmatch(DATASET_TYPE, str(dataset_type), re.ASCII):
        yield f'dataset_type must be an id on the Hub or a word such as imagefolder, got {dataset_type!r}'
    if not isinstance(record['recipe'], dict):
        yield f'recipe must be an object, got {record["recipe"]!r}'


def _contradictions(record: dict[str, Any]) -> Iterator[str]:
    if record['top1'] > record['top5']:
        yield f'top1 is {record["top1"]} and above top5, which is {record["top5"]}'
    if record['best_top1'] < record['top1'] or record['best_epoch'] > record['epochs']:
        yield f'best_top1 is {record["best_top1"]} in epoch {record["best_epoch"]}, which was not the best'
    names = record.get('label_names')
    if names is not None and len(names) != record['num_classes']:
        yield f'num_classes is {record["num_classes"]}, and label_names are {len(names)}'
    try:
        in_legs = [seconds for leg in record['legs'] for seconds in leg['epoch_seconds']]
        expected = training_times(record)
    except (KeyError, TypeError) as error:
        yield f'legs are not those of a run ({type(error).__name__}: {error})'
        return
    if in_legs != record['epoch_seconds'] or len(in_legs) != record['epochs']:
        yield (
            f'epochs is {record["epochs"]}, epoch_seconds are {len(record["epoch_seconds"])}, those of its legs '
            f'{len(in_legs)} or others')
    expected['ies_infer'] = ies_infer(record['infer_ms_per_image'], record['top1'] / 100)
    expected['rcs_infer'] = rcs_infer(record['infer_images_per_second'], record['top1'] / 100)
    for name, value in expected.items():
        if (value is None) != (record[name] is None) or value and not math.isclose(record[name], value, rel_tol=1e-6):
            yield f'{name} is {record[name]!r}, and {value!r} by what it is computed from'
    for name, option in AS_ASKED.items():
        asked, found = record['recipe'].get(option), record[name]
        if name == 'dataset' and record.get('dataset_type'):
            continue  # a folder, which may be asked for by a link
        if asked not in OPEN and asked != found:
            yield f'{name} is {found!r}, and {asked!r} in its recipe'


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
