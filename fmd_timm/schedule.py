"""The temperature of the kernel attention as a function of training progress.

Dynamic Convolution (arXiv 1912.03458) trains with softmax temperature 30, so that all K kernels learn from
the start, and lowers it linearly to 1 over the first 10 epochs; FMDConv (arXiv 2503.17530) anneals it too.
"""

__all__ = ['annealed_temperature']


def annealed_temperature(progress: float, start: float = 30.0, annealed_by: float = 0.1) -> float:
    """Temperature after a share of training: linear from `start` to 1, and 1 from `annealed_by` on.

    Args:
        progress: Share of all optimizer steps done, 0 to 1.
        start: Temperature at progress 0. 30 as in the paper.
        annealed_by: Progress at which it reaches 1. 0.1 is the first 10 epochs of 100; 0 never anneals, always 1.

    Raises:
        ValueError: `progress` or `annealed_by` is outside [0, 1], or `start` is not positive.
    """
    for name, share in ('progress', progress), ('annealed_by', annealed_by):
        if not 0 <= share <= 1:
            raise ValueError(f'{name} must be between 0 and 1, got {share}')
    if not 0 < start < float('inf'):
        raise ValueError(f'start must be a positive temperature, got {start}')
    if progress >= annealed_by:
        return 1.0
    return start + (1.0 - start) * progress / annealed_by
