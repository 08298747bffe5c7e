"""Train an image classifier:  accelerate launch recipes/train.py <preset> [--output FOLDER] [--option value ...]

A preset is the published run; an option changes one value of it. `train.py <preset> --help` shows them all. The output
folder gets `model.safetensors` and `config.json` (timm and the Hub load them), `result.json` (the run record, which the
model card is made from), `checkpoints/` to resume from and the tracker's `logs/`.
"""
import argparse
import dataclasses
import datetime
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _checkpoints
import _optim
import timm
import torch
from _data import (
    VALIDATION_SPLITS,
    LabelledImages,
    Normalize,
    choose_split,
    eval_transform,
    open_dataset,
    train_transform,
)
from _measure import (
    command_line,
    count_gmacs,
    device_name,
    git_commit,
    peak_memory_mib,
    score,
    synchronize,
    time_inference,
    use_all_cores,
    versions,
)
from _start import find_source, load_network
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from timm.data import Mixup, resolve_model_data_config
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fmd_timm import DynamicConv2d, set_temperature
from fmd_timm.hub import save_for_hub
from fmd_timm.inflate import inflate_state_dict
from fmd_timm.layers import annealed_temperature
from fmd_timm.model_card import results_table
from fmd_timm.scores import ies, ies_infer, rcs, rcs_infer

