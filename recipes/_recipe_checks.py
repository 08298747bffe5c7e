"""Which values of a recipe can work, as far as they show it themselves. Like `_recipe.py` it imports no torch."""
import math
from collections.abc import Iterable

from _interruptions import parse_every
from _recipe import CHOICES, INFLATED, Recipe, refuse

LARGEST = 3.4e38  # that is finite in float32
MOST_PIXELS = 4096  # of a side
# Arguments of timm.create_model that are no model_kwargs, and what says them.
SAID_ELSEWHERE = dict(
    pretrained='--init', pretrained_cfg='--init', pretrained_cfg_overlay='--init', checkpoint_path='--init',
    num_classes='the dataset', in_chans='the dataset', drop_rate='--drop', drop_path_rate='--drop-path')


def check_recipe(recipe: Recipe) -> None:
    """Refuse values that can't work; `_start.check_names` looks up names.

    Raises:
        SystemExit: Names the option, what it must be and what it is.
    """
    if recipe.model is None and recipe.init is None:
        refuse(recipe, 'init', 'the weights to start from, or --model a network for random ones')
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
    for name in ('lr', 'head_lr_scale', 'attention_lr_scale', 'temperature', 'clip_grad', 'kd_temperature', 'opt_eps',
                 'decay_epochs'):
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
    for item in recipe.model_kwargs or ():
        name, is_one, _ = item.partition('=')
        if not (name.isidentifier() and is_one):
            refuse(recipe, 'model_kwargs', 'NAME=VALUE ...')
        if name in SAID_ELSEWHERE:
            refuse(recipe, 'model_kwargs', f'without {name}, which {SAID_ELSEWHERE[name]} says')
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
    (('model_kwargs',), '--model without --init, whose checkpoint has its own, or --init inflated:...',
     lambda r: r.init is None or r.init.startswith(INFLATED)),
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
