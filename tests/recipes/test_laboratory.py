"""recipes/laboratory.py: every arm begins as the static network, differs in what it says, and is recorded once."""
import dataclasses
import json

import _arms
import _lab_table
import laboratory
import pytest
import timm
import torch
from _arms import ARMS, Arm, parse_laboratory
from _dynamics import entropy
from _presets import PRESETS
from _starts import KERNELS, clusters, draw_router

from fmd_timm import FMDConv2d, inflate
from fmd_timm.hub import save_for_hub


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('static')
    save_for_hub(timm.create_model('mobilenetv2_035', num_classes=5), folder)
    return folder


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(laboratory, 'MOST', dict(train=96, validation=40))


def command(checkpoint, output, *argv):
    return vars(parse_laboratory([
        '--init', str(checkpoint), '--dataset', 'digits', '--image-size', '32', '--images', '64', '--epochs', '1',
        '--seeds', '1', '--output', str(output), *argv]))


def run(*args):
    laboratory.main(**command(*args))


def test_a_command_runs_its_arms_once_and_says_what_they_did(checkpoint, few_images, tmp_path, capsys):
    arms = 'static_2e-2', 'fmd_2e-2', 'k1', 'cond'
    run(checkpoint, tmp_path, '--arms', *arms[:2])
    run(checkpoint, tmp_path, '--arms', *arms)
    lines = [json.loads(line) for line in (tmp_path / 'digits_64_x_1.jsonl').read_text().splitlines()]
    assert [line['arm'] for line in lines] == list(arms)
    static, fmd, one, cond = lines
    assert 'kernel_entropy' not in static and 'kernel_entropy' not in one and 'gate_std' not in cond
    assert 0 <= fmd['kernel_entropy'] <= 1 and 0 <= fmd['top1_of_mean'] <= 100 and len(fmd['layers']) == 3
    said = capsys.readouterr().out
    assert 'fmd_2e-2, seed 0: top1 ' in said
    assert f'| `fmd_2e-2` | FMDConv | 0.02 | 1 | {fmd["top1"]:.2f} | {fmd["top1"] - static["top1"]:+.2f} |' in said
    with pytest.raises(SystemExit, match='holds runs with other settings'):
        run(checkpoint, tmp_path, '--arms', 'static_2e-2', '--image-size', '64')
    with pytest.raises(SystemExit, match='holds runs with other settings'):
        run(checkpoint, tmp_path, '--arms', 'static_2e-2', '--validation-images', '30')


@pytest.mark.slow
def test_a_whole_network_is_trained_on_the_images(checkpoint, few_images, tmp_path):
    run(checkpoint, tmp_path, '--whole', '--arms', 'static_2e-2', 'fmd_2e-2', '--validation-images', '30')
    static, fmd = [
        json.loads(line) for line in (tmp_path / 'digits_whole_64_x_1.jsonl').read_text().splitlines()]
    assert len(fmd['layers']) > 10 and static['train_loss'] > 0 and fmd['validation_images'] == 30
    features = laboratory.cached_features(
        None, None, dict(weights=fmd['settings']['weights'], dataset='digits_whole', image_size='32'),
        tmp_path / 'digits_whole.safetensors')
    assert features['train'].shape == (96, 3, 32, 32)


def test_the_page_has_the_tables_of_the_committed_runs():
    results = laboratory.Path(laboratory.__file__).parent / 'results'
    page, files = (results / 'README.md').read_text(), list((results / 'laboratory').glob('*.jsonl'))
    assert files and all(_lab_table.make_table(runs) in page for runs in files)


def test_the_difference_is_paired_by_seed_with_its_standard_error():
    runs = {seed: dict(top1=70.0 + seed + extra) for seed, extra in enumerate((0, 1, 2))}
    best = {seed: dict(top1=70.0 + seed) for seed in range(3)}
    assert _lab_table.row('fmd_2e-2', ARMS['fmd_2e-2'], runs, best)[5] == '+1.00 ± 0.58'
    assert _lab_table.row('static_2e-2', ARMS['static_2e-2'], best, best)[5] == ''


def test_an_arm_is_compared_with_the_best_static_one_of_which_as_much_is_frozen():
    runs = {arm: {0: dict(top1=top1)} for arm, top1 in {
        'static_1e-2': 70.0, 'static_2e-2': 71.0, 'static_frozen_1e-2': 60.0, 'static_frozen_2e-2': 59.0,
        'frozen_1e-2': 65.0, 'norms_1e-2': 66.0}.items()}
    assert _lab_table.best_static(runs) == {None: 'static_2e-2', 'backbone': 'static_frozen_1e-2'}


def test_the_features_are_computed_once(checkpoint, few_images, tmp_path, monkeypatch):
    run(checkpoint, tmp_path, '--arms', 'static_2e-2')
    monkeypatch.setattr(laboratory, 'make_features', lambda *args: pytest.fail('computed again'))
    run(checkpoint, tmp_path, '--arms', 'static_1e-2')


def test_other_networks_are_refused(tmp_path):
    save_for_hub(timm.create_model('resnet10t', num_classes=5), tmp_path)
    with pytest.raises(SystemExit, match='--init must be an EfficientNet of timm'):
        run(tmp_path, tmp_path)


