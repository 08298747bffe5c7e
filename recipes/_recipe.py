"""A recipe: every value of a training run, and which values can work. `_presets.py` has the recipes that are known.

It imports the standard library alone, so that bad values are refused before torch is imported, which takes seconds.
Options that timm's train.py has too are named as there.
"""
import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from _interruptions import parse_every

INFLATED = 'inflated:'  # prefix of --init
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'test')  # in this order: ImageNet's test split has no labels
FREEZABLE = ('backbone', 'attention')
CHOICES = dict(
    on_bad_image=('stop', 'skip'),
    crop=('rrc', 'pad'), interpolation=(None, 'bilinear', 'bicubic', 'random'), freeze=(None, *FREEZABLE),
    sched=('cosine', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'tanh', 'constant'), comm_hook=(None, 'bf16', 'fp16'),
    precision=('auto', 'bf16', 'fp16', 'fp32'))
LARGEST = 3.4e38  # that is finite in float32
MOST_PIXELS = 4096  # of a side
# Options that change how a run is executed and not what it computes: a run may be resumed with other ones.
EXECUTION = ('num_workers', 'tracker', 'checkpoint_every')


def option(default, help: str, group: str | None = None):
    """`group` is the heading of the help under which this option and those after it stand."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group))


@dataclass(frozen=True)
class Recipe:
    model: str | None = option(
        'resnet18_fmd', 'model registered in timm; may be left out with --init', group='network')
    init: str | None = option(
        None, 'weights to start from: a folder, hf-hub:owner/name or model.tag; inflated:<one of these> grows the '
        'dynamic --model out of a static network')
    drop: float = option(0.0, 'dropout in front of the classifier')
    drop_path: float = option(0.0, 'rate at which residual branches are dropped, in the last block (stochastic depth)')
    freeze: str | None = option(
        None, "what does not learn: 'backbone' (all but attention and classifier) or 'attention'")

    dataset: str = option(
        'digits', "'digits', a dataset id on the Hub, or a folder of parquet files or images", group='images')
    dataset_config: str | None = option(None, 'configuration of a dataset that has several')
    image_column: str | None = option(None, 'column of images; found from the features')
    label_column: str | None = option(None, 'column of labels; found from the features and names')
    streaming: bool = option(
        False, "read the images of the Hub's parquet files while training, without a copy of them on the disk")
    train_split: str = option('train', "split to train on, or a part of it such as 'train[:90%]'")
    validation_split: str | None = option(
        None, f'split to validate on, or a part of it; the first of {", ".join(VALIDATION_SPLITS)}')
    validation_share: float | None = option(
        None, 'share of each class in --train-split to hold out and validate on, chosen by the seed')
    on_bad_image: str = option(
        'stop', "what an image that can't be decoded does: 'stop' ends the run, 'skip' leaves it out, for which all "
        'are decoded once before training')

    image_size: int | None = option(
        224, "pixels of the square images; None is the network's own size", group='size and augmentation')
    image_sizes: list[str] | None = option(
        None, 'sizes to train with and the first epoch of each, as SIZE:EPOCH: 128:0 192:30 trains with 128 pixels and '
        'from epoch 30 on with 192; --image-size before the first')
    test_size: int | None = option(None, 'pixels of the square images to validate and publish with; --image-size')
    crop_pct: float | None = option(None, "share of an image's side that is validated; the network's own")
    interpolation: str | None = option(
        None, "of the resizing: bilinear, bicubic, or 'random' (one of them for each image in training, bicubic in "
        "validation); the network's own")
    crop: str = option('rrc', "training crop: 'rrc' (random resized crop) or 'pad' (pad by an eighth, crop back)")
    scale: list[float] | None = option(None, "smallest and largest area of the random resized crop; timm's 0.08 1.0")
    ratio: list[float] | None = option(None, "its smallest and largest width over height; timm's 0.75 1.33")
    hflip: float = option(0.5, 'probability of a horizontal flip')
    color_jitter: float | None = option(None, 'how much brightness, contrast and saturation vary, such as 0.4')
    aa: str | None = option(
        None, "timm's policy of automatic augmentation: RandAugment, such as rand-m9-mstd0.5-inc1, or 3a")
    aug_repeats: int = option(1, 'how often an image comes in an epoch, which sees as many images as without')
    reprob: float = option(0.0, 'probability of erasing a random part of an image')
    mixup: float = option(0.0, 'alpha of mixup; 0 is off')
    cutmix: float = option(0.0, 'alpha of CutMix; 0 is off; with both, each batch gets one of them')

    smoothing: float = option(0.1, 'label smoothing', group='loss')
    bce_loss: bool = option(False, 'binary cross-entropy of each class in place of the cross-entropy')
    bce_sum: bool = option(False, 'its sum over the classes in place of the mean')
    bce_target_thresh: float | None = option(None, 'targets above it are 1 and others 0; left as they are')
    class_weights: bool = option(False, 'weigh each class in the loss by the inverse of its number of training images')
    kd_model_name: str | None = option(
        None, 'teacher whose outputs are learned too: weights as for --init, of the same classes')
    kd_temperature: float = option(4.0, "softmax temperature of both networks' outputs")
    task_loss_weight: float = option(1.0, 'weight of the loss of the labels')
    distill_loss_weight: float = option(1.0, "weight of the loss of the teacher's outputs")

    epochs: int = option(100, 'passes over the training images', group='optimization')
    batch_size: int = option(256, 'images per optimizer step, over all processes')
    accumulate: int = option(1, 'backward passes per optimizer step')
    opt: str = option('sgd', "timm's name of the optimizer (sgd is with Nesterov momentum)")
    opt_eps: float | None = option(None, "epsilon of the optimizer; its own")
    opt_betas: list[float] | None = option(None, 'betas of the optimizer; its own')
    momentum: float = option(0.9, 'of the optimizer')
    weight_decay: float = option(1e-4, 'not for biases and norms')
    clip_grad: float | None = option(None, 'largest norm of the gradients')
    layer_decay: float = option(1.0, 'learning rate of each layer over that of the next one; 1 is the same for all')
    head_lr_scale: float = option(1.0, "learning rate of the classifier over that of its layer")
    attention_lr_scale: float = option(1.0, 'learning rate of the attention over that of its layer')
    ema_decay: float = option(0.0, 'decay of the averaged weights that are evaluated and saved; 0 is off')

    lr: float = option(0.1, 'peak learning rate', group='schedule')
    sched: str = option(
        'cosine', f"timm's name of the schedule: {', '.join(CHOICES['sched'])}; poly is linear with --decay-rate 1")
    warmup_epochs: int = option(5, 'epochs of linear warm-up, the first of the schedule')
    warmup_lr: float = option(0.0, 'learning rate that the warm-up starts from')
    min_lr: float = option(0.0, 'learning rate that the schedule ends at')
    cooldown_epochs: int = option(0, 'epochs at --min-lr, the last ones')
    decay_epochs: float | None = option(
        None, "epochs from one step to the next, or of the decay that ends wsd and rsqrt (below 1: the share); timm's")
    decay_milestones: list[int] | None = option(None, 'epochs at which multistep lowers the learning rate')
    decay_rate: float = option(0.1, 'what a step multiplies the learning rate with; the power of poly')
    temperature: float | None = option(
        None, 'softmax temperature of the kernel attention at the start; it ends at 1. None is 30, or with --init that '
        'of the checkpoint, which then stays')
    annealed_by: float = option(0.1, 'share of training after which it is 1')

    precision: str = option(
        'auto', "'bf16', 'fp16', 'fp32', or 'auto': bf16 on GPUs that have it, else fp32", group='machine')
    channels_last: bool = option(True, 'memory format of images and weights, in which convolutions are faster')
    compile: bool = option(False, 'torch.compile the model')
    sync_bn: bool = option(False, 'BatchNorm over the images of all GPUs')
    comm_hook: str | None = option(None, "send gradients between GPUs in 'bf16' or 'fp16', half of the bytes")
    num_workers: int = option(4, 'data loading processes per training process, at most one per core')
    checkpoint_every: str = option('10min', "time between checkpoints, or epochs as in '5epochs'; the end has one too")
    tracker: str = option('tensorboard', "tracker known to accelerate, or 'none'")
    seed: int = option(0, 'of weights, shuffling and augmentation')

    @property
    def mixes(self) -> bool:
        """Whether images and their labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def train_size(self, epoch: int) -> int | None:
        """Pixels of the square training images in an epoch, the first of which is 0."""
        started = [size for size, first in self.sizes_by_epoch() if first <= epoch]
        return started[-1] if started else self.image_size

    def train_sizes(self) -> set[int]:
        """All of them."""
        return {self.train_size(epoch) for epoch in range(self.epochs)}

    def sizes_by_epoch(self) -> list[tuple[int, int]]:
        """`image_sizes` as (pixels, first epoch)."""
        return [tuple(map(int, item.split(':'))) for item in self.image_sizes or ()]


