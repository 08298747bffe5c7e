"""Federated training with Flower:  python recipes/federated.py <preset> [--models NAME ...] [--seeds N] [--option ...]

Trains networks on clients that keep their images, in Flower's simulation: the training images of the dataset are shared
out among them, and each trains by the very steps of `recipes/train.py`, whose options it takes. The output folder gets
`<model>/seed_<n>/` with `federated.json` (the record of every round), checkpoints and the network, and `table.md` and
the picture `accuracy`. The same command goes on where it was stopped.

This file is also a Flower app: `flwr run recipes <superlink> --run-config 'arguments="digits --seeds 1"'` does the same
with clients on machines of their own. See recipes/FEDERATED.md.
"""
import os
import shlex
import signal
import sys

from _federation import Federation, parse_federated

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_federated(sys.argv[1:], __doc__)

from pathlib import Path

import torch
from _accelerator import runs_on_cuda, usable_cores
from _interruptions import SIGNALS
from _recipe import Recipe

try:
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation
except ImportError as error:
    raise SystemExit(f"Flower is missing: pip install -e '.[federated]' ({error})") from error

from _federated_client import client_app
from _federated_server import train_all

server_app = ServerApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """With clients that Flower has connected; `context.run_config` has the arguments of a command line."""
    try:
        print(train_all(grid, **vars(parse_federated(shlex.split(context.run_config['arguments']), __doc__))))
    except SystemExit as error:  # of which Flower would say nothing
        raise RuntimeError(error.code) from error


def main(
        preset: str, recipe: Recipe, federation: Federation, models: list[str], seeds: int, parallel: int | None,
        output: Path,
) -> None:
    """The same with clients of Flower's simulation."""
    simulated, tables, refusals = ServerApp(), [], []

    @simulated.main()
    def serve_here(grid: Grid, context: Context) -> None:
        try:
            tables.append(train_all(grid, preset, recipe, federation, models, seeds, output))
        except SystemExit as error:  # it would end this thread alone
            refusals.append(error.code)

    cores, gpus = usable_cores(), torch.cuda.device_count() if runs_on_cuda() else 0
    parallel = parallel or gpus or cores
    try:
        run_simulation(
            simulated, client_app, federation.num_supernodes,
            backend_config=dict(
                # Ray's options of its workers: one that is killed is started again and has another try at its message.
                # Flower would go on giving messages to the dead one, and each would fail.
                client_resources=dict(
                    num_cpus=cores // parallel or cores / parallel, num_gpus=gpus / parallel, max_restarts=-1,
                    max_task_retries=1),
                init_args=dict(num_cpus=cores, num_gpus=gpus, log_to_driver=False)))
    except (KeyboardInterrupt, SystemExit) as stop:
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code  # which Ray makes of SIGTERM
        if number not in SIGNALS:
            raise
        print('stopped: the same command goes on after the last whole round', file=sys.stderr, flush=True)
        os._exit(128 + number)  # the thread of the server would wait for its clients
    if refusals:
        raise SystemExit(refusals[0])
    print(tables[0])  # after what Flower and Ray say when they end


if __name__ == '__main__':
    main(**vars(arguments))
