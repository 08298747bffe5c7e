"""recipes/federated.py: the rounds of a federated run, what they send, and what they are spared.

Here the client is called where Flower would send it a message; test_flower.py has Flower's simulation and processes.
"""
import json
import math
import shlex
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import tiny
import torch
from torch import nn

pytest.importorskip('flwr', reason="federated.py needs Flower: pip install -e '.[federated]'")

import _exchange
import _federated_client
import _federated_report
import _federated_server
import _rounds
import _training
import federated
from _federation import Federation, parse_federated
from _partition import dirichlet_partition
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from safetensors.torch import load_file
from tiny import make_recipe, run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('fresh_accelerator')


class Clients(Grid):
    """Clients in this process. `spoil` makes another reply of one, or None: (partition, round, reply) -> reply."""

    def __init__(self, count, spoil=None, node_configs=None):
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # which Flower's processes set
        node_configs = node_configs or [{'partition-id': i} for i in range(count)]
        self.contexts = {
            100 + i: Context(0, 100 + i, config, RecordDict(), {}) for i, config in enumerate(node_configs)}
        self.spoil, self.asked_in = spoil, set()
        self.sent, self.answers = [], []  # the arrays of every message by their names

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            self.sent.append(dict(message.content['arrays']))
            self.asked_in.add(message.content['config']['server-round'])
            node = message.metadata.dst_node_id
            message.metadata.__dict__['_message_id'] = uuid.uuid4().hex
            try:
                reply = _federated_client.client_app(message, self.contexts[node])
            except Exception as error:  # as Flower does
                reply = Message(Error(0, str(error)), reply_to=message)
            if self.spoil:
                reply = self.spoil(node - 100, message.content['config']['server-round'], reply)
            if reply:
                self.answers += map(dict, reply.content.array_records.values() if reply.has_content() else ())
                replies.append(reply)
        return replies

    def _no(self, *args, **kwargs):
        raise NotImplementedError

    set_run = run = create_message = get_nodes = push_messages = pull_messages = _no


def federate(folder, output, spoil=None, node_configs=None, recipe=None, **federation):
    """Two clients, two rounds of an epoch; the record, and the clients."""
    usual = dict(num_supernodes=2, num_server_rounds=2, local_epochs=1, alpha=1.0)
    federation = Federation(**dict(usual, **federation))
    epochs = federation.num_server_rounds * federation.local_epochs
    recipe = make_recipe(folder, **dict(dict(epochs=epochs), **(recipe or {})))
    clients = Clients(federation.num_supernodes, spoil, node_configs)
    return _federated_server.serve(clients, 'digits', recipe, federation, output), clients


def weights(output):
    return load_file(output / 'model.safetensors')


@pytest.fixture(scope='module')
def network():
    torch.manual_seed(0)
    return timm.create_model(tiny.NAME, num_classes=10)


def test_every_round_is_recorded_with_the_bytes_that_were_sent(digits_folder, tmp_path):
    record, clients = federate(digits_folder, tmp_path)
    assert json.loads((tmp_path / 'federated.json').read_text()) == json.loads(json.dumps(record))
    assert [of['round'] for of in record['rounds']] == [1, 2]
    assert all(of['clients'] == 2 and of['examples'] == 64 and not of['dropped'] for of in record['rounds'])
    assert record['top1'] == record['rounds'][1]['top1']
    for way, messages in ('bytes_down', clients.sent), ('bytes_up', clients.answers):
        sent = sum(len(array.data) + len(name) for arrays in messages for name, array in arrays.items())
        assert record[way] == sum(of[way] for of in record['rounds']) == sent
        assert 1 < sent / (4 * 4 * record['exchanged']) < 1.1  # 2 rounds, 2 clients, 4 bytes, names and headers
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == [str(digit) for digit in range(10)]


def test_one_client_with_all_images_in_one_round_is_a_run_of_train(digits_folder, tmp_path):
    run(make_recipe(digits_folder), tmp_path / 'run')
    federate(digits_folder, tmp_path / 'federated', num_supernodes=1, num_server_rounds=1, local_epochs=2)
    expected, found = weights(tmp_path / 'run'), weights(tmp_path / 'federated')
    assert expected.keys() == found.keys()
    for name in expected:
        if not name.endswith('num_batches_tracked'):  # counted by the client alone
            assert torch.equal(expected[name], found[name]), name


