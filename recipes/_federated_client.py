"""What a client of a federated run does: it trains what the server sends on images of its own, and sends it back.

A message says everything that the client needs: recipe, federation and round. Nothing stays in memory from one to the
next, so a client may be started anew at any time. With --fedbn its BatchNorms are in files.
"""
import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _accelerator import make_accelerator
from _data import LabelledImages, open_images
from _exchange import digest, kernel_names, load, norm_state, pack, shared_state, unpack
from _federation import Federation
from _interruptions import Interruptions
from _loaders import Normalize, batches_of, make_loaders
from _measure import score
from _partition import dirichlet_partition
from _recipe import Recipe
from _record import replacing
from _start import complete, data_config, first_network, fit_network
from _training import Training, anneals, make_training, train_epoch
from accelerate import Accelerator
from accelerate.utils import set_seed
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

import fmd_timm  # noqa: F401, registers the models
from fmd_timm import set_temperature
from fmd_timm.layers import annealed_temperature

KEPT = 2  # rounds whose BatchNorms a client keeps: the server may go on from the one before the last
client_app = ClientApp()


class Client(NamedTuple):
    """What a message asks for, put together."""
    accelerator: Accelerator
    recipe: Recipe  # complete, with batches that the client's images fill
    network: nn.Module  # as the server sent it
    images: dict[str, LabelledImages]
    num_examples: int  # images to train on, each counted once
    federation: Federation
    server_round: int
    norms: Path  # folder of its BatchNorms


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """The network after the local epochs, and how many images it has learned from."""
    with refusals():
        client = make_client(message, context)
        loss = train_locally(client, message.content['config'].get('proximal-mu', 0.0))
        if client.federation.fedbn:
            save_norms(client)
        kernels = kernel_names(client.network) if client.federation.fp16_kernels else set()
        arrays = pack(shared_state(client.network, client.federation.fedbn), kernels)
    metrics = MetricRecord({'num-examples': client.num_examples, 'train_loss': loss})
    config = ConfigRecord({'partition-id': context.node_config.get('partition-id', -1)})
    return Message(RecordDict(dict(arrays=arrays, metrics=metrics, config=config)), reply_to=message)


@client_app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The score of the server's network with this client's BatchNorms on its images to validate on."""
    with refusals():
        client = make_client(message, context)
        count, metrics = len(client.images['validation']), dict(top1=0.0, top5=0.0, loss=0.0)
        if count:
            loader = make_validation_loader(client.accelerator, client.recipe, client.network, client.images)
            metrics = score_network(
                client.accelerator, client.recipe, client.network, loader,
                client.server_round / client.federation.num_server_rounds)
    return Message(RecordDict(dict(metrics=MetricRecord({'num-examples': count, **metrics}))), reply_to=message)


@contextmanager
def refusals():
    """Flower sends exceptions back as the reply of a client; SystemExit would end the process of all clients."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(error.code) from error


def make_client(message: Message, context: Context) -> Client:
    """What the message asks for.

    Raises:
        SystemExit: The client has no such images or another network.
    """
    config = message.content['config']
    recipe, federation = Recipe(**json.loads(config['recipe'])), Federation(**json.loads(config['federation']))
    if 'dataset' in context.node_config:
        recipe = dataclasses.replace(recipe, dataset=context.node_config['dataset'])
    images = own_images(recipe, federation, context.node_config, config['label-names'])
    num_examples = len(images['train'])
    recipe, images['train'] = fill_batch(recipe, images['train'])
    threads = torch.get_num_threads()  # as Flower has shared the cores out
    accelerator = make_accelerator(recipe, Path(config['output']))
    torch.set_num_threads(threads)
    network, origin = first_network(recipe)
    recipe = complete(recipe, network)
    set_seed(recipe.seed)
    network, _ = fit_network(recipe, network, origin, images, print)
    if digest(network, federation.fedbn) != config['digest']:
        raise SystemExit('the network is not that of the server: --init must be the same weights everywhere')
    load(network, unpack(message.content['arrays'], shared_state(network, federation.fedbn)))
    client = Client(
        accelerator, recipe, network, images, num_examples, federation, config['server-round'],
        norms_folder(config, context.node_config))
    if federation.fedbn:
        load_norms(client, before=client.server_round + (message.metadata.message_type != 'train'))
    return client


def own_images(
        recipe: Recipe, federation: Federation, node_config: Mapping[str, Any], label_names: list[str],
) -> dict[str, LabelledImages]:
    """A client's part of the dataset; all of it where the node has a dataset of its own."""
    images = dict(opened(json.dumps(dataclasses.asdict(recipe))))
    for part in images.values():
        part.use_classes(label_names, 'the server')
    if 'partition-id' not in node_config:
        if 'dataset' not in node_config:
            raise SystemExit("--node-config must have dataset='...', or partition-id=... of the server's dataset")
        return images
    place = node_config['partition-id']
    if not 0 <= place < federation.num_supernodes:
        raise SystemExit(f'partition-id must be from 0 to {federation.num_supernodes - 1}, got {place}')
    parts = dirichlet_partition(
        images['train'].targets, images['validation'].targets, len(label_names), federation.num_supernodes,
        federation.alpha, recipe.seed)
    return {name: of.select(places[place]) for (name, of), places in zip(images.items(), parts)}


