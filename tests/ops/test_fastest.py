"""The first of the order, or with torch.backends.cudnn.benchmark the one that is fastest here."""
from types import SimpleNamespace

import pytest
import torch
from inputs import SHAPES, make_inputs

from fmd_timm import dynamic_conv2d
from fmd_timm.ops import fastest as module
from fmd_timm.ops import operator
from fmd_timm.ops.case import Attention, case_of
from fmd_timm.ops.fastest import TURNS, fastest

CASE = case_of(torch.zeros(2, 4, 7, 5), torch.zeros(24, 4, 3, 3), Attention(None), (1, 1), (1, 1), (1, 1), 1)
ALGORITHMS = ['first', 'slow', 'quick']
SECONDS = dict(first=0.03, slow=1.0, quick=0.02)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(module, '_chosen', {})


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)


@pytest.fixture
def runs(monkeypatch):
    """What was run, by a clock that says how long each takes."""
    ran, now = [], [0.0]
    monkeypatch.setattr(module, 'time', SimpleNamespace(perf_counter=lambda: now[0]))

    def run(algorithm):
        ran.append(algorithm)
        now[0] += SECONDS[algorithm]

    run.ran = ran
    return run


def test_the_first_of_the_order_runs_untimed(runs):
    assert fastest('forward', CASE, ALGORITHMS, runs) == 'first'
    assert not runs.ran


def test_with_the_switch_on_the_fastest_runs_and_each_case_is_timed_once(benchmark, runs):
    assert fastest('forward', CASE, ALGORITHMS, runs) == 'quick'
    count = len(runs.ran)
    assert fastest('forward', CASE, ALGORITHMS, runs) == 'quick' and len(runs.ran) == count
    fastest('forward', CASE._replace(batch=3), ALGORITHMS, runs)
    fastest('backward', CASE, ALGORITHMS, runs)
    assert len(runs.ran) == 3 * count


def test_another_number_of_threads_is_timed_anew(benchmark, runs, monkeypatch):
    fastest('forward', CASE, ALGORITHMS, runs)
    count = len(runs.ran)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 77)
    fastest('forward', CASE, ALGORITHMS, runs)
    assert len(runs.ran) == 2 * count


def test_an_algorithm_that_takes_twice_the_best_time_is_timed_once(benchmark, runs):
    fastest('forward', CASE, ALGORITHMS, runs)
    assert {name: runs.ran.count(name) for name in ALGORITHMS} == dict(first=1 + TURNS, slow=2, quick=1 + TURNS)


def test_a_slow_first_run_misleads_nobody(benchmark, runs, monkeypatch):
    """It may compile something."""
    def run(algorithm):
        monkeypatch.setitem(SECONDS, 'quick', 0.02 if 'quick' in runs.ran else 5.0)
        runs(algorithm)

    assert fastest('forward', CASE, ALGORITHMS, run) == 'quick'


def test_what_was_fastest_among_others_is_not_taken(benchmark, runs):
    """Two layers of one case may support different algorithms: one of them has a bias, say."""
    fastest('prepared', CASE, ALGORITHMS, runs)
    assert fastest('prepared', CASE, ['first', 'slow'], runs) == 'first'


def test_a_single_algorithm_is_not_timed(benchmark, runs):
    assert fastest('forward', CASE, ['slow'], runs) == 'slow' and not runs.ran


def test_deterministic_algorithms_are_the_first_of_the_order(benchmark, runs):
    fastest('forward', CASE, ALGORITHMS, runs)
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest('forward', CASE, ALGORITHMS, runs) == 'first'
    finally:
        torch.use_deterministic_algorithms(False)


def test_while_a_graph_is_captured_nothing_is_timed(benchmark, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    on_gpu = CASE._replace(device=torch.device('cuda', 0))
    assert fastest('forward', on_gpu, ALGORITHMS, runs) == 'first' and not runs.ran
    module._chosen['forward', on_gpu, tuple(ALGORITHMS), torch.get_num_threads()] = 'quick'
    assert fastest('forward', on_gpu, ALGORITHMS, runs) == 'quick' and not runs.ran


def test_an_algorithm_without_enough_memory_is_not_chosen(benchmark, runs):
    def run(algorithm):
        if algorithm == 'quick':
            raise torch.OutOfMemoryError('out of memory')
        runs(algorithm)

    assert fastest('forward', CASE, ALGORITHMS, run) == 'first'


def test_other_errors_are_not_hidden(benchmark):
    def run(algorithm):
        raise RuntimeError('wrong')

    with pytest.raises(RuntimeError, match='wrong'):
        fastest('forward', CASE, ALGORITHMS, run)


def test_timed_results_and_gradients_are_those_of_the_definition(benchmark):
    tensors, conv_args = make_inputs(*SHAPES['3x3'])
    timed = torch.autograd.grad(dynamic_conv2d(**tensors, **conv_args).square().sum(), list(tensors.values()))
    assert {question for question, *_ in module._chosen} == {'forward', 'backward'}
    torch.backends.cudnn.benchmark = False
    in_order = torch.autograd.grad(dynamic_conv2d(**tensors, **conv_args).square().sum(), list(tensors.values()))
    for gradient, expected in zip(timed, in_order):
        torch.testing.assert_close(gradient, expected)


def test_a_compiled_convolution_is_timed_when_it_runs(benchmark):
    tensors, conv_args = make_inputs(*SHAPES['1x1'])
    tensors = {name: t.detach() for name, t in tensors.items()}
    expected = dynamic_conv2d(**tensors, **conv_args)
    module._chosen.clear()
    compiled = torch.compile(dynamic_conv2d, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(**tensors, **conv_args), expected)
    assert len(module._chosen) == 1 and len(operator.algorithms('forward', list(module._chosen)[0][1])) > 1