def test_temperature_and_learning_rate_follow_the_rounds(digits_folder, tmp_path, monkeypatch):
    seen, train_step = [], _training.train_step

    def recorded(training, images, labels):
        loss = train_step(training, images, labels)
        seen.append((
            training.total_steps, training.step, training.temperature, _training.learning_rate(training.optimizer)))
        return loss

    monkeypatch.setattr(_training, 'train_step', recorded)
    federate(
        digits_folder, tmp_path, recipe=dict(annealed_by=1.0, batch_size=8), alpha=0.3)
    totals = {total for total, *_ in seen}
    assert len(totals) == 2  # the clients have other numbers of images
    for total, step, temperature, rate in seen:
        assert temperature == pytest.approx(30 - 29 * (step - 1) / total)
        assert rate == pytest.approx(0.05 * (1 + math.cos(math.pi * step / total)) / 2)
    saved = weights(tmp_path)
    assert all(value == 1 for name, value in saved.items() if name.endswith('kernel_temperature'))


def spoiled(change):
    """Change the content of the second client's reply in the second round."""
    def spoil(partition, server_round, reply):
        if (partition, server_round) == (1, 2):
            return change(reply)
        return reply
    return spoil


def replace_array(value):
    def change(reply):
        arrays = reply.content['arrays']
        name = next(iter(arrays))
        arrays[name] = value(arrays[name])
        return reply
    return spoiled(change)


def replace_metric(name, value):
    def change(reply):
        reply.content['metrics'][name] = value
        return reply
    return spoiled(change)


def drop_array(reply):
    del reply.content['arrays'][next(iter(reply.content['arrays']))]
    return reply


def add_array(reply):
    reply.content['arrays']['backdoor'] = Array(np.zeros(1, np.float32))
    return reply


def without_metrics(reply):
    del reply.content['metrics']
    return reply


def without_partition(reply):
    reply.content['config'] = ConfigRecord()
    return reply


def fail(reply):
    """What Flower makes of an exception, and where a node has gone."""
    failed = Message(Error(3, 'The actor died.\n\tclass_name: ClientAppActor'), reply_to=reply)
    failed.metadata.__dict__.update(_src_node_id=1, _reply_to_message_id=reply.metadata.reply_to_message_id)
    return failed


NOT_NUMBERS = 'expected num-examples, train_loss'
SPOILED = dict(
    vanished=(spoiled(lambda reply: None), 'no answer within 3600 s'),
    failed=(spoiled(fail), 'The actor died. class_name: ClientAppActor'),
    nan=(replace_array(lambda of: Array(of.numpy() * np.float32('nan'))), 'is not finite'),
    infinite=(replace_array(lambda of: Array(of.numpy() + np.float32('inf'))), 'is not finite'),
    shape=(replace_array(lambda of: Array(of.numpy()[:1])), 'expected floating-point numbers'),
    integers=(replace_array(lambda of: Array(of.numpy().astype(np.int64))), 'is int64'),
    garbage=(replace_array(lambda of: Array(of.dtype, of.shape, of.stype, b'garbage')), 'cannot be read'),
    missing=(spoiled(drop_array), 'tensors are missing'),
    unknown=(spoiled(add_array), 'backdoor for instance'),
    no_metrics=(spoiled(without_metrics), 'expected arrays, config, metrics'),
    no_examples=(replace_metric('num-examples', 0), NOT_NUMBERS),
    negative=(replace_metric('num-examples', -5), NOT_NUMBERS),
    nan_examples=(replace_metric('num-examples', float('nan')), NOT_NUMBERS),
    list_of_examples=(replace_metric('num-examples', [1, 2]), NOT_NUMBERS),
    too_many_examples=(replace_metric('num-examples', 1e300), NOT_NUMBERS),
    no_partition=(spoiled(without_partition), 'expected a partition-id'),
    nan_loss=(replace_metric('train_loss', float('nan')), NOT_NUMBERS),
    more=(replace_metric('accuracy', 1.0), NOT_NUMBERS),
)


def ask(rounds, state, server_round, count=1):
    """The messages of a round to so many clients."""
    messages = rounds.configure_train(server_round, ArrayRecord(state), ConfigRecord(), Clients(count))
    for message in messages:
        message.metadata.__dict__['_message_id'] = uuid.uuid4().hex  # as Flower does when it sends them
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def answer(message, state, **metrics):
    content = RecordDict(dict(
        arrays=_exchange.pack(state), metrics=MetricRecord(dict({'num-examples': 3, 'train_loss': 1.0}, **metrics)),
        config=ConfigRecord({'partition-id': message.metadata.dst_node_id - 100})))
    return Message(content, reply_to=message)


