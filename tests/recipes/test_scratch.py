"""recipes/scratch.py: every arm is the same recipe but for what it says, and the table is that of the records."""
import json
from pathlib import Path

import _runs
import _timing
import pytest
import scratch
import timm
import tiny
import torch
from _scratch_arms import ARMS, Arm, parse_scratch
from _scratch_table import draw, make_table, read_records, row, time_of
from safetensors.torch import load_file


@pytest.fixture
def tiny_networks(monkeypatch):
    names = {None: tiny.STATIC, 'cond': tiny.COND}
    monkeypatch.setattr(Arm, 'model', lambda arm, network: names.get(arm.method, tiny.NAME))
    monkeypatch.setattr(_timing, 'ROUNDS', 1)
    monkeypatch.setattr(_timing, 'STEPS', 1)


@pytest.mark.slow
def test_arms_are_trained_once_by_one_recipe(
        digits_folder, tmp_path, tiny_networks, fresh_accelerator, monkeypatch, capsys):
    recipe = tiny.make_recipe(digits_folder, epochs=1, tracker='none')
    arms = ['static', 'static_fmd', 'fmd', 'k1', 'no_output', 'temperature_34']
    scratch.main('digits', recipe, tiny.STATIC, arms, 1, tmp_path)
    records = read_records(tmp_path)
    assert list(records) == arms
    timing = json.loads((tmp_path / 'timing.json').read_text())
    assert list(timing['epoch_seconds']) == ['static', 'cond', 'dy', 'od', 'fmd', 'k1']
    assert records['static_fmd'][0]['epochs'] == max(round(time_of(timing, ARMS['fmd'])), 1)
    own = {'model', 'seed', 'epochs', 'model_kwargs', 'init', 'temperature'}
    settings = [{k: v for k, v in of_arm[0]['recipe'].items() if k not in own} for of_arm in records.values()]
    assert all(values == settings[0] for values in settings)
    assert records['k1'][0]['kernel_entropy'] is None and records['fmd'][0]['kernel_entropy'] > 0.9  # it began at 30
    weights = {arm: load_file(tmp_path / arm / 'seed_0' / 'model.safetensors') for arm in arms if arm != 'static'}
    temperatures = {
        arm: {weight.item() for key, weight in weights[arm].items() if key.endswith('kernel_temperature')}
        for arm in ('fmd', 'no_output', 'temperature_34')}
    assert temperatures == {'fmd': {1.0}, 'no_output': {1.0}, 'temperature_34': {34.0}}
    biases = weights['no_output']['layer1.0.conv2.attention.gates.bias'].chunk(2)
    assert biases[0].abs().max() < 1 and (biases[1] == 40).all()  # training has left them alone
    assert (tmp_path / 'curves.png').exists() and not list(tmp_path.rglob('checkpoints'))

    table = make_table(tmp_path)
    assert table in capsys.readouterr().out
    assert f' {records["fmd"][0]["top1"]:.2f} | ' in table
    panels = draw(tmp_path).axes
    assert [len(axes.lines) for axes in panels] == [6, 6]
    monkeypatch.setattr(_runs, 'train', lambda *args: pytest.fail('it is finished'))
    scratch.main('digits', recipe, tiny.STATIC, arms, 1, tmp_path)


@pytest.mark.parametrize('open', [('input',), ('output',), ('input', 'output')])
def test_an_open_gate_is_1_for_every_image_and_does_not_learn(open, tmp_path):
    recipe = tiny.make_recipe('digits', model='resnet20_fmd_cifar', model_kwargs=['layers=(1,1,1)'])
    folder = scratch.make_start(recipe, Arm('', open=open), tmp_path)
    attention = timm.create_model(f'local-dir:{folder}', pretrained=True).layer2[0].conv1.attention
    _, *gates, _ = attention(torch.randn(8, 16, 4, 4))
    torch.stack([gate.square().sum() for gate in gates]).sum().backward()
    for name, gate, *gradients in zip(
            ('input', 'output'), gates, attention.gates.weight.grad.split([16, 32]),
            attention.gates.bias.grad.split([16, 32])):
        assert (gate == 1).all() == (name in open)
        assert all((gradient == 0).all() == (name in open) for gradient in gradients)


def test_a_difference_is_paired_by_seed():
    record = dict(
        parameters=10**6, gmacs=0.1, epochs=2, model='b', kernel_entropy=0.5, gate_std=None, kernel_distance=1)
    static = {seed: dict(record, top1=70.0 + seed, model='a') for seed in range(3)}
    fmd = {seed: dict(record, top1=71.0 + seed + extra) for seed, extra in enumerate((0, 1, 2))}
    timing = dict(epoch_seconds=dict(static=[1.0, 2.0], fmd=[2.0, 4.0]))
    cells = row('fmd', fmd, static, timing).split(' | ')
    assert cells[5:] == ['73.00 ± 1.15', '+2.00 ± 0.58', '2.00', '0.50', '', '1.00 |']
    assert row('static', static, static, timing).split(' | ')[6] == ''


def test_the_page_has_the_table_of_the_committed_runs():
    results = Path(scratch.__file__).parent / 'results'
    assert make_table(results / 'scratch') in (results / 'README.md').read_text()


def test_each_arm_has_a_network_that_is_registered():
    for network in 'resnet18_cifar', 'resnet20_cifar', 'resnet50_cifar':
        assert all(timm.is_model(arm.model(network)) for arm in ARMS.values())


@pytest.mark.parametrize('argv', [
    ['--seeds', '0'], ['cifar10', '--init', 'runs/a'], ['--seed', '1'], ['--network', 'x'],
    ['--arms', 'fmd']])
def test_what_can_not_be_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        parse_scratch(argv)
    assert argv[-2] in capsys.readouterr().err
