"""Efficiency scores: one number for speed and accuracy together, as the FMDConv paper reports (arXiv 2503.17530).

`ies` is the inverse efficiency score of Townsend & Ashby (1978, 1983): in psychology the mean time of the correct
responses divided by the proportion of correct ones. `rcs` is the rate correct score of Woltz & Was (2006): the number
of correct responses divided by the time of all of them. For a network the time T is the median wall time of a warm
training epoch and the accuracy is its top-1 as a fraction, so that

    ies = T / accuracy [s],  rcs = accuracy / T [1/s]

are exact reciprocals: one fact in two forms. `ies_infer` and `rcs_infer` are the same for inference, where the time
is that of one image and the units are those of the original definitions.

All depend on the hardware, so compare them only where device, device count, precision, resolution and batch agree. The
training scores ignore the number of epochs. Halving T outweighs any gain of accuracy above one half, so print T and the
accuracy beside a score.

An accuracy of 0 has no score: all four return None then.
"""
__all__ = ['ies', 'ies_infer', 'rcs', 'rcs_infer']


def ies(epoch_seconds: float, accuracy: float) -> float | None:
    """Inverse efficiency score of training, T / accuracy [s]; lower is better.

    Args:
        epoch_seconds: Median wall time T of the training epochs after the first, without evaluation, in seconds.
        accuracy: Top-1 as a fraction, 0.0 .. 1.0.

    Raises:
        ValueError: The time is not positive and finite, or the accuracy is not a fraction.
    """
    _check('epoch_seconds', epoch_seconds, accuracy)
    return epoch_seconds / accuracy if accuracy > 0 else None


def rcs(epoch_seconds: float, accuracy: float) -> float | None:
    """Rate correct score of training, accuracy / T [1/s]; higher is better. Arguments and errors of `ies`."""
    _check('epoch_seconds', epoch_seconds, accuracy)
    return accuracy / epoch_seconds if accuracy > 0 else None


def ies_infer(ms_per_image: float, accuracy: float) -> float | None:
    """Inverse efficiency score of inference, milliseconds per correct image; lower is better.

    Args:
        ms_per_image: Wall time of one image in milliseconds.
        accuracy: Top-1 as a fraction, 0.0 .. 1.0.

    Raises:
        ValueError: The time is not positive and finite, or the accuracy is not a fraction.
    """
    _check('ms_per_image', ms_per_image, accuracy)
    return ms_per_image / accuracy if accuracy > 0 else None


def rcs_infer(images_per_second: float, accuracy: float) -> float | None:
    """Rate correct score of inference, correct images per second; higher is better.

    Args:
        images_per_second: Throughput.
        accuracy: Top-1 as a fraction, 0.0 .. 1.0.

    Raises:
        ValueError: The rate is not positive and finite, or the accuracy is not a fraction.
    """
    _check('images_per_second', images_per_second, accuracy)
    return images_per_second * accuracy if accuracy > 0 else None


def _check(name: str, value: float, accuracy: float) -> None:
    if not 0 < value < float('inf'):
        raise ValueError(f'{name} must be positive and finite, got {value}')
    if not 0 <= accuracy <= 1:
        raise ValueError(f'accuracy must be a fraction, 0.0 .. 1.0 and not percent, got {accuracy}')
