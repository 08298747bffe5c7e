"""A run that is interrupted anywhere loses no step, says how to go on, and ends as if nothing had happened."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import _checkpoints
import _interruptions
import _loop
import _training
import processes
import pytest
import tiny
import torch
import train
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_train import PATH
from tiny import make_recipe, run

ENV = dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)


@pytest.mark.parametrize('text, expected', [
    ('10min', (600, None)), ('0.5min', (30, None)), ('1epoch', (float('inf'), 1)), ('12epochs', (float('inf'), 12)),
])
def test_times_between_checkpoints(text, expected):
    assert _interruptions.parse_every(text) == expected


@pytest.mark.parametrize(
    'text', ['', '10', 'min', '0min', '0epochs', '-1min', '1.5epochs', '10 min', '10min\n', 'nanmin'])
def test_other_times_are_refused_by_the_name_of_the_option(text):
    with pytest.raises(SystemExit, match='--checkpoint-every must be a time such as'):
        train.check_recipe(make_recipe('folder', checkpoint_every=text))


def interrupt(monkeypatch, module, function, call, number=signal.SIGTERM):
    """Send this process a signal when a function has been called so often."""
    original, calls = getattr(module, function), []

    def called(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, called)


def same_weights(first, second):
    first, second = (load_file(folder / 'model.safetensors') for folder in (first, second))
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.fixture(scope='module')
def recipe(digits_folder):
    """With everything in it that draws random numbers or has a state."""
    return make_recipe(
        digits_folder, mixup=0.2, cutmix=0.2, reprob=0.25, aa='rand-m5', ema_decay=0.9, accumulate=2, annealed_by=0.9)


@pytest.fixture(scope='module')
def uninterrupted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('uninterrupted')
    AcceleratorState._reset_state(reset_partial_state=True)
    run(recipe, folder)
    return folder


@pytest.mark.parametrize('module, function, call, number, where', [
    (_training, 'train_step', 1, signal.SIGINT, 'epoch 1, step 1'),
    pytest.param(_training, 'train_step', 4, signal.SIGTERM, 'epoch 1, step 3', marks=pytest.mark.slow),
    pytest.param(_training, 'train_step', 8, signal.SIGTERM, 'epoch 1, step 4', marks=pytest.mark.slow),
    pytest.param(_training, 'train_step', 12, signal.SIGINT, 'epoch 2, step 3', marks=pytest.mark.slow),
    (_loop, 'score', 1, signal.SIGTERM, 'epoch 1, step 4'),
    pytest.param(_loop, 'score', 2, signal.SIGINT, 'epoch 2, step 4', marks=pytest.mark.slow),
    (_loop, 'learning_rate', 1, signal.SIGTERM, 'epoch 2, step 1'),  # between the last image and the next step
    # which does not come
    pytest.param(_loop, 'learning_rate', 2, signal.SIGTERM, 'epoch 2', marks=pytest.mark.slow),
    (_checkpoints, 'save', 1, signal.SIGINT, 'epoch 2'),
])
def test_a_stopped_run_says_how_to_go_on_and_ends_with_the_same_weights(
        module, function, call, number, where, recipe, uninterrupted, tmp_path, monkeypatch, capsys, fresh_accelerator):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        interrupt(patch, module, function, call, number)
        run(recipe, tmp_path)
    assert exit.value.code == 128 + number
    said = [line for line in capsys.readouterr().err.splitlines() if 'stopped' in line]
    assert len(said) == 1 and f'stopped after {where}: go on with --resume auto' in said[0]
    assert not (tmp_path / 'result.json').exists()

    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(1234)  # a new process starts with other random states
    resumed = run(recipe, tmp_path, resume='auto')
    assert same_weights(tmp_path, uninterrupted)
    expected = json.loads((uninterrupted / 'result.json').read_text())
    for name in 'top1', 'top5', 'loss', 'best_top1', 'best_epoch', 'epochs':
        assert resumed[name] == expected[name]


def test_the_clock_asks_for_checkpoints_which_change_nothing(recipe, uninterrupted, tmp_path, fresh_accelerator):
    run(dataclasses.replace(recipe, checkpoint_every='0.00001min'), tmp_path)
    assert len(list((tmp_path / 'checkpoints').iterdir())) == 2
    assert same_weights(tmp_path, uninterrupted)


def test_signals_are_handled_as_before_when_training_has_ended(digits_folder, tmp_path, fresh_accelerator):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(make_recipe(digits_folder, epochs=1), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize('heard', [False, True])
def test_a_signal_that_nobody_has_heard_does_in_the_end_what_it_would_have_done(heard, monkeypatch):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with _interruptions.Interruptions() as interruptions:
            os.kill(os.getpid(), signal.SIGTERM)
            if heard:
                interruptions.hear(*interruptions.wishes())
            assert not received
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * (not heard)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen in time'
        time.sleep(0.05)


def is_running(pid):
    """Not as a zombie, which an orphan in a container without an init stays."""
    stat = Path('/proc', str(pid), 'stat')
    return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.slow  # launchers in processes of their own
@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
@pytest.mark.parametrize('launcher', [
    ['accelerate.commands.launch', '--quiet'], ['torch.distributed.run', '--nproc_per_node', '2'],
], ids=['accelerate', 'torchrun'])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_processes_of_a_launcher_that_is_ended_save_and_end(launcher, number, digits_folder, tmp_path):
    command = [
        sys.executable, '-m', *launcher, tiny.__file__, 'digits', '--model', tiny.NAME, '--dataset', digits_folder,
        '--epochs', '1000', '--batch-size', '16', '--tracker', 'none', '--checkpoint-every', '1epoch', '--output',
        tmp_path / 'run']
    env = dict(ENV, PYTHONWARNINGS='ignore')
    checkpoints, pids = tmp_path / 'run' / 'checkpoints', []
    with open(tmp_path / 'stderr', 'w') as stderr, subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True) as process:
        try:
            wait_for(lambda: list(checkpoints.glob('epoch_*')))
            pids = [int(pid) for pid in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
            assert pids
            # Ctrl-C reaches all processes of a terminal, the others are sent to one.
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            wait_for(lambda: not any(map(is_running, pids)), 60)
            process.wait(60)
        finally:
            for pid in filter(is_running, [process.pid, *pids]):
                os.kill(pid, signal.SIGKILL)
    said = [line for line in (tmp_path / 'stderr').read_text().splitlines() if 'stopped after' in line]
    assert len(said) == 1 and 'go on with --resume auto' in said[0], (tmp_path / 'stderr').read_text()[-3000:]
    newest = Path(said[0].rpartition('saved as ')[2].rstrip(')'))
    assert newest == max(_checkpoints.find(checkpoints).items())[1] and _checkpoints.damage(newest) is None


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_all_processes_stop_after_the_same_step_where_one_is_told_to(number, recipe, tmp_path):
    """Each in a process that waits for the other, as no launcher would let it."""
    script = tmp_path / 'script.py'
    script.write_text(f'''
import os, sys
from pathlib import Path
import _training, tiny, train
step, steps = _training.train_step, []
def train_step(*args):
    steps.append(1)
    if len(steps) == 5 and os.environ['RANK'] == '1':
        os.kill(os.getpid(), {int(number)})
    return step(*args)
_training.train_step = train_step
code = 0
try:
    train.main(**vars(train.parse_train(sys.argv[1:])))
except SystemExit as exit:
    code = exit.code
Path({str(tmp_path)!r}, 'ended' + os.environ['RANK']).write_text(f'{{code}} {{len(steps)}}')
''')
    done = processes.launch(
        2, script, 'digits', '--model', tiny.NAME, '--dataset', recipe.dataset, '--batch-size', 16, '--tracker', 'none',
        '--output', tmp_path / 'run', env=ENV)
    assert [process.returncode for process in done] == [0, 0]
    assert [(tmp_path / f'ended{rank}').read_text() for rank in (0, 1)] == [f'{128 + number} 6'] * 2
    assert 'stopped after epoch 2, step 2: go on' in done[0].stderr and 'stopped' not in done[1].stderr


def test_a_second_ctrl_c_ends_at_once_and_its_echo_from_the_launcher_does_not(tmp_path):
    script = '''if True:
        import os, signal, time
        import _interruptions
        with _interruptions.Interruptions() as interruptions:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            print(interruptions.wishes(), flush=True)
            _interruptions.AGAIN = 0.0
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            print('went on')
    '''
    done = processes.run('-c', script, env=ENV)
    assert (done.returncode, done.stdout) == (130, '(0.0, 1.0, 0.0)\n'), done.stderr