def refuse(recipe: Recipe, name: str, expected: str) -> None:
    value = getattr(recipe, name)
    got = ' '.join(map(str, value)) if isinstance(value, list) else repr(value)
    raise SystemExit(f'--{name.replace("_", "-")} must be {expected}, got {got}')


def check_recipe(recipe: Recipe) -> None:
    """Refuse values that can't work, as far as they show it themselves; `_start.check_names` looks up the rest.

    Raises:
        SystemExit: Names the option, what it must be and what it is.
    """
    if recipe.model is None and recipe.init is None:
        refuse(recipe, 'init', 'the weights to start from, or --model a network for random ones')
    if recipe.model is None and recipe.init.startswith(INFLATED):
        refuse(recipe, 'model', f'the dynamic network to grow out of {recipe.init.removeprefix(INFLATED)}')
    if recipe.freeze is not None and recipe.init is None:
        refuse(recipe, 'freeze', 'left out without --init: random weights must learn')
    for name, choices in CHOICES.items():
        if getattr(recipe, name) not in choices:
            refuse(recipe, name, f'one of {", ".join(filter(None, choices))}')
    for name, least, most in ('image_size', 1, MOST_PIXELS), ('test_size', 1, MOST_PIXELS), ('seed', 0, 2**32 - 1):
        value = getattr(recipe, name)
        if value is not None and not least <= value <= most:
            refuse(recipe, name, f'at least {least} and at most {most}')
    for name in 'aug_repeats', 'epochs', 'batch_size', 'accumulate':
        if getattr(recipe, name) < 1:
            refuse(recipe, name, 'at least 1')
    for name in 'hflip', 'reprob', 'annealed_by', 'weight_decay':
        if not 0 <= getattr(recipe, name) <= 1:
            refuse(recipe, name, 'between 0 and 1')
    for name in 'drop', 'drop_path', 'smoothing', 'ema_decay', 'momentum', 'bce_target_thresh':
        value = getattr(recipe, name)
        if value is not None and not 0 <= value < 1:
            refuse(recipe, name, 'at least 0 and below 1')
    for name in 'layer_decay', 'crop_pct':
        value = getattr(recipe, name)
        if value is not None and not 0 < value <= 1:
            refuse(recipe, name, 'above 0 and at most 1')
    for name in 'lr', 'head_lr_scale', 'attention_lr_scale', 'temperature', 'clip_grad', 'kd_temperature', 'opt_eps', 'decay_epochs':
        value = getattr(recipe, name)
        if value is not None and not 0 < value <= LARGEST:
            refuse(recipe, name, 'positive and finite in float32')
    for name in ('mixup', 'cutmix', 'color_jitter', 'task_loss_weight', 'distill_loss_weight',
                 'warmup_epochs', 'warmup_lr', 'min_lr', 'cooldown_epochs', 'decay_rate', 'num_workers'):
        value = getattr(recipe, name)
        if value is not None and not 0 <= value <= LARGEST:
            refuse(recipe, name, 'at least 0 and finite')
    try:
        parse_every(recipe.checkpoint_every)
    except ValueError:
        refuse(recipe, 'checkpoint_every', "a time such as '10min' or a number of epochs such as '5epochs'")
    if recipe.validation_share is not None and not 0 < recipe.validation_share < 1:
        refuse(recipe, 'validation_share', 'above 0 and below 1')
    if recipe.validation_share is not None and recipe.validation_split is not None:
        refuse(recipe, 'validation_split', 'left out with --validation-share')
    if recipe.streaming:
        for name, only in ('validation_share', None), ('on_bad_image', 'stop'), ('aug_repeats', 1), (
                'class_weights', False):
            if getattr(recipe, name) != only:
                refuse(recipe, name, 'left out with --streaming, which reads no image or label before its turn')
    if not recipe.dataset:
        refuse(recipe, 'dataset', "'digits', a folder or a dataset id on the Hub")
    check_lists(recipe)
    check_schedule(recipe)


