"""The one training step and the one epoch: recipes/train.py trains with them, recipes/_timing.py times them."""
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import _optim
import torch
from _accelerator import exchange, images_per_pass
from _data import LabelledImages
from _distillation import Teacher
from _interruptions import Interruptions
from _loaders import Normalize
from _measure import synchronize
from _mixup import BatchMixup
from _recipe import Recipe
from accelerate import Accelerator
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fmd_timm import set_temperature
from fmd_timm.layers import annealed_temperature
from fmd_timm.layers.attention import PooledBatchNorm

FEWEST_IMAGES = 16  # of a process and backward pass, for the statistics of the attention's BatchNorm


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
    mixup: BatchMixup | None
    task: TrainingTask  # images and labels -> the loss of the model's outputs
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
        teacher: Teacher | None = None,
) -> Training:
    """Put a network on the accelerator's device and build what its training needs.

    Args:
        accelerator: Of the run.
        recipe: Complete, see `_start.complete`.
        network: With a classifier for the images' classes; parameters that do not learn are frozen already.
        data_config: `mean` and `std` of the images.
        images: Those to train on, whose labels the class weights are counted from.
        total_steps: Of the optimizer, in all epochs.
        teacher: Whose outputs are learned too.
    """
    device, num_classes = accelerator.device, len(images.label_names)
    memory_format = torch.channels_last if recipe.channels_last else torch.preserve_format
    say_few_images(accelerator, recipe, network)
    if recipe.sync_bn and accelerator.num_processes > 1:
        network = convert_sync_batchnorm(network)
    network.to(device, memory_format=memory_format)
    ema = ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    model, optimizer = accelerator.prepare(network, _optim.make_optimizer(recipe, network))
    if recipe.compile:
        model.compile()  # with DistributedDataParallel, which then sends gradients while others are computed
        if ema:
            ema.module.compile()
    mixup = None
    if recipe.mixes:
        mixup = BatchMixup(
            recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=num_classes, seed=recipe.seed)
    labels = images.labels() if recipe.class_weights else None
    task = dict(criterion=_optim.make_criterion(recipe, labels, num_classes), device=device, verbose=False)
    if teacher is None:
        task = ClassificationTask(model, **task)
    else:
        teacher.to(device, memory_format=memory_format)
        task = LogitDistillationTask(
            model, teacher, task_loss_weight=recipe.task_loss_weight,
            distill_loss_weight=recipe.distill_loss_weight, temperature=recipe.kd_temperature, **task)
        if recipe.compile:
            teacher.model.compile()
    return Training(
        accelerator, recipe, model, ema, optimizer,
        _optim.make_scheduler(recipe, optimizer, total_steps // recipe.epochs),
        normalize=Normalize(data_config['mean'], data_config['std'], recipe.channels_last).to(device),
        erase=RandomErasing(recipe.reprob, mode='pixel', device=device), mixup=mixup, task=task,
        anneals=anneals(recipe, network), total_steps=total_steps,
    )


def say_few_images(accelerator: Accelerator, recipe: Recipe, network: nn.Module) -> None:
    """A pooled image is one value: BatchNorm's statistics are of as many values as a process has images in a pass."""
    images = images_per_pass(accelerator, recipe)
    pooled = any(isinstance(module, PooledBatchNorm) for module in network.modules())
    if pooled and images < FEWEST_IMAGES and not recipe.sync_bn:
        accelerator.print(
            f'warning: the attention takes its BatchNorm statistics of {images} images, those of one process and pass; '
            f'{FEWEST_IMAGES} or more are better: --batch-size, --accumulate, or --sync-bn on several GPUs')


def train_epoch(
        training: Training,
        batches: Iterable[tuple[Tensor, Tensor]],
        interruptions: Interruptions,
        show: Callable[[float], None] = lambda loss: None,
) -> tuple[float, float]:
    """Train on batches of images (B, 3, H, W) uint8 and labels (B,), to the last one or until a step is interrupted.

    Loss and interruptions are read one step late, when the device has them: to wait for them at once would keep the
    device from being given the next step in time. `show` is given each loss.

    Returns:
        The seconds, and the loss of the last batch, the mean of all processes.

    Raises:
        SystemExit: The loss is not finite.
    """
    accelerator, pending = training.accelerator, None

    def arrive(read: Callable[[], list[float]], step: int, rate: float) -> float:
        loss, *wishes = read()
        interruptions.hear(*wishes)
        show(loss)
        return check_finite(loss, step, rate)

    _optim.train_mode(training.model)
    synchronize(accelerator.device)
    start = time.perf_counter()
    for images, labels in batches:
        step, rate = training.step, learning_rate(training.optimizer)
        loss = train_step(training, images, labels)
        if pending:
            arrive(*pending)
        pending = exchange(accelerator, loss, *interruptions.wishes()), step, rate
        if interruptions.pending and accelerator.sync_gradients:
            break
    loss = arrive(*pending)
    synchronize(accelerator.device)
    return time.perf_counter() - start, loss


def train_step(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """One backward pass, and where it is the last one of its step also the optimizer's; returns this process's loss."""
    accelerator, recipe, model = training.accelerator, training.recipe, training.model
    with accelerator.accumulate(model):
        if training.anneals:
            anneal(training)
        images = training.erase(training.normalize(images))
        if training.mixup:
            images, labels = training.mixup(images, labels, training.step)
        with accelerator.autocast():
            loss = training.task(images, labels)['loss'].mean()
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


def anneals(recipe: Recipe, network: nn.Module) -> bool:
    """Whether the temperature falls in training.

    None in the recipe: a checkpoint's temperature stays. To raise it would undo what its attention has learned, and an
    inflated network needs no high one, because its attention is uniform at any.
    """
    return recipe.temperature is not None and any(
        name.endswith('kernel_temperature') for name, _ in network.named_buffers())


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


def check_finite(loss: float, step: int, rate: float) -> float:
    if not math.isfinite(loss):
        raise SystemExit(
            f'the loss is {loss} at step {step} with learning rate {rate:.4g}; the last checkpoint is from before it')
    return loss
