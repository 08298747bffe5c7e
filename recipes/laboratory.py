"""Does it pay to be dynamic, and when?  python recipes/laboratory.py [--arms static fmd ...] [--option value ...]

Many small fine-tunes of one trained network. The images' features in front of its last stage are computed once. Each
arm (`_arms.py`) then trains the last stage, static or inflated, and the classifier, as the preset `finetune` does, on
the same images in the same number of steps, and is scored on images that no arm has seen. With --whole it trains the
whole network on the images themselves.

Writes a line for each run into <output>/<name>_<images>_x_<epochs>.jsonl, where the name is that of the dataset and of
what was asked for, and prints their table. Runs that are there are not run again.
"""
import sys

from _arms import ARMS, Arm, parse_laboratory

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_laboratory(sys.argv[1:], __doc__)

import copy
import dataclasses
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import _optim
import torch
import torch.nn.functional as F
from _accelerator import make_accelerator
from _data import open_images
from _dynamics import averaged, entropy, summarized, watched
from _lab_table import make_table, read_runs
from _loaders import Normalize, eval_transform
from _presets import PRESETS
from _recipe import Recipe
from _record import circumstances, device_name
from _sources import find_source, load_network
from _starts import draw_kernels, draw_router
from _training import Training, make_training, train_step
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.models import EfficientNet
from torch import Tensor, nn
from tqdm import tqdm

from fmd_timm import inflate, set_temperature
from fmd_timm.layers import METHODS, DynamicConv2d

MOST = dict(train=10_000, validation=5_000)  # images whose features are computed


def load_parts(asked: str, whole: bool) -> tuple[nn.Module, nn.Module, str]:
    """A trained network up to its last stage, its last stage and classifier, and the revision of its weights.

    With `whole`, nothing but the configuration of the network, and all of it.
    """
    source = find_source(asked, '--init')
    network = load_network(source, '--init').eval()
    if not isinstance(network, EfficientNet):
        raise SystemExit(f'--init must be an EfficientNet of timm, got {asked!r}, a {type(network).__name__}')
    body, tail = network, copy.deepcopy(network)
    if whole:
        body.forward_features = lambda images: images
        return body, tail, source.revision
    body.blocks = body.blocks[:-1]
    body.conv_head = body.bn2 = nn.Identity()
    tail.conv_stem = tail.bn1 = nn.Identity()
    tail.blocks = tail.blocks[-1:]
    return body, tail, source.revision


def in_four_kinds(images: Tensor, first: int) -> Tensor:
    """(B, 3, H, W) uint8, images `first` and following: a quarter each as it is, upside down, negative, BGR."""
    images = images.clone()
    for i, image in enumerate(images):
        kind = (first + i) % 4
        images[i] = (image, image.flip(1), 255 - image, image.flip(0))[kind]
    return images


@torch.inference_mode()
def make_features(body: nn.Module, args: SimpleNamespace) -> dict[str, Tensor]:
    """Features (N, C, H, W) float16 and labels (N,) of evenly spread images of both splits."""
    config = dict(resolve_model_data_config(body), input_size=(3, args.image_size, args.image_size), crop_pct=1.0)
    transform, normalize = eval_transform(config), Normalize(config['mean'], config['std'], channels_last=True)
    body.to(memory_format=torch.channels_last)
    recipe = dataclasses.replace(PRESETS['finetune'], dataset=args.dataset)
    features = {}
    for split, images in open_images(recipe).items():
        places = images.sample(MOST[split])
        batches = []
        for first in tqdm(range(0, len(places), 50), f'features of {split}', leave=False):
            batch = torch.stack([transform(images.read(place)[0]) for place in places[first:first + 50]])
            if args.mixed:
                batch = in_four_kinds(batch, first)
            batches.append(body.forward_features(normalize(batch)).half().contiguous())
        features[split] = torch.cat(batches)
        features[f'{split}_labels'] = torch.tensor([images.targets[place] for place in places])
    return features


def cached_features(body: nn.Module, args: SimpleNamespace, about: dict[str, str], path: Path) -> dict[str, Tensor]:
    """The features, of a file where they have been computed before from the same weights and images."""
    if path.exists():
        with safe_open(path, 'pt') as file:
            if file.metadata() == about:
                return {name: file.get_tensor(name) for name in file.keys()}
    features = make_features(body, args)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(features, path, about)
    return features


