"""Which of the algorithms runs: the first of the device's order, or the one that is fastest here.

The switch is PyTorch's own for its convolutions, `torch.backends.cudnn.benchmark`. Off, the first of the order runs, so
that results repeat bit for bit. On, each case is timed once, in a few runs of each algorithm, and the choice is kept
for the process.
"""
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch

from .case import Case

TURNS = 3  # in which the algorithms are timed; one that takes twice as long as another has no more than one

_chosen: dict[tuple, ModuleType] = {}


def fastest(
        question: str,
        case: Case,
        algorithms: list[ModuleType],
        run: Callable[[ModuleType], object],
        may_time: bool | None = None,
) -> ModuleType:
    """One of the algorithms.

    Deterministic algorithms (`torch.use_deterministic_algorithms`) are the first of the order, too. While a CUDA graph
    is captured nothing is timed: it gets what was chosen before, or the first of the order.

    Args:
        question: What is asked for: 'forward', 'backward' or 'prepared'.
        case: Of the convolution.
        algorithms: Those that support the case, expected fastest first.
        run: Runs the case by one of them.
        may_time: Whether to time; None asks the switch.
    """
    if may_time is None:
        may_time = torch.backends.cudnn.benchmark
    if len(algorithms) == 1 or not may_time or torch.are_deterministic_algorithms_enabled():
        return algorithms[0]
    key = question, case, tuple(algorithms), torch.get_num_threads()
    if key not in _chosen:
        if case.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
            return algorithms[0]
        # They take turns, so that a moment in which the machine is busy slows all of them. The first turn warms up.
        shortest = dict.fromkeys(algorithms, float('inf'))
        for turn in range(1 + TURNS):
            for algorithm in algorithms:
                if turn < 2 or shortest[algorithm] < 2 * min(shortest.values()):
                    seconds = _seconds(partial(run, algorithm), case.device)
                    shortest[algorithm] = min(shortest[algorithm], seconds if turn else float('inf'))
        _chosen[key] = min(shortest, key=shortest.get)
    return _chosen[key]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    try:
        if device.type == 'cuda':
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    except torch.OutOfMemoryError:
        return float('inf')
