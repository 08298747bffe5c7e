"""recipes/federated.py in Flower's simulation, and in its processes as on machines of their own."""
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip('flwr', reason="federated.py needs Flower: pip install -e '.[federated]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ('--models', 'resnet20_cifar', '--num-supernodes', '2', '--num-server-rounds', '3', '--warmup-epochs', '0')
RUN = Path('resnet20_cifar', 'seed_0')
AFTER_ROUND_1 = RUN / 'checkpoints' / 'epoch_0003' / 'manifest.json'
PATIENCE = 900  # seconds: a SuperNode that is killed is missed after one or two minutes


def environment(home):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    return dict(
        os.environ, PYTHONPATH=paths, FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED='0', FLWR_DISABLE_UPDATE_CHECK='1',
        RAY_USAGE_STATS_ENABLED='0', PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))


def wait_for(found, log):
    """What `found()` returns, when it is something."""
    deadline = time.monotonic() + PATIENCE
    while not (it := found()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return it


def test_flowers_simulation_goes_on_when_it_was_stopped_and_when_a_worker_is_killed(tmp_path):
    """A worker is started again, and its client has another try."""
    pytest.importorskip('ray', reason="Flower's simulation needs Ray: pip install -e '.[federated]'")
    command = [sys.executable, ROOT / 'recipes/federated.py', 'digits', *SMALL, '--output', tmp_path]
    log = tmp_path / 'log'

    def start():
        with log.open('ab') as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=environment(tmp_path / 'home'))

    def busy_worker():
        assert simulation.poll() is None, log.read_text()
        for process in psutil.Process(simulation.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                if process.cmdline()[:1] == ['ray::ClientAppActor.run']:
                    return process
        return None

    simulation = start()
    try:
        wait_for((tmp_path / AFTER_ROUND_1).exists, log)
        wait_for(busy_worker, log)
        simulation.terminate()
        assert simulation.wait(120) == 128 + signal.SIGTERM, log.read_text()
        assert 'stopped: the same command goes on after the last whole round' in log.read_text()
        simulation = start()
        wait_for(busy_worker, log).kill()
        assert simulation.wait(PATIENCE) == 0, log.read_text()
    finally:
        simulation.kill()
        simulation.wait()
    record = json.loads((tmp_path / RUN / 'federated.json').read_text())
    assert [(of['clients'], of['dropped']) for of in record['rounds']] == [(2, [])] * 3 and record['top1'] > 20
    assert '| resnet20_cifar |' in log.read_text()
    done = subprocess.run(
        [*command, '--alpha', '1'], capture_output=True, text=True, env=environment(tmp_path / 'home'))
    assert done.returncode and 'holds a run with other settings' in done.stderr


def test_processes_of_flower_one_of_which_is_killed(tmp_path):
    """A SuperLink and two SuperNodes. One of these is killed in the second round, and the others go on."""
    with ExitStack() as sockets:
        free = [sockets.enter_context(socket.socket()) for _ in range(3)]
        for one in free:
            one.bind(('127.0.0.1', 0))
        port, *node_ports = [one.getsockname()[1] for one in free]
    address, home, started = f'127.0.0.1:{port}', tmp_path / 'home', []

    def start(name, *command):
        with open(tmp_path / f'{name}.log', 'wb') as log:
            started.append(subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(tmp_path / name), start_new_session=True))
        return started[-1]

    def submitted():
        with open(tmp_path / 'submit.log', 'wb') as log:
            return subprocess.run(submit, stdout=log, stderr=log, env=environment(home)).returncode == 0

    home.mkdir()
    (home / 'config.toml').write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n')
    output, log = tmp_path / 'output', tmp_path / 'link.log'
    try:
        start(
            'link', 'flower-superlink', '--insecure', '--port', str(port), '--disable-runtime-dependency-installation')
        nodes = [
            start(
                f'node{i}', 'flower-supernode', '--insecure', '--superlink', address, '--port', str(node_port),
                '--node-config', f'partition-id={i}') for i, node_port in enumerate(node_ports)]
        arguments = shlex.join(['digits', *SMALL, '--output', str(output)])
        submit = [
            'flwr', 'run', ROOT / 'recipes', 'here', '--run-config', f"arguments={json.dumps(arguments)}"]
        wait_for(submitted, tmp_path / 'submit.log')  # until the link is there
        wait_for((output / AFTER_ROUND_1).exists, log)
        os.killpg(nodes[1].pid, 9)
        wait_for((output / RUN / 'federated.json').exists, log)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=60)
    rounds = json.loads((output / RUN / 'federated.json').read_text())['rounds']
    assert len(rounds) == 3 and rounds[0]['clients'] == 2 and rounds[-1]['clients'] == 1
    (_, reason), = next(of['dropped'] for of in rounds if of['dropped'])
    assert 'Unavailable' in reason or 'no answer' in reason