INFLATED = 'inflated:'  # prefix of --init
# What an inflated network's configuration has from the static network's.
TAKEN_FROM_SOURCE = (
    'input_size', 'pool_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'label_names', 'license')


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
    channels_last: bool = option(False, 'memory format of images and weights')
    compile: bool = option(False, 'torch.compile the model')
    num_workers: int = option(4, 'data loading processes per training process')
    tracker: str = option('tensorboard', "tracker known to accelerate, or 'none'")
    seed: int = option(0, 'of weights, shuffling and augmentation')


CIFAR = Recipe(
    model='resnet18_fmd_cifar', image_size=32, crop='pad', epochs=200, batch_size=128, weight_decay=5e-4,
    smoothing=0.0, annealed_by=0.05, channels_last=True,
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
    'imagenet': Recipe(dataset='ILSVRC/imagenet-1k', channels_last=True, num_workers=8),
}
# Options that change how a run is executed and not what it computes: a run may be resumed with other ones.
EXECUTION = ('num_workers', 'tracker')


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """preset, recipe, output and resume."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument('preset', nargs='?', choices=PRESETS, default='digits')
    preset = first.parse_known_args([a for a in argv if a not in ('-h', '--help')])[0].preset

    parser = argparse.ArgumentParser(
        prog='train.py', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('preset', nargs='?', choices=PRESETS, default='digits', help='the published run to start from')
    parser.add_argument('--output', type=Path, help='folder for the results (runs/<preset>)')
    parser.add_argument('--resume', metavar='auto|FOLDER', help="checkpoint to go on from; 'auto' is the output's last")
    options = parser.add_argument_group(f'values of the preset {preset}')
    for field in dataclasses.fields(Recipe):
        value = getattr(PRESETS[preset], field.name)
        kwargs = dict(default=value, help=f'{field.metadata["help"]} ({value})'.replace('%', '%%'))
        if field.type is bool:
            kwargs['action'] = argparse.BooleanOptionalAction
        else:
            kinds = [kind for kind in getattr(field.type, '__args__', (field.type,)) if kind is not type(None)]
            kwargs |= dict(type=kinds[0], metavar=kinds[0].__name__)
        options.add_argument('--' + field.name.replace('_', '-'), **kwargs)
    args = vars(parser.parse_args(argv))
    output, resume, preset = args.pop('output'), args.pop('resume'), args.pop('preset')
    return argparse.Namespace(
        preset=preset, recipe=Recipe(**args), output=output or Path('runs', preset), resume=resume)


def check_recipe(recipe: Recipe) -> None:
    """Refuse values that can't work before anything is loaded."""
    def refuse(name: str, expected: str) -> None:
        raise SystemExit(f'--{name.replace("_", "-")} must be {expected}, got {getattr(recipe, name)!r}')

    if recipe.model is None and recipe.init is None:
        refuse('init', 'the weights to start from, or --model a network for random ones')
    if recipe.model is None and recipe.init.startswith(INFLATED):
        refuse('model', f'the dynamic network to grow out of {recipe.init.removeprefix(INFLATED)}')
    if recipe.model is not None and not timm.is_model(recipe.model):
        refuse('model', f'a model registered in timm, such as {", ".join(timm.list_models("*_fmd*"))}')
    if recipe.freeze is not None and recipe.init is None:
        refuse('freeze', 'left out without --init: random weights must learn')
    for name in 'image_size', 'epochs', 'batch_size', 'accumulate':
        value = getattr(recipe, name)
        if value is not None and value < 1:
            refuse(name, 'at least 1')
    for name in 'hflip', 'reprob', 'annealed_by':
        if not 0 <= getattr(recipe, name) <= 1:
            refuse(name, 'between 0 and 1')
    for name in 'smoothing', 'ema_decay', 'momentum':
        if not 0 <= getattr(recipe, name) < 1:
            refuse(name, 'at least 0 and below 1')
    if not 0 < recipe.layer_decay <= 1:
        refuse('layer_decay', 'above 0 and at most 1')
    for name in 'lr', 'head_lr_scale', 'temperature', 'clip_grad':
        value = getattr(recipe, name)
        if value is not None and not 0 < value < math.inf:
            refuse(name, 'positive and finite')
    for name in 'weight_decay', 'mixup', 'cutmix', 'warmup_epochs', 'num_workers':
        if not 0 <= getattr(recipe, name) < math.inf:
            refuse(name, 'at least 0')
    choices_of = dict(
        crop=('rrc', 'pad'), precision=('auto', 'bf16', 'fp16', 'fp32'), freeze=(None, *_optim.FREEZABLE))
    for name, choices in choices_of.items():
        if getattr(recipe, name) not in choices:
            refuse(name, f'one of {", ".join(filter(None, choices))}')
    trackers = ['none', *(tracker.value for tracker in get_available_trackers())]
    if recipe.tracker not in trackers:
        refuse('tracker', f'one of {", ".join(trackers)} (those that are installed)')


def open_images(recipe: Recipe) -> dict[str, LabelledImages]:
    """The images to train and to validate on, without their transforms."""
    dataset = open_dataset(recipe.dataset)
    splits = dict(
        train=choose_split(dataset, recipe.dataset, recipe.train_split, ()),
        validation=choose_split(dataset, recipe.dataset, recipe.validation_split, VALIDATION_SPLITS),
    )
    images = {
        part: LabelledImages(
            dataset[split], split, f'{recipe.dataset} split {split!r}', image_column=recipe.image_column,
            label_column=recipe.label_column, seed=recipe.seed,
        ) for part, split in splits.items()
    }
    train, validation = images['train'], images['validation']
    # Plain integers have no names beyond the largest label of a split.
    if validation.label_names != train.label_names[:len(validation.label_names)]:
        raise SystemExit(f'{validation.name} has classes {validation.label_names}, {train.name} {train.label_names}')
    if recipe.batch_size > len(train):
        raise SystemExit(f'--batch-size must be at most the {len(train)} training images, got {recipe.batch_size}')
    return images


def make_accelerator(recipe: Recipe, output: Path) -> Accelerator:
    """The accelerator of a run, if its processes can share out the recipe's batches."""
    precision = recipe.precision
    if precision == 'auto':
        precision = 'bf16' if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else 'fp32'
    accelerator = Accelerator(
        mixed_precision='no' if precision == 'fp32' else precision,
        gradient_accumulation_steps=recipe.accumulate,
        # batch_size is over all processes, so that a recipe means the same on any number of them
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed, non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        log_with=None if recipe.tracker == 'none' else recipe.tracker,
        project_config=ProjectConfiguration(output, logging_dir=output / 'logs'),
    )
    use_all_cores(accelerator)
    parts = accelerator.num_processes * recipe.accumulate * (2 if recipe.mixup or recipe.cutmix else 1)
    if recipe.batch_size % parts:
        raise SystemExit(
            f'--batch-size must be a multiple of {parts} (processes, accumulation steps, pairs of mixup and CutMix), '
            f'got {recipe.batch_size}'
        )
    return accelerator


def first_network(recipe: Recipe) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network of --init and where its weights are from, for the run record; or --model on 'meta', and None."""
    if recipe.init is None:
        return timm.create_model(recipe.model, device='meta'), None
    inflated = recipe.init.startswith(INFLATED)
    source = find_source(recipe.init.removeprefix(INFLATED), '--init')
    network = load_network(source, '--init')
    cfg = network.pretrained_cfg
    origin = dict(
        weights=Path(source.asked).name if source.repo is None else source.asked, architecture=cfg['architecture'],
        inflated=inflated, repo=source.repo, revision=source.revision, license=cfg.get('license'),
    )
    if cfg['input_size'][0] != 3:
        raise SystemExit(f'--init must be a network for images of 3 channels, {recipe.init} has {cfg["input_size"][0]}')
    if inflated:
        network = inflate_into(recipe, network)
    elif recipe.model not in (None, cfg['architecture']):
        raise SystemExit(f'--init {recipe.init} is a {cfg["architecture"]}, but --model is {recipe.model!r}')
    if recipe.freeze == 'attention' and first_dynamic(network) is None:
        raise SystemExit(f'--freeze attention: {cfg["architecture"]} has no dynamic convolution')
    return network, origin


def first_dynamic(network: nn.Module) -> DynamicConv2d | None:
    return next((module for module in network.modules() if isinstance(module, DynamicConv2d)), None)


def inflate_into(recipe: Recipe, static: nn.Module) -> nn.Module:
    """The network --model with the weights of the static one, inflated, and with its preprocessing and licence."""
    theirs = static.pretrained_cfg['architecture']
    if first_dynamic(static):
        raise SystemExit(f'--init {recipe.init}: a {theirs} is dynamic already, leave out {INFLATED!r}')
    set_seed(recipe.seed)  # of the attention's first layers
    network = timm.create_model(recipe.model, num_classes=static.num_classes)
    if first_dynamic(network) is None:
        raise SystemExit(f'--model must be a dynamic network for --init {recipe.init}, got {recipe.model!r}')
    try:
        network.load_state_dict(inflate_state_dict(static.state_dict(), network, seed=recipe.seed))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f'--init {recipe.init}: a {theirs} does not become a {recipe.model}: {error}') from error
    taken = {k: v for k, v in static.pretrained_cfg.items() if k in TAKEN_FROM_SOURCE}
    network.pretrained_cfg = {**network.pretrained_cfg, **taken}
    return network


def fit_classifier(network: nn.Module, label_names: list[str]) -> str:
    """'kept', or 'new' where the network's classes are not these; its configuration says nothing of the old ones."""
    cfg = dict(network.pretrained_cfg)
    theirs = cfg.pop('label_names', None)
    for key in 'label_descriptions', 'description', 'tag':
        cfg.pop(key, None)
    network.pretrained_cfg = cfg
    if network.num_classes == len(label_names) and (not theirs or list(theirs) == label_names):
        return 'kept'
    network.reset_classifier(len(label_names))
    return 'new'


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """That of the schedule, which each group of parameters scales."""
    group = optimizer.param_groups[0]
    return group['lr'] / group['lr_scale']


def check_finite(loss: torch.Tensor | None, step: int, optimizer: torch.optim.Optimizer) -> None:
    if loss is not None and not math.isfinite(loss.item()):
        raise SystemExit(
            f'the loss is {loss.item()} at step {step} with learning rate {learning_rate(optimizer):.4g}; '
            f'the last checkpoint is from before it'
        )


def main(preset: str, recipe: Recipe, output: Path, resume: str | None) -> dict[str, Any] | None:
    """Train, and return the run record that `result.json` holds; None on the other processes than the main one."""
    # Everything that can be refused, the cheapest first
    check_recipe(recipe)
    accelerator = make_accelerator(recipe, output)
    device, is_main = accelerator.device, accelerator.is_main_process
    with accelerator.main_process_first():  # downloads once
        network, origin = first_network(recipe)
    asked, recipe = recipe, dataclasses.replace(
        recipe, model=recipe.model or origin['architecture'],
        image_size=recipe.image_size or network.pretrained_cfg['input_size'][-1],
        temperature=30.0 if recipe.temperature is None and origin is None else recipe.temperature,
    )
    parameters = sum(p.numel() for p in network.parameters())
    checkpoint = _checkpoints.check_output(output, resume, model_bytes=4 * parameters)
    # The settings that must agree with a checkpoint's; the others change how a run is executed, not its result.
    settings = dict(preset=preset, **dataclasses.asdict(asked), init_revision=origin and origin['revision'])
    del settings['num_workers'], settings['tracker']
    progress = dict(settings=settings, epochs_done=0, epoch_seconds=[], metrics=None, best_epoch=0, best_top1=-1.0)
    if checkpoint:
        progress = _checkpoints.read_progress(checkpoint, settings)
    with accelerator.main_process_first():  # downloads and checks once
        images = open_images(recipe)
        if is_main:
            for part in images.values():
                part.check_decodable()

    # Model, data, optimization
    set_seed(recipe.seed)
    label_names = images['train'].label_names
    input_size = (3, recipe.image_size, recipe.image_size)
    if origin:
        model = network
        origin['classifier'] = fit_classifier(model, label_names)
        if recipe.freeze:
            _optim.freeze(model, recipe.freeze)
    else:
        model = timm.create_model(recipe.model, num_classes=len(label_names))
    parameters = sum(p.numel() for p in model.parameters())
    data_config = dict(resolve_model_data_config(model), input_size=input_size)
    images['train'].transform = train_transform(
        recipe.image_size, recipe.crop, recipe.hflip, recipe.aa, data_config['interpolation'], data_config['mean'])
    images['validation'].transform = eval_transform(data_config)
    loader_args = dict(
        batch_size=recipe.batch_size // recipe.accumulate, num_workers=recipe.num_workers,
        persistent_workers=recipe.num_workers > 0, pin_memory=device.type == 'cuda',
    )
    train_loader = DataLoader(images['train'], shuffle=True, drop_last=True, **loader_args)
    validation_loader = DataLoader(images['validation'], **loader_args)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if recipe.compile:
        model.compile()
    # None: a checkpoint's temperature stays. To raise it would undo what its attention has learned, and an inflated
    # network needs no high one, because its attention is uniform at any.
    anneals = recipe.temperature is not None and any(
        name.endswith('kernel_temperature') for name, _ in model.named_buffers())
    optimizer = create_optimizer_v2(
        model, opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum,
        param_group_fn=partial(
            _optim.parameter_groups, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
            head_lr_scale=recipe.head_lr_scale),
    )
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True, device=device) if recipe.ema_decay else None
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, train_loader, validation_loader)
    steps_per_epoch = math.ceil(len(train_loader) / recipe.accumulate)
    total_steps = recipe.epochs * steps_per_epoch
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs, warmup_lr=0.0,
        step_on_epochs=False, updates_per_epoch=steps_per_epoch,
    )
    accelerator.register_for_checkpointing(scheduler, *([ema] if ema else []))
    normalize = Normalize(data_config['mean'], data_config['std'], recipe.channels_last).to(device)
    erase = RandomErasing(recipe.reprob, mode='pixel', device=device)
    mixup, class_weights = None, None
    if recipe.mixup or recipe.cutmix:
        mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=len(label_names))
    if recipe.class_weights:
        class_weights = _optim.balanced_class_weights(images['train'].labels(), len(label_names)).to(device)
    # Not PyTorch's weighted mean: it divides by the weights of the batch, which each process has a part of.
    criterion = nn.CrossEntropyLoss(
        class_weights, reduction='none', label_smoothing=0.0 if mixup else recipe.smoothing)
    evaluated = ema.module if ema else model
    set_seed(recipe.seed, device_specific=True)  # mixup and dropout differ between the processes
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    if recipe.tracker != 'none':
        accelerator.init_trackers('fmd_timm', {k: v for k, v in settings.items() if v is not None})

    # The loop
    step = progress['epochs_done'] * steps_per_epoch
    for epoch in range(progress['epochs_done'], recipe.epochs):
        train_loader.set_epoch(epoch)  # and with it the images'
        _optim.train_mode(model)
        synchronize(device)
        start, last_loss = time.perf_counter(), None
        for batch, labels in tqdm(
                train_loader, f'epoch {epoch + 1}/{recipe.epochs}', leave=False, mininterval=1, disable=not is_main):
            with accelerator.accumulate(model):
                if anneals:
                    temperature = annealed_temperature(step / total_steps, recipe.temperature, recipe.annealed_by)
                    set_temperature(model, kernel=temperature)
                batch = erase(normalize(batch))
                if mixup:
                    batch, labels = mixup(batch, labels)
                with accelerator.autocast():
                    loss = criterion(model(batch), labels).mean()
                # The loss before this one is known by now; to wait for this one would stall the device.
                check_finite(last_loss, step - 1, optimizer)
                last_loss = loss.detach()
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.clip_grad:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                step += 1
                scheduler.step_update(step)
                if ema:
                    ema.update(accelerator.unwrap_model(model), step)
                    if anneals:
                        set_temperature(ema.module, kernel=temperature)  # the present one, not an average
        check_finite(last_loss, step - 1, optimizer)
        synchronize(device)
        seconds = time.perf_counter() - start

        metrics = score(accelerator, evaluated, validation_loader, normalize, len(images['validation']))
        progress |= dict(epochs_done=epoch + 1, metrics=metrics, epoch_seconds=[*progress['epoch_seconds'], seconds])
        if metrics['top1'] > progress['best_top1']:
            progress |= dict(best_top1=metrics['top1'], best_epoch=epoch + 1)
        logged = dict(metrics, train_loss=last_loss.item(), lr=learning_rate(optimizer), epoch_seconds=seconds)
        accelerator.log(logged, step=epoch + 1)
        accelerator.print(f'epoch {epoch + 1}: ' + ', '.join(f'{name} {value:.4g}' for name, value in logged.items()))
        _checkpoints.save(accelerator, output / 'checkpoints', progress)

    # The result
    record = None
    if is_main:
        metrics, final = progress['metrics'], accelerator.unwrap_model(evaluated)
        save_for_hub(final, output, model_config=dict(label_names=label_names), data_config=data_config)
        model_args = json.loads((output / 'config.json').read_text()).get('model_args', {})
        model_args = {k: v for k, v in model_args.items() if k not in ('in_chans', 'global_pool')}  # always there
        layer, accuracy = first_dynamic(final), metrics['top1'] / 100
        epoch_seconds = statistics.median(progress['epoch_seconds'][1:] or progress['epoch_seconds'])
        inference = time_inference(
            accelerator, final, input_size, min(recipe.batch_size, len(images['validation'])), recipe.channels_last)
        record = dict(
            model=recipe.model, model_args=model_args, init=origin, preset=preset, recipe=dataclasses.asdict(asked),
            method=layer and type(layer).__name__.removesuffix('2d'),
            temperature=recipe.temperature if anneals and recipe.annealed_by else None, command=command_line(),
            dataset=Path(recipe.dataset).name if Path(recipe.dataset).is_dir() else recipe.dataset,
            train_split=images['train'].split, train_images=len(images['train']),
            validation_split=images['validation'].split, validation_images=len(images['validation']),
            num_classes=len(label_names), label_names=label_names,
            **metrics, best_top1=progress['best_top1'], best_epoch=progress['best_epoch'],
            epochs=recipe.epochs, epoch_seconds=progress['epoch_seconds'], median_epoch_seconds=epoch_seconds,
            ies=ies(epoch_seconds, accuracy), rcs=rcs(epoch_seconds, accuracy),
            train_images_per_second=steps_per_epoch * recipe.batch_size / epoch_seconds,
            **inference, ies_infer=ies_infer(inference['infer_ms_per_image'], accuracy),
            rcs_infer=rcs_infer(inference['infer_images_per_second'], accuracy),
            peak_memory_mib=peak_memory_mib(device), parameters=parameters, gmacs=count_gmacs(final, input_size),
            device=device_name(device), device_type=device.type, device_count=accelerator.num_processes,
            precision='fp32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision,
            input_size=input_size, global_batch=recipe.batch_size, seed=recipe.seed,
            versions=versions(), git_commit=git_commit(),
            finished=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        )
        unfinished = output / '.result.json'
        unfinished.write_text(json.dumps(record, indent=2))
        unfinished.rename(output / 'result.json')
        print(results_table(record))
    accelerator.end_training()
    return record


if __name__ == '__main__':
    main(**vars(parse_arguments(sys.argv[1:])))
