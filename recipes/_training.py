"""The one training step and the one epoch: recipes/train.py trains with them, recipes/_timing.py times them."""
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import _optim
import torch
from _data import LabelledImages
from _loaders import Normalize
from _measure import synchronize
from _recipe import Recipe
from accelerate import Accelerator
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fmd_timm import set_temperature
from fmd_timm.layers import annealed_temperature


@dataclass
class Training:
    """A network in training: what a step needs and changes."""
    accelerator: Accelerator
    recipe: Recipe  # complete
    model: nn.Module  # prepared by the accelerator
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    normalize: Normalize
    erase: RandomErasing
    mixup: Mixup | None
    criterion: nn.Module  # (B, num_classes) logits and labels -> (B,) losses
    anneals: bool  # whether the temperature falls
    total_steps: int  # of the optimizer
    step: int = 0  # how many of them are done
    temperature: float | None = None  # that was set last

    @property
    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.ema.module if self.ema else self.model

    @property
    def inferring(self) -> nn.Module:
        """That network to time: without DistributedDataParallel, unless it was compiled with it."""
        return self.evaluated if self.recipe.compile else self.accelerator.unwrap_model(self.evaluated)


def make_training(
        accelerator: Accelerator,
        recipe: Recipe,
        network: nn.Module,
        data_config: dict,
        images: LabelledImages,
        total_steps: int,
) -> Training:
    """Put a network on the accelerator's device and build what its training needs.

    Args:
        accelerator: Of the run.
        recipe: Complete, see `_start.complete`.
        network: With a classifier for the images' classes; parameters that do not learn are frozen already.
        data_config: `mean` and `std` of the images.
        images: Those to train on, whose labels the class weights are counted from.
        total_steps: Of the optimizer, in all epochs.
    """
    device, num_classes = accelerator.device, len(images.label_names)
    network.to(device, memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format)
    # None: a checkpoint's temperature stays. To raise it would undo what its attention has learned, and an inflated
    # network needs no high one, because its attention is uniform at any.
    anneals = recipe.temperature is not None and any(
        name.endswith('kernel_temperature') for name, _ in network.named_buffers())
    optimizer = create_optimizer_v2(
        network, opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum,
        param_group_fn=partial(
            _optim.parameter_groups, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
            head_lr_scale=recipe.head_lr_scale),
    )
    ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    model, optimizer = accelerator.prepare(network, optimizer)
    if recipe.compile:
        model.compile()  # with DistributedDataParallel, which then sends gradients while others are computed
        if ema:
            ema.module.compile()
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs, warmup_lr=0.0,
        step_on_epochs=False, updates_per_epoch=total_steps // recipe.epochs,
    )
    mixup, class_weights = None, None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes)
    if recipe.class_weights:
        class_weights = _optim.balanced_class_weights(images.labels(), num_classes).to(device)
    # Not PyTorch's weighted mean: it divides by the weights of the batch, which each process has a part of.
    criterion = nn.CrossEntropyLoss(
        class_weights, reduction='none', label_smoothing=0.0 if mixup else recipe.smoothing)
    return Training(
        accelerator, recipe, model, ema, optimizer, scheduler,
        normalize=Normalize(data_config['mean'], data_config['std'], recipe.channels_last).to(device),
        erase=RandomErasing(recipe.reprob, mode='pixel', device=device), mixup=mixup, criterion=criterion,
        anneals=anneals, total_steps=total_steps,
    )


def train_epoch(training: Training, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Train on batches of images (B, 3, H, W) uint8 and labels (B,); returns the seconds and the last loss.

    Raises:
        SystemExit: The loss is not finite. It is read one step late, when the device has it: to wait for it at once
            would keep the device from being given the next step in time.
    """
    device = training.accelerator.device
    _optim.train_mode(training.model)
    synchronize(device)
    start, pending = time.perf_counter(), None
    for images, labels in batches:
        step, rate = training.step, learning_rate(training.optimizer)
        loss = train_step(training, images, labels)
        if pending:
            check_finite(*pending)
        pending = start_reading(loss), step, rate
    last_loss = check_finite(*pending)
    synchronize(device)
    return time.perf_counter() - start, last_loss


def train_step(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """One backward pass, and where it is the last one of its step also the optimizer's; returns the loss."""
    accelerator, recipe, model = training.accelerator, training.recipe, training.model
    with accelerator.accumulate(model):
        if training.anneals:
            anneal(training)
        images = training.erase(training.normalize(images))
        if training.mixup:
            images, labels = training.mixup(images, labels)
        with accelerator.autocast():
            loss = training.criterion(model(images), labels).mean()
        accelerator.backward(loss)
        if accelerator.sync_gradients and recipe.clip_grad:
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        training.optimizer.step()
        training.optimizer.zero_grad()
    if accelerator.sync_gradients:
        training.step += 1
        training.scheduler.step_update(training.step)
        if training.ema:
            training.ema.update(accelerator.unwrap_model(model), training.step)
    return loss.detach()


def anneal(training: Training) -> None:
    """Set the temperature of this step, where it is another one than that of the step before."""
    recipe = training.recipe
    temperature = annealed_temperature(
        training.step / training.total_steps, recipe.temperature, recipe.annealed_by)
    if temperature != training.temperature:
        set_temperature(training.model, kernel=temperature)
        if training.ema:
            set_temperature(training.ema.module, kernel=temperature)  # the present one, not an average
        training.temperature = temperature


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """That of the schedule, which each group of parameters scales."""
    group = optimizer.param_groups[0]
    return group['lr'] / group['lr_scale']


def start_reading(loss: Tensor) -> Callable[[], float]:
    """Start to copy a loss to the host. The function that comes back waits for no more than that copy."""
    if loss.device.type != 'cuda':
        return loss.item
    copied = loss.to('cpu', non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return copied.item()

    return read


def check_finite(read_loss: Callable[[], float], step: int, rate: float) -> float:
    loss = read_loss()
    if not math.isfinite(loss):
        raise SystemExit(
            f'the loss is {loss} at step {step} with learning rate {rate:.4g}; the last checkpoint is from before it')
    return loss
