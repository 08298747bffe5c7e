"""Images of a dataset that numbers its classes in its own way, for a checkpoint that numbers them in another."""
from collections.abc import Callable

from _classes import known_names, label_names
from _data import LabelledImages
from _labels import are_numbers, new_numbers
from torch import nn


def match_classes(images: LabelledImages, network: nn.Module, what: str, say: Callable[[str], None]) -> None:
    """Number the images' classes as the checkpoint does: by their names, or as they are where one has none.

    Args:
        images: Those to evaluate; their classes may be some of the checkpoint's, in any order.
        network: The checkpoint's.
        what: What to call the checkpoint.
        say: Prints that there are no names.

    Raises:
        SystemExit: There are classes that the checkpoint does not have.
    """
    names, known = label_names(network, what), known_names(network, what)
    for candidates in known:
        if (new_numbers(images.label_names, candidates)[images.targets] >= 0).all():
            return images.use_classes(candidates, what)
    count, numbered = len(images.label_names), are_numbers(images.label_names)
    if known and not numbered and (names or count < network.num_classes):
        images.use_classes(known[0], what)  # which names those that it has not
    if count > network.num_classes or count < network.num_classes and not numbered:
        raise SystemExit(
            f'{images.name} has {count} classes, {what} was trained for {network.num_classes}, whose names it does '
            f'not have')
    say(f'classes are matched by their numbers: the {"dataset" if numbered else "checkpoint"} has no names for them')
