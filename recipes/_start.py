"""What a run starts from: names that the libraries know, and the network, with random weights or those of --init."""
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import timm
import torch
from _accelerator import usable_cores
from _classes import label_names
from _data import LabelledImages
from _optim import check_optimizer, freeze
from _recipe import INFLATED, Recipe, refuse
from _sources import find_source, load_network, origin_of
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from fmd_timm import DynamicConv2d
from fmd_timm.inflate import inflate_state_dict
from fmd_timm.models.dynamic_cnn import swap_convs

DYNAMIC_CNN = 'dynamic_cnn'  # any network of timm, made dynamic
# What an inflated network's configuration has from the static network's.
TAKEN_FROM_SOURCE = (
    'input_size', 'pool_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'label_names', 'license')


def check_names(recipe: Recipe) -> None:
    """Refuse names that no library knows: of a model, an optimizer, a tracker, an augmentation.

    Raises:
        SystemExit: Names the option, those that there are, and what it is.
    """
    if recipe.model is not None and not timm.is_model(recipe.model):
        refuse(recipe, 'model', f'a model registered in timm, such as {", ".join(timm.list_models("*_fmd*"))}')
    if recipe.model is not None and '.' in recipe.model:  # timm would ignore the tag, and the weights be random
        refuse(recipe, 'model', f'without a tag, which names weights: --init {recipe.model} starts from them')
    check_optimizer(recipe)
    check_augmentation(recipe)
    trackers = ['none', *(tracker.value for tracker in get_available_trackers())]
    if recipe.tracker not in trackers:
        refuse(recipe, 'tracker', f'one of {", ".join(trackers)} (those that are installed)')


def check_augmentation(recipe: Recipe) -> None:
    """Refuse a policy that timm can't read or apply: it finds that out with an image."""
    try:
        transform = create_transform(32, is_training=True, auto_augment=recipe.aa, use_prefetcher=True)
        transform(Image.new('RGB', (32, 32)))
    except Exception as error:  # timm's parser has no class of its own
        refuse(recipe, 'aa', f'a policy of timm, such as rand-m9-mstd0.5-inc1 or 3a ({type(error).__name__}: {error})')


def check_pass(recipe: Recipe, network: nn.Module, images: int) -> None:
    """Refuse images of sizes that the network can't take.

    And one image at a time, where that leaves a BatchNorm one value per channel, of which it takes no statistics.

    Args:
        recipe: Complete.
        network: On any device; it stays as it is.
        images: Of one process in one forward pass.
    """
    network = copy.deepcopy(network).to('meta')
    for size in sorted({*recipe.train_sizes(), recipe.test_size}):
        name = 'image_sizes' if recipe.image_sizes else 'image_size'
        try:
            network.eval()(torch.empty(1, 3, size, size, device='meta'))
        except Exception as error:  # each network has its own
            refuse(
                recipe, name if size in recipe.train_sizes() else 'test_size',
                f'pixels that a {recipe.model} can take, not {size} ({type(error).__name__}: {error})')
    if images > 1:
        return
    size = min(recipe.train_sizes())
    try:
        network.train()(torch.empty(1, 3, size, size, device='meta'))
    except ValueError as error:
        refuse(recipe, 'batch_size', f'larger, so that a process has more than one image at a time ({error})')


def complete(recipe: Recipe, network: nn.Module) -> Recipe:
    """The recipe with what it leaves open said: by the network it starts from, and by the machine it runs on."""
    temperature = 30.0 if recipe.temperature is None and recipe.init is None else recipe.temperature
    inflated = recipe.init is not None and recipe.init.startswith(INFLATED)
    architecture = DYNAMIC_CNN if inflated else network.pretrained_cfg['architecture']
    image_size = recipe.image_size or network.pretrained_cfg['input_size'][-1]
    return dataclasses.replace(
        recipe, model=recipe.model or architecture, image_size=image_size,
        test_size=recipe.test_size or image_size, temperature=temperature,
        num_workers=min(recipe.num_workers, usable_cores()),
    )


def data_config(recipe: Recipe, network: nn.Module) -> dict[str, Any]:
    """How images are prepared for the network to be validated, and for whoever uses it then.

    Args:
        recipe: Complete.
        network: Whose own values stand where the recipe says nothing.
    """
    config = dict(resolve_model_data_config(network), input_size=(3, recipe.test_size, recipe.test_size))
    config['crop_pct'] = recipe.crop_pct or config['crop_pct']
    if recipe.interpolation:
        config['interpolation'] = 'bicubic' if recipe.interpolation == 'random' else recipe.interpolation
    return config


def first_network(recipe: Recipe) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network of --init and where its weights are from, for the run record; or --model on 'meta', and None."""
    if recipe.init is None:
        return new_network(recipe, device='meta'), None
    inflated = recipe.init.startswith(INFLATED)
    source = find_source(recipe.init.removeprefix(INFLATED), '--init')
    has_twin = inflated and recipe.model not in (None, DYNAMIC_CNN)  # which drops what the recipe says
    network = load_network(source, '--init', **({} if has_twin else drop_rates(recipe)))
    cfg = network.pretrained_cfg
    origin = dict(origin_of(source, network), inflated=inflated)
    if cfg['input_size'][0] != 3:
        raise SystemExit(f'--init must be a network for images of 3 channels, {recipe.init} has {cfg["input_size"][0]}')
    if inflated:
        network = inflate_network(recipe, network)
    elif recipe.model not in (None, cfg['architecture']):
        raise SystemExit(f'--init {recipe.init} is a {cfg["architecture"]}, but --model is {recipe.model!r}')
    if recipe.freeze == 'attention' and first_dynamic(network) is None:
        raise SystemExit(f'--freeze attention: {cfg["architecture"]} has no dynamic convolution')
    return network, origin


def new_network(recipe: Recipe, **kwargs) -> nn.Module:
    """--model with random weights, which drops what the recipe says.

    Raises:
        SystemExit: It doesn't take an argument.
    """
    try:
        return timm.create_model(recipe.model, **drop_rates(recipe), **recipe.model_arguments(), **kwargs)
    except (TypeError, ValueError) as error:
        raise SystemExit(f'--model {recipe.model} with --model-kwargs {recipe.model_kwargs}: {error}') from error


def drop_rates(recipe: Recipe) -> dict[str, float]:
    """Those above 0, for timm.create_model."""
    rates = dict(drop_rate=recipe.drop, drop_path_rate=recipe.drop_path)
    return {name: rate for name, rate in rates.items() if rate}


def first_dynamic(network: nn.Module) -> DynamicConv2d | None:
    return next((module for module in network.modules() if isinstance(module, DynamicConv2d)), None)


def inflate_network(recipe: Recipe, static: nn.Module) -> nn.Module:
    """A dynamic network that computes what the static one does: its twin --model, or itself made dynamic.

    Raises:
        SystemExit: It is dynamic already, or can't become --model.
    """
    theirs = static.pretrained_cfg['architecture']
    if first_dynamic(static):
        raise SystemExit(f'--init {recipe.init}: a {theirs} is dynamic already, leave out {INFLATED!r}')
    set_seed(recipe.seed)  # of the attention's first layers
    if recipe.model in (None, DYNAMIC_CNN):
        network, arguments = copy.deepcopy(static), recipe.model_arguments()
        try:
            swap_convs(network, arguments.pop('dynamic', 'fmd'))
        except (ValueError, TypeError) as error:
            raise SystemExit(f'--init {recipe.init} can not be made dynamic: {error}') from error
        if arguments:
            refuse(recipe, 'model_kwargs', f'dynamic=... alone for an inflated {DYNAMIC_CNN}')
    else:
        network = new_network(recipe, num_classes=static.num_classes)
        if first_dynamic(network) is None:
            raise SystemExit(f'--model must be a dynamic network for --init {recipe.init}, got {recipe.model!r}')
        taken = {k: v for k, v in static.pretrained_cfg.items() if k in TAKEN_FROM_SOURCE}
        network.pretrained_cfg = {**network.pretrained_cfg, **taken}
    try:
        network.load_state_dict(inflate_state_dict(static.state_dict(), network, seed=recipe.seed))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f'--init {recipe.init}: a {theirs} does not become a {recipe.model}: {error}') from error
    return network


def fit_network(
        recipe: Recipe,
        network: nn.Module,
        origin: dict[str, Any] | None,
        images: dict[str, LabelledImages],
        say: Callable[[str], None],
) -> tuple[nn.Module, list[str]]:
    """The network to train, for the classes of the images, and these in the order of its outputs.

    Args:
        recipe: Complete.
        network: What first_network returned, with `origin`, which is told whether the classifier is kept.
        origin: None for random weights, which are drawn here.
        images: Of each part; their classes get the network's order.
        say: Prints.
    """
    names = images['train'].label_names
    if origin is None:
        return new_network(recipe, num_classes=len(names)), names
    has_names = bool(network.pretrained_cfg.get('label_names'))
    origin['classifier'], names = fit_classifier(network, names)
    for part in images.values():
        part.use_classes(names, '--init')
    if origin['classifier'] == 'kept' and not has_names:
        say('--init has no names for its classes: they are matched by their numbers')
    if recipe.freeze:
        freeze(network, recipe.freeze)
    return network, names


def fit_classifier(network: nn.Module, names: list[str]) -> tuple[str, list[str]]:
    """Give the network a classifier of these classes.

    Args:
        network: Of --init; its configuration then says nothing of the old classes.
        names: Of the classes of the images.

    Returns:
        'kept' where the network has one, else 'new'; the classes in the order of its outputs.
    """
    theirs = label_names(network, '--init')
    dropped = 'label_names', 'label_descriptions', 'description', 'tag'
    network.pretrained_cfg = {name: value for name, value in network.pretrained_cfg.items() if name not in dropped}
    if network.num_classes == len(names) and (theirs is None or set(theirs) == set(names)):
        return 'kept', theirs or names
    network.reset_classifier(len(names))
    return 'new', names
