"""recipes/_measure.py: what is counted of a network."""
import pytest
import timm
from _measure import count_gmacs, count_macts


@pytest.mark.parametrize('name, gmacs, macts', [('resnet18', 1.82, 2.48), ('mobilenetv3_small_100', 0.06, 1.42)])
def test_multiplications_and_activations_are_those_of_timms_tables(name, gmacs, macts):
    network = timm.create_model(name)
    assert count_gmacs(network, (3, 224, 224)) == pytest.approx(gmacs, abs=0.01)
    assert count_macts(network, (3, 224, 224)) == pytest.approx(macts, abs=0.01)


def test_an_attention_adds_few_activations():
    static, dynamic = (count_macts(timm.create_model(name), (3, 32, 32)) for name in ('resnet18', 'resnet18_fmd'))
    assert static < dynamic < 1.2 * static
