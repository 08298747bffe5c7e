"""What the server of a federated run does: it starts Flower's strategy, scores the average, and keeps every round."""
import dataclasses
import json
import math
import time
import uuid
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _checkpoints
import _federated_report
from _accelerator import images_per_pass, make_accelerator
from _data import LabelledImages, open_images
from _dataset import dataset_name
from _exchange import digest, load, shared_state, statistics, unpack
from _federated_client import make_validation_loader, score_network, set_round_temperature
from _federation import Federation
from _measure import count_gmacs
from _output import open_output
from _recipe import Recipe
from _record import circumstances, hardware, public, read_json, sha256, write_json
from _rounds import Rounds
from _start import check_names, check_pass, complete, data_config, first_network, fit_network
from accelerate import Accelerator
from accelerate.utils import set_seed
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from safetensors.torch import load_file, save_file
from torch import nn
from train import run_settings

from fmd_timm.hub import save_for_hub
from fmd_timm.models._pretrained import WEIGHTS_NAME

RECORD = 'federated.json'
EXCHANGED, MOMENTUM = 'exchanged.safetensors', 'momentum.safetensors'  # in a checkpoint


def train_all(
        grid: Grid,
        preset: str,
        recipe: Recipe,
        federation: Federation,
        models: list[str],
        seeds: int,
        output: Path,
        parallel: int | None = None,
) -> str:
    """Train every network with every seed, and write the table, which comes back; finished runs are kept, others go on.

    Raises:
        SystemExit: A value can't work, the folder holds another run, or no client sends a network.
    """
    for seed in range(seeds):
        for model in models:
            asked, folder = dataclasses.replace(recipe, model=model, seed=seed), output / model / f'seed_{seed}'
            if (folder / RECORD).exists():
                record = read_json(folder / RECORD)
                if (record['recipe'], record['federation']) != (
                        public(dataclasses.asdict(asked)), dataclasses.asdict(federation)):
                    raise SystemExit(f'--output {folder} holds a run with other settings: name another folder')
                continue
            print(f'{folder.resolve()}:', flush=True)
            serve(grid, preset, asked, federation, folder)
    return _federated_report.write(output)


def serve(grid: Grid, preset: str, asked: Recipe, federation: Federation, output: Path) -> dict[str, Any]:
    """Train one network; returns the record that `federated.json` holds."""
    check_names(asked)
    accelerator = make_accelerator(asked, output)
    network, origin = first_network(asked)
    recipe = complete(asked, network)
    check_pass(recipe, network, images_per_pass(accelerator, recipe))
    settings = run_settings(preset, asked, 1, origin, None) | dataclasses.asdict(federation)
    del settings['round_timeout']
    model_bytes = 4 * sum(p.numel() for p in network.parameters())
    lock, checkpoint, progress = open_output(accelerator, output, 'auto', model_bytes, settings)
    progress = progress or dict(
        settings=settings, images=None, run=uuid.uuid4().hex, epochs_done=0, step=0, rounds=[])
    images = open_images(recipe)
    progress['images'] = _checkpoints.check_images(checkpoint, progress['images'], images)
    set_seed(recipe.seed)
    network, label_names = fit_network(recipe, network, origin, images, print)
    if federation.fedbn and not statistics(network):
        raise SystemExit(f'--fedbn has no effect: {recipe.model} has no BatchNorm that learns')
    order = dict(
        recipe=json.dumps(dataclasses.asdict(asked)), federation=json.dumps(dataclasses.asdict(federation)),
        run=progress['run'], output=str(output.resolve()), digest=digest(network, federation.fedbn),
        **{'label-names': label_names})
    momentum = {}
    if checkpoint:
        load(network, load_file(checkpoint / EXCHANGED))
        momentum = load_file(checkpoint / MOMENTUM)
    done = len(progress['rounds'])
    rounds = Rounds(federation, network, order, done, momentum)
    loader = None if federation.fedbn else make_validation_loader(accelerator, recipe, network, images)

    def finish_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            return None
        load(network, unpack(arrays, rounds.like))
        record, part = rounds.record, (done + server_round) / federation.num_server_rounds
        if loader:
            record |= score_network(accelerator, recipe, network, loader, part)
            if not math.isfinite(record['loss']):
                raise SystemExit(
                    f'round {record["round"]}: the loss of the validation images is {record["loss"]}, training has '
                    f'diverged; the last checkpoint is from before it')
        record['seconds'] = time.perf_counter() - record['seconds']
        progress['rounds'].append(record)
        progress['epochs_done'] = record['round'] * federation.local_epochs
        _checkpoints.write(
            accelerator, output / 'checkpoints', progress, partial(write_state, network=network, rounds=rounds))
        print(describe(record, federation), flush=True)
        return None

    if done < federation.num_server_rounds:
        wait_for_clients(grid, federation)
        rounds.start(
            grid, ArrayRecord(shared_state(network, federation.fedbn)), num_rounds=federation.num_server_rounds - done,
            timeout=federation.round_timeout, evaluate_fn=finish_round)
    set_round_temperature(recipe, network, 1.0)
    record = dict(
        preset=preset, recipe=public(dataclasses.asdict(asked)), federation=dataclasses.asdict(federation), init=origin,
        **make_record(accelerator, recipe, network, images, progress, rounds))
    if not federation.fedbn:  # else each client has its own
        config = data_config(recipe, network)
        save_for_hub(network, output, model_config=dict(label_names=label_names), data_config=config)
        record['weights_sha256'] = sha256(output / WEIGHTS_NAME)
    write_json(output / RECORD, record)
    if lock:
        lock.close()
    return record