@pytest.mark.parametrize('name', [
    'fmd_2e-2', 'k1', 'k8', 'cond', 'dy', 'od', 'temperature_30', 'normalized', 'gaussian', 'orthogonal', 'svd',
    'usage_entropy', 'clusters', 'random', 'depthwise', 'head'])
def test_an_arm_begins_with_what_the_static_network_computes(checkpoint, name, tmp_path):
    arm = ARMS[name]
    _, tail, _ = laboratory.load_parts(str(checkpoint), whole=False)
    features = torch.randn(32, 56, 2, 2)
    recipe = dataclasses.replace(
        PRESETS['finetune'], lr=arm.lr, attention_lr_scale=arm.attention_lr, tracker='none', epochs=2)
    networks = [laboratory.make_network(tail, made, 5, seed=0) for made in (ARMS['static_2e-2'], arm)]
    classes = laboratory.SimpleNamespace(label_names=list(range(5)))
    trainings = [
        laboratory.make_training(
            laboratory.make_accelerator(recipe, tmp_path), recipe, network, dict(mean=[0.0], std=[1.0]), classes, 2)
        for network in networks]
    laboratory.start_otherwise(trainings[1], arm, features, seed=0)
    static, dynamic = (laboratory.infer(training.model, features) for training in trainings)
    torch.testing.assert_close(dynamic, static, rtol=1e-4, atol=1e-5 * static.abs().max().item())


@pytest.mark.parametrize('part, learn', [
    ('backbone', {'attention', 'classifier'}), ('kernels', {'attention', 'classifier', 'bn1', 'bn2', 'bn3'})])
def test_frozen_parts_do_not_learn(checkpoint, part, learn):
    _, tail, _ = laboratory.load_parts(str(checkpoint), whole=False)
    network = laboratory.make_network(tail, ARMS['fmd_2e-2'], 5, seed=0)
    laboratory.freeze(network, part)
    learning = [name.split('.') for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert all(learn.intersection(parts) for parts in learning)
    assert {part for parts in learning for part in parts} >= learn


@pytest.mark.parametrize('kind', KERNELS)
def test_kernels_differ_and_their_mean_is_the_static_one(kind):
    static = torch.randn(12, 8, 1, 1)
    kernels = KERNELS[kind](static, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(kernels.mean(0), static, rtol=1e-4, atol=1e-5)
    assert all((kernels[i] - kernels[j]).norm() > 0.5 * static.norm() for i in range(4) for j in range(i))


@pytest.mark.parametrize('kind', ['clusters', 'random'])
def test_a_router_has_the_entropy_that_is_asked_for(kind):
    conv = inflate(torch.nn.Sequential(torch.nn.Conv2d(48, 8, 1)), FMDConv2d, filter_fn=lambda *_: True)[0].eval()
    pooled = torch.randn(128, 48)
    draw_router(conv, kind, pooled, mean_entropy=0.4, seed=0)
    assert entropy(conv.attention.attend(pooled)[0]).mean().item() == pytest.approx(0.4, abs=1e-3)


def test_the_router_by_clusters_gives_each_cluster_a_kernel():
    generator = torch.Generator().manual_seed(0)
    features = torch.eye(4, 6).repeat_interleave(32, 0) + 0.1 * torch.randn(128, 6, generator=generator)
    weight, bias = clusters(features, 4, seed=0)
    chosen = (features @ weight.T + bias).argmax(1).view(4, 32)
    assert (chosen == chosen[:, :1]).all() and len(set(chosen[:, 0].tolist())) == 4


def test_load_balancing_is_no_loss_of_uniform_attention_and_a_loss_of_one_kernel():
    conv = FMDConv2d(32, 8, 1)
    conv.attention.make_constant()
    task = lambda images, labels: dict(loss=conv(images).mean() * 0)  # noqa: E731
    balanced = laboratory.Balanced(task, [conv], Arm('', usage_weight=1.0, entropy_weight=1.0))
    images = torch.randn(4, 32, 2, 2)
    assert balanced(images, None)['loss'].item() == pytest.approx(0, abs=1e-6)
    conv.attention.kernel.bias.data[0] = 100
    assert balanced(images, None)['loss'].item() == pytest.approx(2, abs=1e-3)


def test_balanced_attention_of_one_kernel_has_gradients():
    conv = FMDConv2d(32, 8, 1)
    conv.attention.make_constant()
    conv.attention.kernel.bias.data[0] = 1000  # the other shares are 0 in float32

    def task(images, labels):
        return dict(loss=conv(images).mean())

    balanced = laboratory.Balanced(task, [conv], Arm('', usage_weight=1.0, entropy_weight=1.0))
    balanced(torch.randn(4, 32, 2, 2), None)['loss'].backward()
    assert all(parameter.grad.isfinite().all() for parameter in conv.parameters())


@pytest.mark.parametrize('argv, message', [
    (['--seeds', '0'], '--seeds must be at least 1, got 0'),
    (['--images', '-1'], '--images must be at least 1, got -1'),
    (['--validation-images', '0'], '--validation-images must be at least 1, got 0'),
    (['--arms', 'k1', 'k2'], '--arms must have a static one, .* got k1 k2'),
])
def test_what_can_not_be_is_refused(argv, message):
    with pytest.raises(SystemExit, match=message):
        _arms.parse_laboratory(argv)
