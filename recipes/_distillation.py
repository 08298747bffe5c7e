"""The teacher of a run: a network whose outputs are learned besides the labels (Hinton et al., arXiv 1503.02531)."""
from typing import Any

import torch
from _classes import label_names as names_of
from _recipe import Recipe
from _start import find_source, load_network, origin_of
from timm.task import DistillationTeacher
from torch import Tensor, nn


class Teacher(DistillationTeacher):
    """timm's, which normalises images anew for the teacher."""

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


def check_teacher(network: nn.Module, label_names: list[str], sizes: set[int]) -> None:
    """Refuse a teacher whose classes are others than the images', or that can't see images of these sizes.

    Args:
        network: The teacher, on the CPU.
        label_names: The images' classes.
        sizes: Pixels of the square training images.

    Raises:
        SystemExit: Says what differs.
    """
    theirs = names_of(network, '--kd-model-name')
    if network.num_classes != len(label_names) or (theirs and theirs != label_names):
        raise SystemExit(
            f'--kd-model-name must be a network of the {len(label_names)} classes of the images, in their order, got '
            f'one of {network.num_classes}: {", ".join(theirs) if theirs else "without names"}'
        )
    for size in sizes:
        try:
            with torch.inference_mode():
                network.eval()(torch.zeros(1, 3, size, size))
        except Exception as error:  # each network has its own
            raise SystemExit(
                f'--kd-model-name must be a network for images of {size} pixels, the training images: {error}'
            ) from error
