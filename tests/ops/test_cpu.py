"""The order of the algorithms on the CPU."""
import pytest
import torch

from fmd_timm.ops import c_conv, cpu, per_image, per_kernel
from fmd_timm.ops.case import Attention, case_of


def make_case(batch=2, K=4, I=32, O=32, kernel=3, groups=1, size=7, taps=False):
    x = torch.zeros(batch, I, size, size, device='meta').to(memory_format=torch.channels_last)
    weight = torch.zeros(K * O, I // groups, kernel, kernel, device='meta').to(memory_format=torch.channels_last)
    tap_attn = torch.zeros(batch, kernel ** 2, device='meta') if taps else None
    attention = Attention(torch.zeros(batch, K, device='meta'), None, None, tap_attn)
    case = case_of(x, weight, attention, (1, 1), (kernel // 2, kernel // 2), (1, 1), groups)
    return case._replace(device=torch.device('cpu'))


CASES = [
    make_case(batch=batch, K=K, groups=groups, size=size, taps=taps)
    for batch in (1, 2, 64) for K in (1, 4) for groups in (1, 2, 32) for size in (1, 7, 14, 28)
    for taps in (False, True)
]


@pytest.mark.parametrize('question', ['forward', 'backward', 'prepared'])
def test_every_case_has_algorithms_that_support_it(question):
    direction = 'backward' if question == 'backward' else 'forward'
    for case in CASES:
        order = cpu.algorithms(question, case)
        assert order and len(order) == len({algorithm.__name__ for algorithm in order})
        assert all(algorithm.supports(case) and hasattr(algorithm, direction) for algorithm in order)


def test_one_kernel_is_a_plain_convolution_and_depthwise_ones_have_a_kernel_per_image():
    assert cpu.algorithms('forward', make_case(K=1)) == [per_kernel]
    assert cpu.algorithms('backward', make_case(K=1)) == [per_kernel]
    assert cpu.algorithms('forward', make_case(groups=32)) == [per_image]


@pytest.mark.parametrize('capability, question, place', [
    ('AVX512', 'forward', 0), ('AVX512', 'backward', 0), ('AVX2', 'forward', -1), ('AVX2', 'backward', 0),
    ('DEFAULT', 'forward', -1), ('DEFAULT', 'backward', -1),
])
def test_c_comes_first_where_the_vectors_are_wide_enough_for_it_and_last_elsewhere(
        capability, question, place, monkeypatch):
    monkeypatch.setattr(c_conv, 'supports', lambda case: True)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert cpu.algorithms(question, make_case())[place] is c_conv


def test_in_a_prepared_network_c_comes_first_on_every_processor(monkeypatch):
    monkeypatch.setattr(c_conv, 'supports', lambda case: True)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX2')
    assert cpu.algorithms('prepared', make_case(size=40))[0] is c_conv


def test_large_images_are_convolved_one_by_one():
    assert cpu.algorithms('backward', make_case(size=40))[0] is per_image
