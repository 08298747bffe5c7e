"""The difference between two arms of an experiment, whose runs with the same seed have the same images and batches."""
import statistics


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean and its standard error, which one value does not have."""
    error = statistics.stdev(values) / len(values)**0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def paired_difference(runs: dict[int, dict], others: dict[int, dict]) -> tuple[float, float | None]:
    """Points of top-1 by which runs are ahead of others, by the seeds that both have, and the standard error."""
    return mean_and_error([run['top1'] - others[seed]['top1'] for seed, run in runs.items() if seed in others])


def with_error(value: float, error: float | None, sign: str = '') -> str:
    """'1.23 ± 0.45', or '+1.23 ± 0.45' where `sign` is '+'."""
    return f'{value:{sign}.2f}' + ('' if error is None else f' ± {error:.2f}')
