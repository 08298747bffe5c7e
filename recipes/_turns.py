"""Runs that take turns, so that a machine that drifts favours none of them, and what one takes relative to another."""
import statistics
import time
from collections.abc import Callable

import torch
from _measure import synchronize
from tqdm import tqdm

STATIC = 'static', 'static channels_last'  # runs of the same network, of which the faster one is compared with


def take_turns(
        runs: dict[str, Callable[[], None]], device: torch.device, rounds: int, label: str,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of each run in each round, after one that warms up, and the peak memory of the device in MiB."""
    milliseconds, peak = {name: [] for name in runs}, {}
    bar = tqdm(total=(1 + rounds) * len(runs), desc=label, leave=False, mininterval=1)
    repeats = dict.fromkeys(runs, 1)
    for turn in range(1 + rounds):
        for name in runs if turn % 2 else reversed(runs):
            if device.type == 'cuda':
                torch.cuda.reset_peak_memory_stats()
            runs[name]()  # which has its memory and its data in the caches again, after the others
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                runs[name]()
            synchronize(device)
            seconds = (time.perf_counter() - start) / repeats[name]
            if turn:
                milliseconds[name].append(1000 * seconds)
            else:
                repeats[name] = min(max(int(0.3 / seconds), 1), 100)
            if device.type == 'cuda':
                peak[name] = torch.cuda.max_memory_allocated() / 2**20
            bar.update()
    bar.close()
    return milliseconds, peak


def ratio(milliseconds: dict[str, list[float]], run: str) -> float:
    """Median over the rounds of a run's time against the static network's in the same round."""
    static = min((name for name in milliseconds if name in STATIC), key=lambda name: statistics.median(
        milliseconds[name]))
    return statistics.median(a / b for a, b in zip(milliseconds[run], milliseconds[static]))
