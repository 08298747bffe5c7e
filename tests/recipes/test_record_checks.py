"""recipes/_record_checks.py: what can't be true of a run is not published."""
import json
from pathlib import Path

import pytest
from _record_checks import NEEDED, check_record
from inputs import make_record

RESULTS = Path(__file__).parents[2] / 'recipes' / 'results'


def test_what_training_leaves_is_consistent():
    check_record(make_record())
    check_record(make_record(  # nothing was right
        top1=0.0, ies=None, rcs=None, ies_infer=None, rcs_infer=None, recipe=dict(precision='auto', model=None)))


@pytest.mark.parametrize('changes, message', [
    (dict(top1=5000), 'top1 must be from 0 to 100, got 5000'),
    (dict(top1=-3.0), 'top1 must be from 0 to 100, got -3.0'),
    (dict(top5=True), 'top5 must be from 0 to 100, got True'),
    (dict(top1='97'), "top1 must be from 0 to 100, got '97'"),
    (dict(top5=90.0), 'top1 is 97.2.* and above top5, which is 90.0'),
    (dict(loss=-0.1), 'loss must be at least 0'),
    (dict(loss=float('nan')), 'loss must be at least 0, got nan'),
    (dict(best_top1=50.0), 'best_top1 is 50.0 in epoch 3, which was not the best'),
    (dict(best_epoch=4), 'epoch 4, which was not the best'),
    (dict(epochs=0), 'epochs must be a whole number of at least 1, got 0'),
    (dict(train_images=10.5), 'train_images must be a whole number of at least 1, got 10.5'),
    (dict(epochs=2, best_epoch=2), 'epochs is 2, epoch_seconds are 3'),
    (dict(epoch_seconds=[9.1, -1.2, 1.3]), 'epoch_seconds must be positive numbers'),
    (dict(epoch_seconds=[9.1, 1.1, 1.3]), 'those of its legs 3 or others'),
    (dict(legs=[{}]), 'legs are not those of a run .KeyError'),
    (dict(median_epoch_seconds=1.2), 'median_epoch_seconds is 1.2, and 1.25 by what it is computed from'),
    (dict(ies=1.0), 'ies is 1.0, and 1.28'),
    (dict(rcs=None), 'rcs is None, and 0.7'),
    (dict(rcs_infer=9e9), 'rcs_infer is 9000000000.0, and 78901.3'),
    (dict(device_count=8), 'median_epoch_seconds is 1.25, and None by'),  # on which no epoch was trained
    (dict(infer_ms_per_image=0), 'infer_ms_per_image must be positive, got 0'),
    (dict(peak_memory_mib='much'), "peak_memory_mib must be a number, got 'much'"),
    (dict(kernel_entropy=1.5), 'kernel_entropy must be from 0 to 1, got 1.5'),
    (dict(label_names=['a', 'b']), 'num_classes is 10, and label_names are 2'),
    (dict(seed=8), 'seed is 8, and 7 in its recipe'),
    (dict(dataset='flowers'), "dataset is 'flowers', and 'digits' in its recipe"),
    (dict(recipe=dict(precision='fp16')), "precision is 'bf16', and 'fp16' in its recipe"),
    (dict(dataset_type='my flowers'), "dataset_type must be an id on the Hub .* got 'my flowers'"),
    (dict(recipe=[]), 'recipe must be an object'),
])
def test_what_cannot_be_true_is_said(changes, message):
    with pytest.raises(ValueError, match=message):
        check_record(make_record(**changes))


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match='epochs must .*; top1 must .*; loss must'):
        check_record(make_record(epochs=0, top1=101, loss=-1))


@pytest.mark.parametrize('name', NEEDED)
def test_a_record_of_before_is_refused_with_a_sentence(name):
    with pytest.raises(ValueError, match=f'it has no {name}: it is of an older fmd_timm, train again to publish'):
        check_record(make_record(**{name: None}))


def test_the_committed_records_are_of_before():
    for path in RESULTS.glob('*/*/seed_*/result.json'):
        record = json.loads(path.read_text())
        if 'weights_sha256' not in record:
            with pytest.raises(ValueError, match='has no .*weights_sha256: it is of an older fmd_timm'):
                check_record(record)