@pytest.mark.parametrize('kind', SPOILED)
def test_a_client_that_fails_is_dropped_with_words_and_the_round_goes_on(network, kind, capsys):
    spoil, reason = SPOILED[kind]
    rounds = _rounds.Rounds(Federation(), network, {}, done=1)
    state = _exchange.shared_state(network, fedbn=False)
    first, second = ask(rounds, state, 1, count=2)
    good = {name: value + 1 for name, value in state.items()}
    arrays, _ = rounds.aggregate_train(1, filter(None, [answer(first, good), spoil(1, 2, answer(second, state))]))
    for name, value in good.items():
        assert torch.equal(torch.from_numpy(arrays[name].numpy()), value), name
    (node, said), = rounds.record['dropped']
    assert node == 101 and reason in said and rounds.record['clients'] == 1
    assert f'round 2: client 101 is dropped: {said}' in capsys.readouterr().out


def test_a_client_that_diverges_is_dropped(digits_folder, tmp_path, monkeypatch):
    train_locally = _federated_client.train_locally

    def diverge(client, proximal_mu):
        seen.append(client.server_round)
        if seen == [1, 1, 2]:
            client.network.conv1.weight.data.fill_(float('nan'))
        return train_locally(client, proximal_mu)

    seen = []
    monkeypatch.setattr(_federated_client, 'train_locally', diverge)
    record, _ = federate(digits_folder, tmp_path)
    assert [of['clients'] for of in record['rounds']] == [2, 1]
    (node, reason), = record['rounds'][1]['dropped']
    assert reason.startswith('the loss is nan at step') and math.isfinite(record['loss'])


def test_a_round_without_any_network_ends_the_run(digits_folder, tmp_path):
    with pytest.raises(SystemExit, match='round 1: no client sent a network .100: no answer within 3600 s; 101:'):
        federate(digits_folder, tmp_path, spoil=lambda *_: None)


@pytest.mark.slow
def test_a_server_that_was_killed_goes_on_to_the_same_result(digits_folder, tmp_path):
    """With the momentum of the server, and the BatchNorms of the clients."""
    federation = dict(strategy='fedavgm', server_momentum=0.9, fedbn=True, num_server_rounds=3)

    def kill(partition, server_round, reply):
        if (partition, server_round) == (1, 2):
            raise KeyboardInterrupt
        return reply

    expected, _ = federate(digits_folder, tmp_path / 'whole', **federation)
    with pytest.raises(KeyboardInterrupt):
        federate(digits_folder, tmp_path / 'killed', kill, **federation)
    found, clients = federate(digits_folder, tmp_path / 'killed', **federation)
    assert clients.asked_in == {2, 3}
    for one, other in zip(expected['rounds'], found['rounds'], strict=True):
        assert {**one, 'seconds': 0} == {**other, 'seconds': 0}
    last = 'checkpoints/epoch_0003/exchanged.safetensors'
    expected, found = (load_file(tmp_path / folder / last) for folder in ('whole', 'killed'))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(SystemExit, match='is of a run with alpha 1.0, this one has 2.0'):
        federate(digits_folder, tmp_path / 'killed', **dict(federation, alpha=2.0))