class Balanced(nn.Module):
    """A task whose loss also keeps the attention from taking the same kernel for all images, or one for each.

    Args:
        task: Images and labels -> a dict with their 'loss'.
        convs: Whose attention counts.
        arm: With the weights of both terms.
    """

    def __init__(self, task: nn.Module, convs: list[DynamicConv2d], arm: Arm):
        super().__init__()
        self.task, self.arm, self.seen = task, arm, []
        for conv in convs:
            conv.attention.register_forward_hook(lambda module, images, attention: self.seen.append(attention[0]))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.clear()
        result = self.task(images, labels)
        for kernel_attn in self.seen:
            usage, mean = entropy(kernel_attn.mean(0, keepdim=True)).mean(), entropy(kernel_attn).mean()
            term = self.arm.usage_weight * (1 - usage) + self.arm.entropy_weight * (1 - mean)
            result['loss'] = result['loss'] + term / len(self.seen)
        return result


def make_network(tail: nn.Module, arm: Arm, classes: int, seed: int) -> nn.Module:
    """The last stage of an arm, and a new classifier."""
    if arm.method is None:
        network = copy.deepcopy(tail)
    else:
        network = inflate(
            tail, METHODS[arm.method], num_kernels=arm.num_kernels, noise=arm.noise, seed=seed,
            filter_fn=lambda name, conv: arm.layers in name and (name.startswith('blocks') or arm.layers == 'conv'))
        set_temperature(network, kernel=arm.temperature)
    torch.manual_seed(seed)
    network.reset_classifier(classes)
    return network


def freeze(network: nn.Module, part: str) -> None:
    """As `_optim.freeze`, or but the weights of all convolutions: 'kernels'."""
    if part != 'kernels':
        return _optim.freeze(network, part)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, DynamicConv2d)):
            module.weight.requires_grad_(False)


def start_otherwise(training: Training, arm: Arm, features: Tensor, seed: int) -> None:
    """What an arm changes after the rates of its parameters are set, which are those of constant attention."""
    convs = [module for module in training.model.modules() if isinstance(module, DynamicConv2d)]
    kernels = {id(conv.weight) for conv in convs}
    for group in training.optimizer.param_groups:
        if all(id(parameter) in kernels for parameter in group['params']):
            group['lr_scale'] *= arm.kernel_lr
    generator = torch.Generator().manual_seed(seed)
    pooled = {}
    if arm.router:
        hooks = [
            conv.attention.register_forward_pre_hook(
                lambda module, images: pooled.__setitem__(module, images[0].mean((2, 3)))) for conv in convs]
        with torch.no_grad():
            training.model.eval()(features[:1024].float())
        for hook in hooks:
            hook.remove()
    for conv in convs:
        if arm.kernels:
            draw_kernels(conv, arm.kernels, generator)
        if arm.router:
            draw_router(conv, arm.router, pooled[conv.attention], arm.router_entropy, seed)
        if arm.normalized:
            attend = conv.attention.attend
            conv.attention.attend = lambda x, attend=attend: attend(F.layer_norm(x, x.shape[1:]))
    if arm.usage_weight or arm.entropy_weight:
        training.task = Balanced(training.task, convs, arm)