@functools.lru_cache(maxsize=1)  # a process has a message of each round
def opened(recipe: str) -> dict[str, LabelledImages]:
    return open_images(Recipe(**json.loads(recipe)))


def fill_batch(recipe: Recipe, images: LabelledImages) -> tuple[Recipe, LabelledImages]:
    """A batch that the images fill: a client with few has smaller ones, one with a single image sees it twice.

    BatchNorm takes no statistics of one value. The two have other crops.
    """
    smallest = 2 * recipe.accumulate  # for each backward pass
    if len(images) < smallest:
        images = images.select(np.resize(np.arange(len(images)), smallest))
    if len(images) < recipe.batch_size:
        recipe = dataclasses.replace(recipe, batch_size=len(images) // smallest * smallest)
    return recipe, images


def train_locally(client: Client, proximal_mu: float) -> float:
    """The local epochs of the round, by the steps of recipes/train.py; returns the last batch's loss.

    Epochs are those of the whole run: learning rate and temperature follow the server's rounds, on every client alike.
    """
    recipe, federation = client.recipe, client.federation
    config = data_config(recipe, client.network)
    # Those to validate on are not needed, and the fewest that a loader takes.
    images = dict(client.images, validation=client.images['train'].select([0]))
    train_loader = client.accelerator.prepare(make_loaders(client.accelerator, recipe, images, config)[0])
    steps_per_epoch = len(train_loader) // recipe.accumulate
    training = make_training(
        client.accelerator, recipe, client.network, config, images['train'], recipe.epochs * steps_per_epoch)
    first = (client.server_round - 1) * federation.local_epochs
    training.step = first * steps_per_epoch
    training.scheduler.step_update(training.step)
    if proximal_mu:
        add_distance(training, proximal_mu)
    set_seed(int(np.random.SeedSequence((recipe.seed, client.server_round)).generate_state(1)[0]))
    for epoch in range(first, first + federation.local_epochs):
        _, loss = train_epoch(training, batches_of(train_loader, epoch), Interruptions())
    return loss


def add_distance(training: Training, mu: float) -> None:
    """FedProx (arXiv 1812.06127): add mu / 2 times the squared distance to the weights that the server sent."""
    task = training.task
    learned = [(p, p.detach().clone()) for p in training.model.parameters() if p.requires_grad]

    def with_distance(images, labels):
        distance = sum((parameter - sent).square().sum() for parameter, sent in learned)
        return dict(loss=task(images, labels)['loss'] + mu / 2 * distance)

    training.task = with_distance


def make_validation_loader(
        accelerator: Accelerator, recipe: Recipe, network: nn.Module, images: dict[str, LabelledImages]) -> DataLoader:
    few = images['train'].select(np.resize(np.arange(len(images['train'])), recipe.batch_size))  # those are not needed
    loaders = make_loaders(accelerator, recipe, dict(images, train=few), data_config(recipe, network))
    return accelerator.prepare(loaders[1])


def set_round_temperature(recipe: Recipe, network: nn.Module, progress: float) -> None:
    """That which training has come to after a part of all rounds."""
    if anneals(recipe, network):
        set_temperature(network, kernel=annealed_temperature(progress, recipe.temperature, recipe.annealed_by))


def score_network(
        accelerator: Accelerator, recipe: Recipe, network: nn.Module, loader: DataLoader, progress: float,
) -> dict[str, float]:
    """Top-1 and top-5 in percent and the cross-entropy, at the temperature of that part of all rounds."""
    config = data_config(recipe, network)
    network.to(accelerator.device, memory_format=torch.channels_last if recipe.channels_last else torch.preserve_format)
    set_round_temperature(recipe, network, progress)
    normalize = Normalize(config['mean'], config['std'], recipe.channels_last).to(accelerator.device)
    return score(accelerator, network, loader, normalize, len(loader.dataset))


def norms_folder(config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Path:
    """Of a client's BatchNorms in this run, in the folder that the node names or else in that of the results."""
    own = node_config.get('folder') or Path(config['output'], 'clients', str(node_config.get('partition-id', 'own')))
    return Path(own, config['run'])


def stored_norms(folder: Path) -> dict[int, Path]:
    """Files by the round after which they were written."""
    return {
        int(match[1]): path for path in folder.glob('*.safetensors')
        if (match := re.fullmatch(r'round_(\d+)\.safetensors', path.name))}


def load_norms(client: Client, before: int) -> None:
    """The BatchNorms of the last round before that one; a client that has had none starts with the network's own."""
    found = {number: path for number, path in stored_norms(client.norms).items() if number < before}
    if found:
        load(client.network, load_file(found[max(found)]))


def save_norms(client: Client) -> None:
    client.norms.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in norm_state(client.network).items()}
    with replacing(client.norms / f'round_{client.server_round:06d}.safetensors') as unfinished:
        save_file(state, unfinished)
    stored = stored_norms(client.norms)
    for number in sorted(number for number in stored if number <= client.server_round)[:-KEPT]:
        stored[number].unlink()