def check_lists(recipe: Recipe) -> None:
    """The part of check_recipe that looks at options with several values."""
    for name, most in ('scale', 1.0), ('ratio', math.inf):
        value = getattr(recipe, name)
        if value is not None and not (len(value) == 2 and 0 < value[0] <= value[1] <= most):
            refuse(recipe, name, f'a smallest and a largest value above 0{" and at most 1" if most == 1 else ""}')
    if recipe.opt_betas is not None and not all(0 <= beta < 1 for beta in recipe.opt_betas):
        refuse(recipe, 'opt_betas', 'at least 0 and below 1')
    milestones = recipe.decay_milestones if recipe.sched == 'multistep' else None
    if milestones and not _ascend([0, *milestones, recipe.epochs]):
        refuse(recipe, 'decay_milestones', f'ascending epochs between 0 and --epochs {recipe.epochs}')
    try:
        sizes = recipe.sizes_by_epoch()
        fits = all(len(item) == 2 and 0 < item[0] <= MOST_PIXELS for item in sizes) and _ascend(
            [-1, *(item[1] for item in sizes), recipe.epochs])
    except ValueError:
        fits = False
    if not fits:
        refuse(
            recipe, 'image_sizes', f'SIZE:EPOCH ..., the sizes at most {MOST_PIXELS}, the epochs ascending from 0 and '
            f'below --epochs {recipe.epochs}')