@torch.inference_mode()
def infer(model: nn.Module, features: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, classes)."""
    model.eval()
    return torch.cat([
        model(batch.float().contiguous(memory_format=torch.channels_last)) for batch in features.split(500)])


def run(arm: Arm, recipe: Recipe, tail: nn.Module, features: dict[str, Tensor], images: int, output: Path) -> dict:
    """Train one arm with one seed; returns its scores."""
    seed, labels = recipe.seed, features['train_labels']
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[:images]
    steps = len(chosen) // recipe.batch_size
    accelerator = make_accelerator(recipe, output)
    network = make_network(tail, arm, int(labels.max()) + 1, seed)
    if arm.freeze:
        freeze(network, arm.freeze)
    if not arm.router_learns:
        for conv in (module for module in network.modules() if isinstance(module, DynamicConv2d)):
            conv.attention.kernel.requires_grad_(False)
    classes = SimpleNamespace(label_names=list(range(network.num_classes)))
    training = make_training(
        accelerator, recipe, network, dict(mean=[0.0], std=[1.0]), classes, recipe.epochs * steps)
    training.normalize = nn.Identity()  # features are what they are
    start_otherwise(training, arm, features['train'][chosen], seed)

    _optim.train_mode(training.model)
    start, losses = time.perf_counter(), []
    for _ in range(recipe.epochs):
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for rows in order.split(recipe.batch_size)[:steps]:
            batch = features['train'][rows].float().contiguous(memory_format=torch.channels_last)
            losses.append(train_step(training, batch, labels[rows]).item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f'the loss is {losses[-1]} in step {len(losses)} of this run: {arm}, seed {seed}')
    seconds = time.perf_counter() - start
    scores = score(training.model, features)
    accelerator.free_memory()
    return dict(scores, train_loss=sum(losses[-steps:]) / steps, seconds=seconds)


def score(model: nn.Module, features: dict[str, Tensor]) -> dict:
    """Accuracy of the validation images, and what it is with the mean attention of them in place of each one's own."""
    labels = features['validation_labels']

    def top1(logits: Tensor) -> float:
        return 100 * (logits.argmax(1) == labels).double().mean().item()

    with watched(model) as statistics:
        logits = infer(model, features['validation'])
    scores = dict(top1=top1(logits), loss=F.cross_entropy(logits, labels).item())
    if statistics:
        for name, kernels_only in ('top1_of_mean', False), ('top1_of_mean_kernels', True):
            with averaged(statistics, kernels_only):
                scores[name] = top1(infer(model, features['validation']))
        scores |= {name: number for name, number in summarized(statistics).items() if number is not None}
        scores['layers'] = {
            name: {number: getattr(layer, number)() for number in (
                'kernel_entropy', 'usage_entropy', 'gate_std', 'kernel_distance')}
            for name, layer in statistics.items()}
    return scores


def main(
        init: str, dataset: str, mixed: bool, whole: bool, image_size: int, images: int, validation_images: int,
        epochs: int, arms: list[str], seeds: int, output: Path,
) -> None:
    body, tail, revision = load_parts(init, whole)
    name = Path(dataset).name + ('_mixed' if mixed else '') + ('_whole' if whole else '')
    about = dict(weights=revision, dataset=name, image_size=str(image_size))
    args = SimpleNamespace(dataset=dataset, mixed=mixed, image_size=image_size)
    features = cached_features(body, args, about, output / f'{name}.safetensors')
    features |= {part: features[part][:validation_images] for part in ('validation', 'validation_labels')}
    recipe = dataclasses.replace(PRESETS['finetune'], epochs=epochs, tracker='none', num_workers=0)
    settings = dict(about, images=min(images, len(features['train'])), epochs=epochs)
    path = output / f'{name}_{settings["images"]}_x_{epochs}.jsonl'
    done = read_runs(path) if path.exists() else []
    validated = len(features['validation'])
    if any((line['settings'], line['validation_images']) != (settings, validated) for line in done):
        raise SystemExit(f'{path} holds runs with other settings: name another --output')
    done = {(line['arm'], line['seed']) for line in done}
    for seed in range(seeds):
        for arm in arms:
            if (arm, seed) in done:
                continue
            tuned = dataclasses.replace(
                recipe, seed=seed, lr=ARMS[arm].lr, attention_lr_scale=ARMS[arm].attention_lr)
            result = run(ARMS[arm], tuned, tail, features, images, output)
            line = dict(
                arm=arm, seed=seed, settings=settings, values=dataclasses.asdict(ARMS[arm]), **result,
                validation_images=validated,
                device=device_name(torch.device('cpu')), **circumstances('laboratory.py'))
            with path.open('a', encoding='utf-8') as file:
                file.write(json.dumps(line, allow_nan=False) + '\n')
            print(f'{arm}, seed {seed}: ' + ', '.join(
                f'{key} {value:.4g}' for key, value in result.items() if isinstance(value, float)), flush=True)
    print(make_table(path))


if __name__ == '__main__':
    main(**vars(arguments))
