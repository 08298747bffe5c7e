"""What a run starts from: names that the libraries know, and weights.

Weights are found, pinned to the revision that is then recorded, and loaded. Their name is a folder that timm's
`local-dir:` loads (of a training run, for instance), a Hub repository (`hf-hub:owner/name`, also `@revision`), or a
model registered in timm whose weights are on the Hub (`resnet50.a1_in1k`, `resnet18_fmd.<tag>`). Only safetensors are
read.
"""
import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from _accelerator import usable_cores
from _classes import label_names
from _optim import check_optimizer
from _recipe import INFLATED, Recipe, refuse
from _record import sha256
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import parse_model_name
from torch import nn

from fmd_timm import DynamicConv2d
from fmd_timm.hub_errors import explain
from fmd_timm.inflate import inflate_state_dict
from fmd_timm.models._pretrained import WEIGHTS_NAME

# What an inflated network's configuration has from the static network's.
TAKEN_FROM_SOURCE = (
    'input_size', 'pool_size', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std', 'label_names', 'license')
FORMS = 'a folder, hf-hub:owner/name or a model.tag registered in timm'


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
    image_size = recipe.image_size or network.pretrained_cfg['input_size'][-1]
    return dataclasses.replace(
        recipe, model=recipe.model or network.pretrained_cfg['architecture'], image_size=image_size,
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


@dataclass(frozen=True)
class Source:
    """Where the weights of a network are."""
    asked: str  # as the user said it
    name: str  # what timm.create_model loads
    repo: str | None  # on the Hub
    revision: str  # 'commit <40 hex digits>' of the repository, 'sha256 <64>' of a folder's weights
    cfg_overlay: dict[str, Any]  # pins the weights to the commit, and to safetensors


def find_source(asked: str, what: str) -> Source:
    """Find weights, and fetch them from the Hub where they aren't in the cache; no network is built.

    Args:
        asked: Folder, Hub repository or registered model, see above.
        what: What to call it in errors, such as '--init'.

    Raises:
        SystemExit: There is nothing of that name, it can't be fetched, or it has no safetensors.
    """
    if Path(asked).is_dir():
        return _find_folder(asked, Path(asked), what)
    name = f'hf-hub:{asked}' if '/' in asked and ':' not in asked else asked
    try:
        scheme, rest = parse_model_name(name)
        cfg = timm.get_pretrained_cfg(rest) if scheme is None else None
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f'{what} must be {FORMS}, got {asked!r}: {error}') from error
    if scheme == 'local-dir':
        return _find_folder(asked, Path(rest), what)
    if scheme == 'hf-hub':
        repo, commit = _fetch(asked, rest, ('config.json', WEIGHTS_NAME), what)
        overlay = dict(hf_hub_filename=WEIGHTS_NAME, custom_load=False)  # whatever its configuration names
        return Source(asked, f'hf-hub:{repo}@{commit}', repo, f'commit {commit}', overlay)
    if cfg is None or not cfg.hf_hub_id:
        reason = 'is not registered in timm' if cfg is None else 'has no weights on the Hub'
        raise SystemExit(f'{what} must be {FORMS}, got {asked!r}, which {reason}')
    repo, commit = _fetch(asked, cfg.hf_hub_id, (WEIGHTS_NAME,), what)
    overlay = dict(hf_hub_id=f'{repo}@{commit}', hf_hub_filename=WEIGHTS_NAME)
    return Source(asked, asked, repo, f'commit {commit}', overlay)


def _find_folder(asked: str, folder: Path, what: str) -> Source:
    missing = [name for name in ('config.json', WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f'{what} {asked!r} has no {" and no ".join(missing)}, expected {FORMS}')
    return Source(asked, f'local-dir:{folder}', None, f'sha256 {sha256(folder / WEIGHTS_NAME)}', {})


def _fetch(asked: str, repo: str, files: tuple[str, ...], what: str) -> tuple[str, str]:
    """(repository, commit), with the files of that commit in the cache."""
    repo, _, revision = repo.partition('@')
    for name in files:
        try:
            path = _download(repo, name, revision or None)
        except Exception as error:  # the Hub's client has no common class for its own and its transport's errors
            raise SystemExit(
                f'{what} {asked!r}: {name} of the Hub repository {repo} could not be fetched, expected {FORMS}: '
                f'{explain(error)}'
            ) from error
        revision = Path(path).parents[len(Path(name).parts) - 1].name  # the cache is snapshots/<commit>/<name>
    return repo, revision


def _download(repo: str, name: str, revision: str | None) -> str:
    """`hf_hub_download`, which without a network would try for half a minute: the cache, or the error, at once."""
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    except HfHubHTTPError:
        pass  # the Hub is there: whether to try again is known to its client
    except (HTTPError, OfflineModeIsEnabled) as error:
        try:
            return hf_hub_download(repo, name, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
    return hf_hub_download(repo, name, revision=revision)


def load_network(source: Source, what: str, **model_args) -> nn.Module:
    """The network of a source.

    Raises:
        SystemExit: timm can't load it, or it doesn't take an argument.
    """
    try:
        return timm.create_model(
            source.name, pretrained=True, pretrained_cfg_overlay=source.cfg_overlay or None, **model_args)
    except Exception as error:  # safetensors, torch and timm each have their own
        raise SystemExit(f'{what} {source.asked!r} could not be loaded: {type(error).__name__}: {error}') from error


def first_network(recipe: Recipe) -> tuple[nn.Module, dict[str, Any] | None]:
    """The network of --init and where its weights are from, for the run record; or --model on 'meta', and None."""
    if recipe.init is None:
        return new_network(recipe, device='meta'), None
    inflated = recipe.init.startswith(INFLATED)
    source = find_source(recipe.init.removeprefix(INFLATED), '--init')
    network = load_network(source, '--init', **({} if inflated else drop_rates(recipe)))
    cfg = network.pretrained_cfg
    origin = dict(origin_of(source, network), inflated=inflated)
    if cfg['input_size'][0] != 3:
        raise SystemExit(f'--init must be a network for images of 3 channels, {recipe.init} has {cfg["input_size"][0]}')
    if inflated:
        network = inflate_into(recipe, network)
    elif recipe.model not in (None, cfg['architecture']):
        raise SystemExit(f'--init {recipe.init} is a {cfg["architecture"]}, but --model is {recipe.model!r}')
    if recipe.freeze == 'attention' and first_dynamic(network) is None:
        raise SystemExit(f'--freeze attention: {cfg["architecture"]} has no dynamic convolution')
    return network, origin


def origin_of(source: Source, network: nn.Module) -> dict[str, Any]:
    """Where the weights of a network are from."""
    cfg = network.pretrained_cfg
    return dict(
        weights=Path(source.asked).name if source.repo is None else source.asked, architecture=cfg['architecture'],
        repo=source.repo, revision=source.revision, license=cfg.get('license'))


def new_network(recipe: Recipe, **kwargs) -> nn.Module:
    """--model with random weights, which drops what the recipe says.

    Raises:
        SystemExit: It doesn't take an argument.
    """
    try:
        return timm.create_model(recipe.model, **drop_rates(recipe), **kwargs)
    except TypeError as error:
        raise SystemExit(f'--model {recipe.model}: {error}') from error


def drop_rates(recipe: Recipe) -> dict[str, float]:
    """Those above 0, for timm.create_model."""
    rates = dict(drop_rate=recipe.drop, drop_path_rate=recipe.drop_path)
    return {name: rate for name, rate in rates.items() if rate}


def first_dynamic(network: nn.Module) -> DynamicConv2d | None:
    return next((module for module in network.modules() if isinstance(module, DynamicConv2d)), None)


def inflate_into(recipe: Recipe, static: nn.Module) -> nn.Module:
    """The network --model with the weights of the static one, inflated, and with its preprocessing and licence."""
    theirs = static.pretrained_cfg['architecture']
    if first_dynamic(static):
        raise SystemExit(f'--init {recipe.init}: a {theirs} is dynamic already, leave out {INFLATED!r}')
    set_seed(recipe.seed)  # of the attention's first layers
    network = new_network(recipe, num_classes=static.num_classes)
    if first_dynamic(network) is None:
        raise SystemExit(f'--model must be a dynamic network for --init {recipe.init}, got {recipe.model!r}')
    try:
        network.load_state_dict(inflate_state_dict(static.state_dict(), network, seed=recipe.seed))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f'--init {recipe.init}: a {theirs} does not become a {recipe.model}: {error}') from error
    taken = {k: v for k, v in static.pretrained_cfg.items() if k in TAKEN_FROM_SOURCE}
    network.pretrained_cfg = {**network.pretrained_cfg, **taken}
    return network


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
