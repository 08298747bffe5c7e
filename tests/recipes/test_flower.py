"""recipes/federated.py in Flower's simulation, and in its processes as on machines of their own."""
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip('flwr', reason="federated.py needs Flower: pip install -e '.[federated]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = ('--models', 'resnet20_cifar', '--num-supernodes', '2', '--num-server-rounds', '3', '--warmup-epochs', '0')


def environment(home):
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    return dict(
        os.environ, PYTHONPATH=paths, FLWR_HOME=str(home), FLWR_TELEMETRY_ENABLED='0',
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']]))


def test_flowers_simulation(tmp_path):
    pytest.importorskip('ray', reason="Flower's simulation needs Ray: pip install -e '.[federated]'")
    done = subprocess.run(
        [sys.executable, ROOT / 'recipes/federated.py', 'digits', *SMALL, '--output', tmp_path], capture_output=True,
        text=True, env=environment(tmp_path / 'home'))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / 'resnet20_cifar' / 'seed_0' / 'federated.json').read_text())
    assert [of['clients'] for of in record['rounds']] == [2, 2, 2] and record['top1'] > 20
    assert '| resnet20_cifar |' in done.stdout
    done = subprocess.run(
        [sys.executable, ROOT / 'recipes/federated.py', 'digits', *SMALL, '--output', tmp_path, '--alpha', '1'],
        capture_output=True, text=True, env=environment(tmp_path / 'home'))
    assert done.returncode and 'holds a run with other settings' in done.stderr


def test_processes_of_flower_one_of_which_is_killed(tmp_path):
    """A SuperLink and two SuperNodes. One of these is killed in the second round, and the others go on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    address, home, started = f'127.0.0.1:{port}', tmp_path / 'home', []

    def start(name, *command):
        with open(tmp_path / f'{name}.log', 'wb') as log:
            started.append(subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(tmp_path / name), start_new_session=True))
        return started[-1]

    home.mkdir()
    (home / 'config.toml').write_text(f'[superlink.here]\naddress = "{address}"\ninsecure = true\n')
    output = tmp_path / 'output'
    try:
        start(
            'link', 'flower-superlink', '--insecure', '--port', str(port), '--disable-runtime-dependency-installation')
        nodes = [
            start(
                f'node{i}', 'flower-supernode', '--insecure', '--superlink', address, '--port', str(port + 1 + i),
                '--node-config', f'partition-id={i}') for i in range(2)]
        arguments = shlex.join(['digits', *SMALL, '--output', str(output)])
        submit = [
            'flwr', 'run', ROOT / 'recipes', 'here', '--run-config', f"arguments={json.dumps(arguments)}"]
        deadline = time.monotonic() + 900
        while subprocess.run(submit, capture_output=True, env=environment(home)).returncode:  # until the link is there
            assert time.monotonic() < deadline, (tmp_path / 'link.log').read_text()
            time.sleep(1)
        run_folder = output / 'resnet20_cifar' / 'seed_0'
        while not (run_folder / 'checkpoints' / 'epoch_0003' / 'manifest.json').exists():  # of the first round
            assert time.monotonic() < deadline, (tmp_path / 'link.log').read_text()
            time.sleep(0.2)
        os.killpg(nodes[1].pid, 9)
        while not (run_folder / 'federated.json').exists():
            assert time.monotonic() < deadline, (tmp_path / 'link.log').read_text()
            time.sleep(1)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=60)
    rounds = json.loads((run_folder / 'federated.json').read_text())['rounds']
    assert len(rounds) == 3 and rounds[0]['clients'] == 2 and rounds[-1]['clients'] == 1
    (_, reason), = next(of['dropped'] for of in rounds if of['dropped'])
    assert 'Unavailable' in reason or 'no answer' in reason
