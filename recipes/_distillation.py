"""The teacher of a run: a network whose outputs are learned besides the labels (Hinton et al., arXiv 1503.02531)."""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _classes import known_names, label_names
from _dataset import shortened
from _labels import new_numbers
from _recipe import Recipe
from _sources import find_source, load_network, origin_of
from timm.task import DistillationTeacher
from torch import Tensor, nn


class Teacher(DistillationTeacher):
    """timm's, which says of the student's classes what the network does, and normalises images anew for it.

    Args:
        network: Of timm.
        outputs: Those of the network that are of the student's classes, in their order.
    """

    def __init__(self, network: nn.Module, outputs: np.ndarray):
        super().__init__(network)
        self.register_buffer('outputs', torch.from_numpy(outputs), persistent=False)

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        found = super().forward(input, return_features)
        return found if return_features else found[:, self.outputs]

    def normalize_input(self, input: Tensor, student_mean: Tensor, student_std: Tensor) -> Tensor:
        """Always: timm's first compares the two normalisations, for which the host would wait in every step."""
        return (input * student_std + student_mean - self.mean_kd) / self.std_kd


def load_teacher(recipe: Recipe) -> tuple[nn.Module | None, dict[str, Any] | None]:
    """The network of --kd-model-name and where its weights are from, for the run record; None without one."""
    if recipe.kd_model_name is None:
        return None, None
    source = find_source(recipe.kd_model_name, '--kd-model-name')
    network = load_network(source, '--kd-model-name')
    return network, origin_of(source, network)


def make_teacher(network: nn.Module, classes: list[str], sizes: set[int], say: Callable[[str], None]) -> Teacher:
    """The teacher for images of these classes and sizes.

    Its classes are found by their names, and may be more. One without names has the same number of them.

    Args:
        network: Of `load_teacher`, on the CPU.
        classes: Of the images.
        sizes: Pixels of the square training images.
        say: Prints that there are no names.

    Raises:
        SystemExit: It does not have these classes, or can't see images of these sizes.
    """
    outputs = find_outputs(network, classes, say)
    for size in sizes:
        try:
            with torch.inference_mode():
                network.eval()(torch.zeros(1, 3, size, size))
        except Exception as error:  # each network has its own
            raise SystemExit(
                f'--kd-model-name must be a network for images of {size} pixels, the training images: {error}'
            ) from error
    return Teacher(network, outputs)


def find_outputs(network: nn.Module, classes: list[str], say: Callable[[str], None]) -> np.ndarray:
    """Which output of the teacher is of each class."""
    for names in known_names(network, '--kd-model-name'):
        numbers = new_numbers(classes, names)
        if (numbers >= 0).all():
            return numbers
    theirs = label_names(network, '--kd-model-name')
    if theirs or network.num_classes != len(classes):
        raise SystemExit(
            f'--kd-model-name must be a network of the classes of the images, which are {shortened(classes)}, got '
            f'one of {shortened(theirs) if theirs else f"{network.num_classes} without names"}')
    say('--kd-model-name has no names for its classes: they are matched by their numbers')
    return np.arange(len(classes))