def wait_for_clients(grid: Grid, federation: Federation) -> None:
    """Until all are connected, or as long as a round would wait for them if there are some."""
    expected, start = federation.num_supernodes, time.monotonic()
    while (connected := len(list(grid.get_node_ids()))) < expected:
        waited = time.monotonic() - start
        if waited > federation.round_timeout and connected:
            print(f'{connected} of {expected} clients are there after {waited:.0f} s: going on with them', flush=True)
            return
        time.sleep(1)


def write_state(folder: Path, network: nn.Module, rounds: Rounds) -> None:
    state = shared_state(network, rounds.federation.fedbn)
    folder.mkdir()
    for name, tensors in (EXCHANGED, state), (MOMENTUM, rounds.momentum()):
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / name)


def describe(record: dict[str, Any], federation: Federation) -> str:
    score = f'top1 {record["top1"]:.2f}, loss {record["loss"]:.4g}' if 'top1' in record else 'no client was scored'
    return (
        f'round {record["round"]} of {federation.num_server_rounds}: {score}, train_loss {record["train_loss"]:.4g}, '
        f'{record["clients"]} clients, {record["bytes_down"] / 1e6:.1f} MB down, {record["bytes_up"] / 1e6:.1f} MB up, '
        f'{record["seconds"]:.1f} s')


def make_record(
        accelerator: Accelerator,
        recipe: Recipe,
        network: nn.Module,
        images: dict[str, LabelledImages],
        progress: dict[str, Any],
        rounds: Rounds,
) -> dict[str, Any]:
    """What the run was and reached; the rest of the record is what it was asked to be."""
    train, validation, size = images['train'], images['validation'], recipe.test_size
    made = circumstances('federated.py')
    made['versions']['flwr'] = version('flwr')
    return dict(
        model=recipe.model, dataset=dataset_name(recipe.dataset), train_images=len(train),
        validation_images=len(validation), num_classes=len(train.label_names), rounds=progress['rounds'],
        **{name: progress['rounds'][-1].get(name) for name in ('top1', 'top5', 'loss')},
        bytes_down=sum(of['bytes_down'] for of in progress['rounds']),
        bytes_up=sum(of['bytes_up'] for of in progress['rounds']),
        parameters=sum(p.numel() for p in network.parameters()),
        exchanged=sum(tensor.numel() for tensor in rounds.like.values()),
        gmacs=count_gmacs(network, (3, size, size)), seed=recipe.seed, **hardware(accelerator), **made)
