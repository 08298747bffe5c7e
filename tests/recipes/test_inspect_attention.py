"""recipes/inspect_attention.py: what it says of a checkpoint is what its images show."""
import json

import evaluate
import inspect_attention
import pytest
import timm
import tiny
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from fmd_timm import DynamicConv2d
from fmd_timm.hub import save_for_hub


@pytest.fixture(autouse=True)
def as_in_a_process_of_its_own(monkeypatch, fresh_accelerator):
    for command in inspect_attention, evaluate:
        monkeypatch.setattr(command, 'use_all_cores', lambda accelerator: None)
    AcceleratorState._reset_state(reset_partial_state=True)


def save_network(folder, name=tiny.NAME, change=None, **kwargs):
    torch.manual_seed(0)
    network = timm.create_model(name, zero_init_last=False, **kwargs)
    for module in network.modules():
        if change and isinstance(module, DynamicConv2d):
            change(module)
    save_for_hub(network, folder, data_config=dict(input_size=(3, 8, 8)))
    return str(folder)


def inspect(checkpoint, dataset, *options):
    arguments = [checkpoint, '--dataset', str(dataset), '--num-workers', '0', *map(str, options)]
    return inspect_attention.main(**vars(inspect_attention.parse_inspect_attention(arguments)))


def test_a_checkpoint_is_described_layer_by_layer(digits_folder, tmp_path, capsys):
    checkpoint = save_network(tmp_path / 'network')
    record = inspect(checkpoint, digits_folder, '--batch-size', 16, '--output', tmp_path / 'out')
    out = capsys.readouterr().out
    names = [name for name, module in timm.create_model(tiny.NAME).named_modules() if isinstance(module, DynamicConv2d)]
    assert list(record['layers']) == names and record['images'] == 50
    assert json.loads((tmp_path / 'out' / 'attention.json').read_text()) == record
    table = (tmp_path / 'out' / 'attention.md').read_text()
    for name, numbers in record['layers'].items():
        assert f'| {name} | {" | ".join(f"{number:.3f}" for number in numbers.values())} |' in table
        assert name in out
        assert 0 <= numbers['kernel_entropy'] <= numbers['usage_entropy'] <= 1 + 1e-9
    assert f'top-1 of 50 images, {digits_folder.name} test: {record["top1"]:.2f} %' in out
    with Image.open(tmp_path / 'out' / 'attention.png') as picture:
        assert picture.width > 500
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate.main(**vars(evaluate.parse_evaluate([checkpoint, '--dataset', str(digits_folder), '--num-workers', '0'])))
    assert f'top-1: {record["top1"]:.2f}' in capsys.readouterr().out


def test_an_attention_that_is_the_same_for_all_images_costs_nothing_to_replace(digits_folder, tmp_path, capsys):
    checkpoint = save_network(tmp_path, change=lambda conv: conv.attention.make_constant())
    record = inspect(checkpoint, digits_folder)
    assert record['top1'] == record['top1_of_mean'] == record['top1_of_mean_kernels']
    assert all(layer['gate_std'] == 0 and layer['kernel_entropy'] == pytest.approx(1)
               for layer in record['layers'].values())
    assert '(+0.00 points)' in capsys.readouterr().out


def test_what_a_method_does_not_have_is_a_dash(digits_folder, tmp_path, capsys):
    record = inspect(save_network(tmp_path, tiny.COND), digits_folder)
    assert {layer['gate_std'] for layer in record['layers'].values()} == {None}
    median = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('median'))
    assert median.split()[3] == '-'
    one_kernel = inspect(save_network(tmp_path / 'one', num_kernels=1), digits_folder, '--output', tmp_path / 'out')
    assert {layer['kernel_entropy'] for layer in one_kernel['layers'].values()} == {None}


def test_a_static_network_and_a_bad_batch_are_refused(digits_folder, tmp_path):
    checkpoint = save_network(tmp_path, tiny.STATIC)
    with pytest.raises(SystemExit, match="^checkpoint '.*' has no dynamic convolution$"):
        inspect(checkpoint, digits_folder)
    with pytest.raises(SystemExit, match='^--batch-size must be at least 1, got 0$'):
        inspect(checkpoint, digits_folder, '--batch-size', 0)
