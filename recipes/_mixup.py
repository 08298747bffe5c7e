"""Mixup and CutMix that do not depend on how a batch is shared out to processes and backward passes."""
import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from fmd_timm.ops.case import memory_format


class BatchMixup(Mixup):
    """timm's Mixup, by one draw for all images of an optimizer step.

    timm's mixes the first image with the last one, by a draw of each process. This one mixes neighbours, by a draw of
    the seed and the step: a recipe means the same on any number of processes, and a resumed run draws the same.

    Args:
        *args: As of timm's.
        seed: Of the draws.
        **kwargs: As of timm's.
    """

    def __init__(self, *args, seed: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed = seed

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixed images (B, C, H, W) in another order, and their targets (B, num_classes)."""
        each = torch.arange(len(images), device=images.device)
        order = torch.cat([each[::2], each[1::2].flip(0)])  # 0, 2, 4, ..., 5, 3, 1: timm's partners are neighbours
        state = np.random.get_state()
        np.random.seed(np.random.SeedSequence((self.seed, step)).generate_state(1)[0])
        try:
            return super().__call__(images[order].contiguous(memory_format=memory_format(images)), labels[order])
        finally:
            np.random.set_state(state)
