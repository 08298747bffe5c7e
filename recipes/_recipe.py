"""A recipe: every value of a training run, the published runs as presets, and which values can work.

It imports the standard library alone, so that bad values are refused before torch is imported, which takes seconds.
"""
import dataclasses
import math
from dataclasses import dataclass

INFLATED = 'inflated:'  # prefix of --init
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'test')  # in this order: ImageNet's test split has no labels
FREEZABLE = ('backbone', 'attention')
CHOICES = dict(
    crop=('rrc', 'pad'), precision=('auto', 'bf16', 'fp16', 'fp32'), freeze=(None, *FREEZABLE))
# Options that change how a run is executed and not what it computes: a run may be resumed with other ones.
EXECUTION = ('num_workers', 'tracker')


def option(default, help: str):
    return dataclasses.field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class Recipe:
    model: str | None = option('resnet18_fmd', 'model registered in timm; may be left out with --init')
    init: str | None = option(
        None, 'weights to start from: a folder, hf-hub:owner/name or model.tag; inflated:<one of these> grows the '
        'dynamic --model out of a static network')
    dataset: str = option('digits', "'digits', a dataset id on the Hub, or a folder of parquet files or images")
    image_column: str | None = option(None, 'column of images; found from the features')
    label_column: str | None = option(None, 'column of labels; found from the features')
    train_split: str = option('train', 'split to train on')
    validation_split: str | None = option(None, f'split to validate on; the first of {", ".join(VALIDATION_SPLITS)}')
    image_size: int | None = option(224, "pixels of the square images; None is the network's own size")
    crop: str = option('rrc', "training crop: 'rrc' (random resized crop) or 'pad' (pad by an eighth, crop back)")
    hflip: float = option(0.5, 'probability of a horizontal flip')
    aa: str | None = option(None, "timm's RandAugment policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = option(0.0, 'probability of erasing a random part of an image')
    mixup: float = option(0.0, 'alpha of mixup; 0 is off')
    cutmix: float = option(0.0, 'alpha of CutMix; 0 is off')
    smoothing: float = option(0.1, 'label smoothing')
    class_weights: bool = option(False, 'weigh each class in the loss by the inverse of its number of training images')
    epochs: int = option(100, 'passes over the training images')
    batch_size: int = option(256, 'images per optimizer step, over all processes')
    accumulate: int = option(1, 'backward passes per optimizer step')
    opt: str = option('sgd', "timm's name of the optimizer (sgd is with Nesterov momentum)")
    lr: float = option(0.1, 'peak learning rate')
    layer_decay: float = option(1.0, 'learning rate of each layer over that of the next one; 1 is the same for all')
    head_lr_scale: float = option(1.0, "learning rate of the classifier over that of its layer")
    freeze: str | None = option(
        None, "what does not learn: 'backbone' (all but attention and classifier) or 'attention'")
    momentum: float = option(0.9, 'of the optimizer')
    weight_decay: float = option(1e-4, 'not for biases and norms')
    warmup_epochs: int = option(5, 'epochs of linear warm-up before the cosine decay to 0')
    clip_grad: float | None = option(None, 'largest norm of the gradients')
    ema_decay: float = option(0.0, 'decay of the averaged weights that are evaluated and saved; 0 is off')
    temperature: float | None = option(
        None, 'softmax temperature of the kernel attention at the start; it ends at 1. None is 30, or with --init that '
        'of the checkpoint, which then stays')
    annealed_by: float = option(0.1, 'share of training after which it is 1')
    precision: str = option('auto', "'bf16', 'fp16', 'fp32', or 'auto': bf16 on GPUs that have it, else fp32")
    channels_last: bool = option(True, 'memory format of images and weights, in which convolutions are faster')
    compile: bool = option(False, 'torch.compile the model')
    num_workers: int = option(4, 'data loading processes per training process, at most one per core')
    tracker: str = option('tensorboard', "tracker known to accelerate, or 'none'")
    seed: int = option(0, 'of weights, shuffling and augmentation')


CIFAR = Recipe(
    model='resnet18_fmd_cifar', image_size=32, crop='pad', epochs=200, batch_size=128, weight_decay=5e-4,
    smoothing=0.0, annealed_by=0.05,
)
PRESETS = {
    'digits': Recipe(
        model='resnet18_fmd_cifar', dataset='digits', image_size=8, crop='pad', hflip=0.0, epochs=8, batch_size=64,
        lr=0.05, weight_decay=5e-4, warmup_epochs=1, clip_grad=5.0, num_workers=0,
    ),
    'cifar10': dataclasses.replace(CIFAR, dataset='uoft-cs/cifar10'),
    'cifar100': dataclasses.replace(CIFAR, dataset='uoft-cs/cifar100', label_column='fine_label'),
    # A start for images that nobody has tuned it to, no published run; needs --init. AdamW, because a kernel of an
    # inflated resnet18_fmd is 4 times the static one and gets 1/16 of its gradient: SGD moves it 1/64 as far.
    'finetune': Recipe(
        model=None, image_size=None, epochs=20, batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05,
        layer_decay=0.9, head_lr_scale=3.0, warmup_epochs=1, clip_grad=5.0,
    ),
    'imagenet': Recipe(dataset='ILSVRC/imagenet-1k', num_workers=8),
}


def refuse(recipe: Recipe, name: str, expected: str) -> None:
    raise SystemExit(f'--{name.replace("_", "-")} must be {expected}, got {getattr(recipe, name)!r}')


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
    for name in 'image_size', 'epochs', 'batch_size', 'accumulate':
        value = getattr(recipe, name)
        if value is not None and value < 1:
            refuse(recipe, name, 'at least 1')
    for name in 'hflip', 'reprob', 'annealed_by':
        if not 0 <= getattr(recipe, name) <= 1:
            refuse(recipe, name, 'between 0 and 1')
    for name in 'smoothing', 'ema_decay', 'momentum':
        if not 0 <= getattr(recipe, name) < 1:
            refuse(recipe, name, 'at least 0 and below 1')
    if not 0 < recipe.layer_decay <= 1:
        refuse(recipe, 'layer_decay', 'above 0 and at most 1')
    for name in 'lr', 'head_lr_scale', 'temperature', 'clip_grad':
        value = getattr(recipe, name)
        if value is not None and not 0 < value < math.inf:
            refuse(recipe, name, 'positive and finite')
    for name in 'weight_decay', 'mixup', 'cutmix', 'warmup_epochs', 'num_workers':
        if not 0 <= getattr(recipe, name) < math.inf:
            refuse(recipe, name, 'at least 0')
    for name, choices in CHOICES.items():
        if getattr(recipe, name) not in choices:
            refuse(recipe, name, f'one of {", ".join(filter(None, choices))}')
