import math

import pytest

from fmd_timm.scores import ies, ies_infer, rcs, rcs_infer

SCORES = [
    (ies, 'epoch_seconds'), (rcs, 'epoch_seconds'), (ies_infer, 'ms_per_image'), (rcs_infer, 'images_per_second'),
]


def test_values_worked_out_by_hand():
    assert ies(600, 0.9) == pytest.approx(666.67, abs=0.01)  # 600 ms, 10 % errors: doi 10.5334/joc.6
    assert rcs(8, 0.5) == 0.0625
    assert ies_infer(0.25, 0.5) == 0.5  # every second image is right, so a right one takes twice the time
    assert rcs_infer(4000, 0.75) == 3000


def test_training_scores_are_reciprocals():
    assert ies(12.3, 0.87) * rcs(12.3, 0.87) == pytest.approx(1)


@pytest.mark.parametrize('score,_', SCORES)
def test_accuracy_0_has_no_score(score, _):
    assert score(1.5, 0.0) is None


@pytest.mark.parametrize('accuracy', [94.21, 1.0001, -0.1, math.nan, math.inf])
@pytest.mark.parametrize('score,_', SCORES)
def test_accuracy_has_to_be_a_fraction(score, _, accuracy):
    with pytest.raises(ValueError, match=f'accuracy must be a fraction.*got {accuracy}'):
        score(1.5, accuracy)


@pytest.mark.parametrize('value', [0, -1.5, math.nan, math.inf])
@pytest.mark.parametrize('score,name', SCORES)
def test_times_and_rates_have_to_be_positive_and_finite(score, name, value):
    for accuracy in 0.0, 0.5:
        with pytest.raises(ValueError, match=f'{name} must be positive and finite, got {value}'):
            score(value, accuracy)