def batch_norms(network):
    return [name for name, module in network.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_fedbn_keeps_every_batch_norm_on_its_client(digits_folder, tmp_path, network):
    record, clients = federate(digits_folder, tmp_path, fedbn=True)
    norms = batch_norms(network)
    assert 'layer2.0.downsample.1' in norms and any('attention' in name for name in norms)
    names = {name for arrays in [*clients.sent, *clients.answers] for name in arrays}
    assert names and not any(name.startswith(f'{norm}.') for name in names for norm in norms)
    stored = [load_file(path) for path in sorted(tmp_path.glob('clients/*/*/round_000002.safetensors'))]
    assert len(stored) == 2 and {name.rpartition('.')[0] for name in stored[0]} == set(norms)
    assert all(name.endswith('num_batches_tracked') or not torch.equal(value, stored[1][name])
               for name, value in stored[0].items())
    assert all(of['validated'] == 50 for of in record['rounds'])  # each image by one client
    assert not (tmp_path / 'model.safetensors').exists()  # there is no one network


def test_fedbn_scores_each_client_with_its_own_norms(digits_folder, tmp_path, monkeypatch):
    seen, score_network = [], _federated_client.score_network

    def recorded(accelerator, recipe, network, loader, progress):
        seen.append(network.bn1.running_mean.clone())
        return score_network(accelerator, recipe, network, loader, progress)

    monkeypatch.setattr(_federated_client, 'score_network', recorded)
    federate(digits_folder, tmp_path, fedbn=True, num_server_rounds=1)
    stored = [load_file(path)['bn1.running_mean'] for path in sorted(tmp_path.glob('clients/*/*/*.safetensors'))]
    assert len(seen) == len(stored) == 2
    assert {tuple(mean.tolist()) for mean in seen} == {tuple(mean.tolist()) for mean in stored}


def test_without_fedbn_statistics_are_averaged_and_counters_stay(network):
    shared = _exchange.shared_state(network, fedbn=False)
    for norm in batch_norms(network):
        assert {f'{norm}.running_mean', f'{norm}.running_var'} <= set(shared)
    assert not any(name.endswith(('num_batches_tracked', 'temperature')) for name in shared)


def test_a_momentum_of_the_server_leaves_variances_positive(network):
    """They are averaged: 0.9 of the step before would take this one below zero."""
    federation = Federation(strategy='fedavgm', server_momentum=0.9)
    rounds = _rounds.Rounds(federation, network, {})
    found = _exchange.shared_state(network, fedbn=False)
    for server_round, variance in (1, 0.1), (2, 0.05):
        message, = ask(rounds, found, server_round)
        sent = {name: torch.full_like(value, variance) for name, value in found.items()}
        found = rounds.aggregate_train(server_round, [answer(message, sent)])[0].to_torch_state_dict()
    assert (found['bn1.running_var'] == 0.05).all()
    assert not torch.allclose(found['bn1.weight'], torch.tensor(0.05))


@pytest.mark.slow
def test_fedprox_stays_nearer_to_what_the_server_sent(digits_folder, tmp_path):
    moved = {}
    for mu in 0.0, 10.0:
        output = tmp_path / str(mu)
        federate(
            digits_folder, output, num_server_rounds=1, local_epochs=2, recipe=dict(clip_grad=None, lr=0.01),
            **dict(strategy='fedprox', proximal_mu=mu) if mu else {})
        found = weights(output)
        torch.manual_seed(0)
        start = timm.create_model(tiny.NAME, num_classes=10).state_dict()
        moved[mu] = sum((found[name] - start[name]).square().sum() for name in found if name.endswith('conv1.weight'))
    assert 0 < moved[10.0] < 0.8 * moved[0.0]


def test_kernels_in_half_precision_are_half_of_their_bytes_and_float32_on_the_server(digits_folder, tmp_path, network):
    record, clients = federate(digits_folder, tmp_path, fp16_kernels=True, num_server_rounds=1)
    kernels = _exchange.kernel_names(network)
    assert {'conv1.weight', 'layer1.0.conv1.weight', 'layer2.0.downsample.0.weight'} < kernels
    assert not any('attention' in name or 'fc' in name for name in kernels)
    for arrays in [*clients.sent, *clients.answers]:
        for name, array in arrays.items():
            assert array.dtype == ('float16' if name in kernels else 'float32'), name
    assert record['bytes_up'] == record['bytes_down']
    in_half = sum(network.get_parameter(name).numel() for name in kernels)
    full = sum(value.numel() for value in _exchange.shared_state(network, False).values())
    headers = record['bytes_down'] / 2 - (4 * full - 2 * in_half)
    assert 0 < headers <= 160 * len(clients.sent[0])  # those of numpy's format, and names
    saved = weights(tmp_path)
    assert saved['layer1.0.conv1.weight'].dtype == torch.float32
    assert not torch.equal(saved['layer1.0.conv1.weight'], saved['layer1.0.conv1.weight'].half().float())  # an average


@pytest.fixture
def static(digits_folder, tmp_path):
    """A trained static network."""
    run(make_recipe(digits_folder, model=tiny.STATIC, epochs=1), tmp_path / 'static')
    return tmp_path / 'static'


@pytest.mark.slow
def test_a_frozen_backbone_stays_where_it_is(digits_folder, tmp_path, static, network):
    recipe = dict(init=f'inflated:{static}', freeze='backbone')
    record, clients = federate(digits_folder, tmp_path / 'run', recipe=recipe)
    names = set(clients.sent[0])
    assert all('.attention.' in name or name.startswith('fc.') for name in names)
    assert {'fc.weight', 'fc.bias'} < names and record['exchanged'] < 0.2 * record['parameters']
    before, after = load_file(static / 'model.safetensors'), weights(tmp_path / 'run')
    assert torch.equal(before['bn1.running_mean'], after['bn1.running_mean'])
    assert torch.equal(before['bn1.weight'], after['bn1.weight'])
    assert not torch.equal(before['fc.weight'], after['fc.weight'])


def test_a_client_with_another_backbone_is_dropped(digits_folder, tmp_path, static, monkeypatch):
    first_network = _federated_client.first_network

    def other(recipe):
        network, origin = first_network(recipe)
        if len(seen) == 1:
            network.conv1.weight.data.mul_(1.01)
        seen.append(None)
        return network, origin

    seen = []
    monkeypatch.setattr(_federated_client, 'first_network', other)
    record, _ = federate(
        digits_folder, tmp_path / 'run', num_server_rounds=1, recipe=dict(init=f'inflated:{static}', freeze='backbone'))
    (_, reason), = record['rounds'][0]['dropped']
    assert reason == 'the network is not that of the server: --init must be the same weights everywhere'


def partition(clients, alpha, seed=0, labels=None):
    labels = np.repeat(np.arange(10), 100) if labels is None else labels
    return dirichlet_partition(labels, np.repeat(np.arange(10), 20), 10, clients, alpha, seed)


def test_each_image_is_on_one_client_and_a_small_alpha_gives_few_classes():
    labels = np.repeat(np.arange(10), 100)
    classes = {}
    for alpha in 0.1, 100:
        parts, others = partition(4, alpha)
        assert sorted(np.concatenate(parts)) == list(range(1000)) and sorted(np.concatenate(others)) == list(range(200))
        assert min(map(len, parts)) > 0
        counts = np.stack([np.bincount(labels[part], minlength=10) for part in parts])
        tests = np.stack([np.bincount(np.repeat(np.arange(10), 20)[part], minlength=10) for part in others])
        assert abs(counts / 100 - tests / 20).max() <= 0.05  # by the same shares
        classes[alpha] = (counts > 10).sum(1).mean()
    assert classes[0.1] < 5 and classes[100] == 10
    again, other_seed = partition(4, 0.1)[0], partition(4, 0.1, seed=1)[0]
    assert all(map(np.array_equal, again, partition(4, 0.1)[0])) and list(map(len, again)) != list(map(len, other_seed))


def test_more_clients_than_images_are_refused():
    with pytest.raises(SystemExit, match='--num-supernodes 11 with --alpha 1.0: a client has none of the 10 training'):
        partition(11, 1.0, labels=np.arange(10))


@pytest.mark.parametrize('model', [tiny.NAME, pytest.param(tiny.STATIC, marks=pytest.mark.slow)])
def test_clients_with_a_single_image_or_a_single_class_train(digits_folder, tmp_path, monkeypatch, model):
    def few(labels, others, num_classes, *_):
        zeros = np.flatnonzero(labels == 0)
        counts.append(len(zeros))
        return [zeros[:1], zeros[1:], np.flatnonzero(labels == 1)[:3]], [np.arange(0), np.arange(20), np.arange(20, 50)]

    counts = []
    monkeypatch.setattr(_federated_client, 'dirichlet_partition', few)
    record, clients = federate(
        digits_folder, tmp_path, num_supernodes=3, fedbn=True, recipe=dict(model=model, class_weights=True))
    assert [of['dropped'] for of in record['rounds']] == [[], []]
    assert record['rounds'][0]['examples'] == 1 + counts[0] - 1 + 3 and record['rounds'][0]['validated'] == 50


def test_a_node_has_a_dataset_of_its_own(digits_folder, tmp_path):
    record, _ = federate('digits', tmp_path, num_server_rounds=1, node_configs=[
        {'dataset': str(digits_folder)}, {}], recipe=dict(batch_size=16))
    assert record['rounds'][0]['examples'] == 64
    (_, reason), = record['rounds'][0]['dropped']
    assert reason == "--node-config must have dataset='...', or partition-id=... of the server's dataset"


@pytest.mark.parametrize('arguments, message', [
    ('--strategy fedprox', '--strategy fedprox does what fedavg does: it needs --proximal-mu'),
    ('--server-momentum 0.9', '--server-momentum has no effect: it needs --strategy fedavgm'),
    ('--strategy fednova', "--strategy must be one of fedavg, fedavgm, fedprox, got 'fednova'"),
    ('--alpha 0', '--alpha must be between 0.01 and 1e+06, got 0.0'),
    ('--alpha nan', '--alpha must be between 0.01 and 1e+06, got nan'),
    ('--num-supernodes 0', '--num-supernodes must be between 1 and 100000, got 0'),
    ('--ema-decay 0.9', '--ema-decay must be left out: the average over the clients is what counts'),
    ('--streaming', '--streaming must be left out: each client needs the labels of its images'),
    ('--warmup-epochs 46', '--epochs must be at least the 46 of warm-up, decay and cooldown, got 45'),
    ('--seeds 0', '--seeds must be at least 1, got 0'),
])
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(SystemExit) as refusal:
        parse_federated(['digits', *arguments.split()])
    assert refusal.value.code == message


def test_epochs_are_those_of_all_rounds(capsys):
    parsed = parse_federated(['digits', '--num-server-rounds', '6', '--local-epochs', '2'])
    assert parsed.recipe.epochs == 12 and parsed.models == ['resnet20_cifar', 'resnet20_fmd_cifar']
    with pytest.raises(SystemExit):
        parse_federated(['digits', '--epochs', '6'])
    assert '--num-server-rounds and --local-epochs' in capsys.readouterr().err


@pytest.mark.slow
def test_finished_runs_are_kept_and_the_table_has_both_networks(digits_folder, tmp_path):
    federation = Federation(num_supernodes=2, num_server_rounds=1, local_epochs=1)
    asked = SimpleNamespace(
        preset='digits', recipe=make_recipe(digits_folder, epochs=1), federation=federation,
        models=[tiny.STATIC, tiny.NAME], seeds=2, output=tmp_path)
    grid = Clients(2)
    _federated_server.train_all(grid, **vars(asked))
    assert len(grid.sent) == 2 * 2 * 2  # clients, networks, seeds
    table = _federated_server.train_all(grid, **vars(asked))
    assert len(grid.sent) == 2 * 2 * 2  # clients, networks, seeds
    assert (tmp_path / 'table.md').read_text() == table
    static, dynamic = table.splitlines()[2:4]
    assert static.startswith(f'| {tiny.STATIC} |') and dynamic.startswith(f'| {tiny.NAME} |') and ' ± ' in dynamic
    assert '2 clients, Dir(0.5), 1 rounds of 1 local epochs, fedavg, 2 seeds of each' in table
    assert (tmp_path / 'accuracy.png').stat().st_size > 10000
    with pytest.raises(SystemExit, match='holds a run with other settings'):
        _federated_server.train_all(grid, **dict(vars(asked), federation=Federation(num_supernodes=3)))
    assert _federated_report.write(tmp_path) == table


def test_the_flower_app_takes_the_arguments_of_the_command(digits_folder, tmp_path):
    assert len(build_fab_from_disk(ROOT / 'recipes')) < 1e6
    arguments = [
        'digits', '--dataset', digits_folder, '--models', tiny.STATIC, '--num-supernodes', 2, '--num-server-rounds', 1,
        '--local-epochs', 1, '--batch-size', 16, '--warmup-epochs', 0, '--output', tmp_path]
    context = Context(0, 0, {}, RecordDict(), {'arguments': shlex.join(map(str, arguments))})
    federated.server_app(Clients(2), context)
    assert json.loads((tmp_path / tiny.STATIC / 'seed_0' / 'federated.json').read_text())['rounds'][0]['clients'] == 2
    context.run_config['arguments'] += ' --alpha 0'
    with pytest.raises(RuntimeError, match='--alpha must be between'):
        federated.server_app(Clients(2), context)


@pytest.mark.parametrize('dataset', ['digits', 'cifar10'])
def test_the_page_has_the_measured_table(dataset):
    folder = ROOT / 'recipes/results/federated' / dataset
    table = (folder / 'table.md').read_text()
    assert table in (ROOT / 'recipes/FEDERATED.md').read_text()
    assert _federated_report.make_table(_federated_report.read_records(folder)) == table
