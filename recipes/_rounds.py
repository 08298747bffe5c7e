"""The rounds of a federated run: a strategy of Flower, and what it is spared.

What a client sends is checked before Flower averages it. One that fails, doesn't answer in time or sends something else
is dropped from the round, and the round's record says why.
"""
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from _exchange import kernel_names, pack, shared_state, statistics, unpack
from _federation import Federation
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedProx, Strategy
from torch import Tensor, nn

FLOWERS = dict(fedavg=FedAvg, fedavgm=FedAvgM, fedprox=FedProx)
MOST_EXAMPLES = 1e12  # of a client, which all sums can hold


class Rounds(Strategy):
    """One of Flower's strategies for the parameters; the statistics of BatchNorm are averaged.

    To these the momentum of a server must not be applied: a variance could become negative.

    Args:
        federation: Of the run.
        network: On the server; what is exchanged of it has the values to start from.
        order: What every message says besides. Flower would log it, were it part of the strategy's configuration.
        done: Rounds before the first one.
        momentum: Of the server after these, by the names of parameters.
    """

    def __init__(
            self,
            federation: Federation,
            network: nn.Module,
            order: dict[str, Any],
            done: int = 0,
            momentum: dict[str, Tensor] | None = None,
    ):
        self.federation, self.order, self.done = federation, order, done
        state = shared_state(network, federation.fedbn)
        self.like = {name: torch.empty_like(value, device='meta') for name, value in state.items()}
        self.statistics = [name for name in statistics(network) if name in self.like]
        self.parameters = [name for name in self.like if name not in self.statistics]
        self.in_half = kernel_names(network) if federation.fp16_kernels else set()
        own = dict(
            fedavg={}, fedprox=dict(proximal_mu=federation.proximal_mu), fedavgm=dict(
                server_momentum=federation.server_momentum, server_learning_rate=federation.server_learning_rate))
        self.inner = FLOWERS[federation.strategy](
            fraction_train=federation.fraction_train, fraction_evaluate=float(federation.fedbn), min_train_nodes=1,
            min_evaluate_nodes=1, min_available_nodes=1, **own[federation.strategy])
        if momentum:
            self.inner.momentum_vector = [momentum[name].numpy() for name in self.parameters]
        self.record: dict[str, Any] = {}  # of the present round
        self.asked: list[Message] = []  # that it waits for an answer to

    def momentum(self) -> dict[str, Tensor]:
        vector = getattr(self.inner, 'momentum_vector', None) or []
        return dict(zip(self.parameters, map(torch.from_numpy, vector)))

    def summary(self) -> None:
        self.inner.summary()

    def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        self.record = dict(
            round=self.done + server_round, clients=0, dropped=[], bytes_down=0, bytes_up=0,
            seconds=time.perf_counter())  # when it began, and at its end how long it took
        parameters = ArrayRecord({name: arrays[name] for name in self.parameters})
        return self.send(
            self.inner.configure_train(self.done + server_round, parameters, config, grid), arrays)

    def configure_evaluate(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return self.send(self.inner.configure_evaluate(self.done + server_round, arrays, config, grid), arrays)

    def send(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        messages, sent = list(messages), pack(arrays.to_torch_state_dict(), self.in_half)
        for message in messages:
            message.content['arrays'] = sent
            message.content['config'].update(self.order)
        self.asked = messages
        self.record['bytes_down'] += sent.count_bytes() * len(messages)
        return messages

    def aggregate_train(
            self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord | None]:
        """The average of what came back whole.

        Raises:
            SystemExit: Nothing did, or the average is not finite.
        """
        taken = self.take(replies, with_arrays=True)
        if not taken:
            dropped = '; '.join(f'{client}: {reason}' for client, reason in self.record['dropped'])
            raise SystemExit(
                f'round {self.done + server_round}: no client sent a network ({dropped}); the same command tries that '
                f'round again')
        # Always in the same order, because sums of floating-point numbers depend on it.
        taken.sort(key=lambda item: (item[0].content['config']['partition-id'], item[0].metadata.src_node_id))
        counts = [reply.content['metrics']['num-examples'] for reply, _ in taken]
        for reply, values in taken:
            reply.content['arrays'] = ArrayRecord({name: values[name] for name in self.parameters})
        parameters, metrics = self.inner.aggregate_train(self.done + server_round, [reply for reply, _ in taken])
        means = {
            name: sum(count * values[name] for count, (_, values) in zip(counts, taken)) / sum(counts)
            for name in self.statistics}
        try:
            average = unpack(ArrayRecord({**parameters, **pack(means)}), self.like)
        except ValueError as error:
            raise SystemExit(f'round {self.done + server_round}: training has diverged, {error}') from error
        self.record |= dict(clients=len(taken), examples=sum(counts), train_loss=metrics['train_loss'])
        return pack(average), metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The scores of the clients together, each image counted once."""
        taken = [reply for reply, _ in self.take(replies, with_arrays=False)]
        taken = [reply for reply in taken if reply.content['metrics']['num-examples']]
        if not taken:
            return None
        metrics = self.inner.aggregate_evaluate(self.done + server_round, taken)
        self.record |= {name: metrics[name] for name in ('top1', 'top5', 'loss')}
        self.record['validated'] = sum(reply.content['metrics']['num-examples'] for reply in taken)
        return metrics

    def take(self, replies: Iterable[Message], with_arrays: bool) -> list[tuple[Message, dict[str, Tensor]]]:
        """The replies that are whole, and what they hold; all others are dropped, and so is who sent none."""
        # By the message that is answered: where a node has gone, Flower answers in its place.
        taken, silent = [], {message.metadata.message_id: message.metadata.dst_node_id for message in self.asked}
        for reply in replies:
            node = silent.pop(reply.metadata.reply_to_message_id)
            try:
                taken.append((reply, self.read(reply, with_arrays)))
            except ValueError as error:
                self.drop(node, str(error))
        for node in sorted(silent.values()):
            self.drop(node, f'no answer within {self.federation.round_timeout:g} s')
        return taken

    def read(self, reply: Message, with_arrays: bool) -> dict[str, Tensor]:
        if reply.has_error():
            raise ValueError(reply.error.reason)
        content = reply.content
        self.record['bytes_up'] += sum(arrays.count_bytes() for arrays in content.array_records.values())
        expected = {'arrays', 'metrics', 'config'} if with_arrays else {'metrics'}
        if set(content) != expected:
            raise ValueError(f'it sent {", ".join(sorted(content))}, expected {", ".join(sorted(expected))}')
        names = ('train_loss',) if with_arrays else ('top1', 'top5', 'loss')
        numbers = [content['metrics'].get(name) for name in ('num-examples', *names)]
        is_number = all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)
        if not is_number or not with_arrays <= numbers[0] <= MOST_EXAMPLES or len(content['metrics']) != len(numbers):
            raise ValueError(f'its metrics are {dict(content["metrics"])}, expected num-examples, {", ".join(names)}')
        if with_arrays and not isinstance(content['config'].get('partition-id'), int):
            raise ValueError(f'its config is {dict(content["config"])}, expected a partition-id')
        return unpack(content['arrays'], self.like) if with_arrays else {}

    def drop(self, node: int, reason: str) -> None:
        reason = ' '.join(reason.split())  # Ray's have several lines
        self.record['dropped'].append((node, reason))
        print(f'round {self.record["round"]}: client {node} is dropped: {reason}', flush=True)
