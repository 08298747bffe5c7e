"""A run that is interrupted anywhere loses no step, says how to go on, and ends as if nothing had happened."""
import dataclasses
import json
import os
import signal

import _interruptions
import _loop
import _training
import pytest
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
    (_training, 'train_step', 4, signal.SIGTERM, 'epoch 1, step 3'),
    (_training, 'train_step', 8, signal.SIGTERM, 'epoch 1, step 4'),
    (_training, 'train_step', 12, signal.SIGINT, 'epoch 2, step 3'),
    (_loop, 'score', 1, signal.SIGTERM, 'epoch 1, step 4'),
    (_loop, 'score', 2, signal.SIGINT, 'epoch 2, step 4'),
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