def check_schedule(recipe: Recipe) -> None:
    """The part of check_recipe that looks at the learning rate's course."""
    if recipe.sched == 'multistep' and recipe.decay_milestones is None:
        refuse(recipe, 'decay_milestones', 'epochs for --sched multistep, such as 30 60 90')
    phases = recipe.warmup_epochs + recipe.cooldown_epochs
    if recipe.sched in ('wsd', 'rsqrt'):
        phases += recipe.decay_epochs or 0
    if phases and phases > recipe.epochs:
        refuse(recipe, 'epochs', f'at least the {phases:g} of warm-up, decay and cooldown')
    if recipe.min_lr > recipe.lr:
        refuse(recipe, 'min_lr', f'at most --lr {recipe.lr}')


def _ascend(values: list[int]) -> bool:
    return all(first < second for first, second in zip(values, values[1:]))


# Options that do nothing: their names, what makes them do something, and whether a recipe has that.
NEEDS = [
    (('scale', 'ratio'), '--crop rrc', lambda r: r.crop == 'rrc'),
    (('color_jitter',), 'no --aa but 3a, because timm leaves it out otherwise', lambda r: r.aa is None or '3a' in r.aa),
    (('bce_sum', 'bce_target_thresh'), '--bce-loss', lambda r: r.bce_loss),
    (('smoothing',), 'no --bce-target-thresh, which makes targets 0 or 1', lambda r: r.bce_target_thresh is None),
    (('kd_temperature', 'task_loss_weight', 'distill_loss_weight'), '--kd-model-name', lambda r: r.kd_model_name),
    (('annealed_by',), '--temperature, because that of --init stays',
     lambda r: r.init is None or r.temperature is not None),
    (('warmup_lr',), '--warmup-epochs', lambda r: r.warmup_epochs),
    (('decay_milestones',), '--sched multistep', lambda r: r.sched == 'multistep'),
    (('decay_rate',), '--sched step, multistep or poly', lambda r: r.sched in ('step', 'multistep', 'poly')),
    (('decay_epochs',), '--sched step, wsd or rsqrt', lambda r: r.sched in ('step', 'wsd', 'rsqrt')),
    (('min_lr', 'cooldown_epochs'), '--sched cosine, poly, wsd, rsqrt or tanh',
     lambda r: r.sched in ('cosine', 'poly', 'wsd', 'rsqrt', 'tanh')),
]


def check_effects(recipe: Recipe, given: Iterable[str]) -> None:
    """Refuse options that were given and do nothing beside the others; a preset may have such values.

    Raises:
        SystemExit: Names the option and what it needs.
    """
    for names, needed, has_it in NEEDS:
        for name in names:
            if name in given and getattr(recipe, name) and not has_it(recipe):
                raise SystemExit(f'--{name.replace("_", "-")} has no effect: it needs {needed}')
