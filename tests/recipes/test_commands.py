"""Every command answers a typo before it imports what takes seconds."""
import json
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from _arguments import METHODS

from fmd_timm import layers

RECIPES = Path(__file__).parents[2] / 'recipes'
HEAVY = {'torch', 'timm', 'accelerate', 'datasets', 'matplotlib', 'gradio', 'fmd_timm'}
SCRIPT = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit as error:
    print(json.dumps([error.code, sorted(sys.modules)]))
"""
COMMANDS = dict(
    train=['digits', '--learning-rate', '1'], evaluate=['runs/digits', '--data-set', 'digits'],
    inspect_attention=['runs/digits', '--data-set', 'digits'], demo=['runs/digits', '--data-set', 'digits'],
    predict=['runs/digits', 'image.png', '--topp', '1'], compare=['digits', '--learning-rate', '1'],
    publish=['--run', 'runs/digits', '--repository', 'acme/digits'], transfer=['--seed-count', '1'],
    _timing=['digits', '--models', 'resnet18', '--learning-rate', '1'], _report=['--folder', 'runs'],
    bench=['--modell', 'resnet18'], first_gpu=['--outputs', 'report.md'],
    prepare_data=['digits', 'folder', '--sizes', '8'], export=['runs/digits', '--format', 'onxx'],
    convert=['resnet18.pth', '--models', 'resnet18_od'], federated=['digits', '--learning-rate', '1'],
    _federated_report=['--folder', 'runs'], laboratory=['--arm', 'static'], scratch=['--arm', 'static'],
)


def run_command(command, *arguments):
    """The exit code, and which of the heavy packages were imported, in a process of its own."""
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, RECIPES / f'{command}.py', *arguments], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(RECIPES)), timeout=60)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, HEAVY & set(modules)


def test_the_methods_are_those_of_the_layers():
    assert METHODS == tuple(layers.METHODS)


def test_no_command_is_left_out():
    commands = {path.stem for path in RECIPES.glob('*.py') if "if __name__ == '__main__':" in path.read_text()}
    assert commands == set(COMMANDS)


@pytest.mark.parametrize('command', COMMANDS)
def test_a_typo_is_answered_before_torch_is_imported(command):
    assert run_command(command, *COMMANDS[command]) == (2, set())


def test_accelerate_launches_a_recipe():
    done = processes.run('-m', 'accelerate.commands.launch', RECIPES / 'train.py', *COMMANDS['train'])
    assert done.returncode and 'error: unrecognized arguments: --learning-rate 1' in done.stderr


@pytest.mark.parametrize('command, arguments, message', [
    ('train', ['digits', '--epochs', '0'], '--epochs must be at least 1, got 0'),
    ('train', ['finetune'], '--init must be the weights to start from, or --model a network for random ones, got None'),
    ('compare', ['digits', '--crop', 'center'], "--crop must be one of rrc, pad, got 'center'"),
    ('_timing', ['digits', '--models', 'resnet18', '--lr', '0'],
     '--lr must be positive and finite in float32, got 0.0'),
    ('predict', ['runs/digits', 'image.png', '--top', '0'], '--top must be at least 1, got 0'),
    ('prepare_data', ['digits', 'folder', '--quality', '101'], '--quality must be between 1 and 100, got 101'),
    ('federated', ['digits', '--strategy', 'fedprox'],
     '--strategy fedprox does what fedavg does: it needs --proximal-mu'),
    ('train', ['--help'], 0),
])
def test_so_is_a_value_that_cannot_work_and_help(command, arguments, message):
    assert run_command(command, *arguments) == (message, set())
