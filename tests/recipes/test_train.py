"""recipes/train.py: what it leaves, that it can be stopped and go on, and what it refuses."""
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import _data
import _dataset
import _loaders
import _loop
import _output
import datasets
import evaluate
import processes
import pytest
import timm
import tiny
import torch
import train
from _presets import PRESETS
from _recipe import Recipe
from _recipe_checks import check_recipe
from accelerate.state import AcceleratorState
from accelerate.tracking import TensorBoardTracker
from safetensors.torch import load_file
from tiny import make_recipe, run

from fmd_timm.layers import annealed_temperature
from fmd_timm.model_card import results_table

RECIPES = Path(train.__file__).parent
PATH = os.pathsep.join(map(str, (RECIPES, Path(tiny.__file__).parent, RECIPES.parent)))  # of processes

pytestmark = pytest.mark.usefixtures('fresh_accelerator')


def launch(count, *command):
    """tests/tiny.py as recipes/train.py on several CPU processes, which `accelerate launch --cpu` does not start."""
    for done in processes.launch(count, *command, env=dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)):
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_record_says_how_long_the_device_waited_for_images(digits_folder, tmp_path, monkeypatch):
    read = _data.LabelledImages.read

    def slowly(self, row):
        time.sleep(0.002)
        return read(self, row)

    monkeypatch.setattr(_data.LabelledImages, 'read', slowly)
    result = run(make_recipe(digits_folder, aa='rand-m5'), tmp_path)
    leg, = result['legs']
    for seconds, waited in zip(leg['epoch_seconds'], leg['data_wait_seconds'], strict=True):
        assert 64 * 0.002 <= waited <= seconds
    assert result['data_wait_share'] == leg['data_wait_seconds'][1] / leg['epoch_seconds'][1]


def test_a_run_says_what_it_does_and_what_comes_next(digits_folder, tmp_path, capsys):
    result = run(make_recipe(digits_folder), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('model: '))
    millions = f'{result["parameters"] / 1e6:.2f}'
    assert lines[first:first + 4] == [
        f'model:   {tiny.NAME}, {millions} M parameters, FMDConv',
        f'device:  1 x {result["device"]}, fp32',
        f'images:  {digits_folder.name}, 64 to train, 50 to validate, 10 classes',
        f'results: {tmp_path}; stopped, the same command with --resume auto goes on',
    ]
    table = (tmp_path / 'results.md').read_text()
    assert table == results_table(result) + '\n'
    shown = lines[next(i for i, line in enumerate(lines) if line.startswith('Top-1 accuracy')):]
    assert re.fullmatch(rf'Top-1 accuracy +{result["top1"]:.2f} %', shown[0]) and not any('|' in row for row in shown)
    assert len(table.splitlines()) - 2 == shown.index('')
    assert [line.split()[1] for line in shown[-2:]] == ['recipes/predict.py', 'recipes/publish.py']
    for name in 'model.safetensors', 'config.json', 'result.json', 'results.md', 'curves.png':
        assert name in shown[-4] and (tmp_path / name).stat().st_size


def test_a_run_leaves_a_model_that_timm_loads_and_a_complete_record(digits_folder, tmp_path):
    result = run(make_recipe(digits_folder, tracker='tensorboard'), tmp_path)
    assert result['validation_images'] == 50 and result['train_images'] == 64
    assert 0 <= result['top1'] <= result['top5'] <= 100
    assert len(result['epoch_seconds']) == 2 and result['median_epoch_seconds'] == result['epoch_seconds'][1]
    if result['top1']:
        assert result['ies'] * result['rcs'] == pytest.approx(1)
    assert result['parameters'] == sum(p.numel() for p in timm.create_model(tiny.NAME).parameters())
    assert len(result['history']) == result['epochs']
    assert result['history'][-1]['top1'] == result['top1'] and result['history'][-1]['loss'] == result['loss']
    assert [epoch['epoch_seconds'] for epoch in result['history']] == result['epoch_seconds']
    assert 0 <= result['kernel_entropy'] <= 1 and 0 <= result['gate_std'] <= 0.5 and result['kernel_distance'] > 0
    for name in 'gmacs', 'macts', 'peak_memory_mib', 'infer_ms_per_image':
        assert result[name] > 0
    assert {'torch', 'timm', 'fmd-timm'} <= result['versions'].keys()
    assert result['cudnn_benchmark'] == (result['device_type'] == 'cuda') and result['channels_last']
    assert result['weights_sha256'] == hashlib.sha256((tmp_path / 'model.safetensors').read_bytes()).hexdigest()
    assert result['recipe']['dataset'] == digits_folder.name
    for path in [*(tmp_path / 'logs').rglob('events*'), *(tmp_path / 'logs').rglob('hparams.yml')]:
        assert str(digits_folder).encode() not in path.read_bytes()

    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert model.pretrained_cfg['input_size'] == (3, 8, 8)
    assert model.pretrained_cfg['label_names'] == [str(digit) for digit in range(10)]
    assert all(m.kernel_temperature.item() == 1 for m in model.modules() if hasattr(m, 'kernel_temperature'))
    images = _data.LabelledImages(
        _dataset.open_dataset(str(digits_folder))['test'], 'test', 'test',
        _loaders.eval_transform(timm.data.resolve_model_data_config(model)))
    normalize = _loaders.Normalize(model.pretrained_cfg['mean'], model.pretrained_cfg['std'])
    batch, labels = torch.utils.data.default_collate([images[i] for i in range(50)])
    with torch.no_grad():
        right = (model(normalize(batch)).argmax(1) == labels).sum().item()
    assert 100 * right / 50 == pytest.approx(result['top1'])


def test_a_tracker_that_fails_ends_no_run(digits_folder, tmp_path, monkeypatch, capsys):
    """It only describes one."""
    def fail(self, *args, **kwargs):
        raise OSError(28, 'No space left on device')

    for name in 'log', 'finish':
        monkeypatch.setattr(TensorBoardTracker, name, fail)
    record = run(make_recipe(digits_folder, epochs=1, tracker='tensorboard'), tmp_path / 'run')
    said = 'warning: the tracker failed: OSError: [Errno 28] No space left on device'
    assert record['epochs'] == 1 and capsys.readouterr().out.count(said) == 2
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(TensorBoardTracker, 'start', fail)
    with pytest.raises(SystemExit, match='--tracker tensorboard could not be started: OSError: .*No space left'):
        run(make_recipe(digits_folder, tracker='tensorboard'), tmp_path / 'other')


def test_weights_are_there_when_they_could_not_be_measured(digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'count_gmacs', lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(make_recipe(digits_folder, epochs=1), tmp_path)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 10


def test_averaged_weights_are_saved_with_the_present_temperature(digits_folder, tmp_path):
    run(make_recipe(digits_folder, ema_decay=0.9, annealed_by=0.9), tmp_path)
    expected = annealed_temperature(7 / 8, 30.0, 0.9)  # of the last of 2 epochs of 64 / 16 steps
    saved = load_file(tmp_path / 'model.safetensors')
    temperatures = [tensor.item() for key, tensor in saved.items() if key.endswith('kernel_temperature')]
    assert temperatures == pytest.approx([expected] * 8)


@pytest.mark.parametrize('name', [tiny.STATIC, tiny.COND])
def test_networks_without_temperature_train(name, digits_folder, tmp_path):
    result = run(make_recipe(digits_folder, model=name, epochs=1, ema_decay=0.9), tmp_path)
    assert result['model'] == name and result['loss'] < 10
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).num_classes == 10


def test_the_seed_fixes_the_run(digits_folder, tmp_path):
    losses = []
    for i, seed in enumerate((1, 1, 2)):
        losses.append(run(make_recipe(digits_folder, epochs=1, seed=seed), tmp_path / str(i))['loss'])
    assert losses[0] == losses[1] != losses[2]


def test_two_processes_evaluate_the_same_network_and_count_every_image_once(
        digits_folder, tmp_path, monkeypatch, capsys):
    """Though each has trained on its own images: networks with and without averaged weights."""
    script = tmp_path / 'script.py'
    script.write_text(f'''
import os, sys
import _loop, tiny, torch, train
evaluate = _loop.evaluate

def recorded(training, *args):
    metrics = evaluate(training, *args)
    networks = training.model.module, training.ema.module
    torch.save([network.state_dict() for network in networks], {str(tmp_path)!r} + '/networks' + os.environ['RANK'])
    return metrics

_loop.evaluate = recorded
train.main(**vars(train.parse_train(sys.argv[1:])))
''')
    launch(2, script, 'digits', '--model', tiny.NAME, '--dataset', digits_folder, '--epochs', 1, '--batch-size', 16,
           '--tracker', 'none', '--ema-decay', 0.9, '--output', tmp_path / 'two')
    for first, second in zip(*(torch.load(tmp_path / f'networks{rank}') for rank in (0, 1))):
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    two = json.loads((tmp_path / 'two' / 'result.json').read_text())
    assert two['device_count'] == 2 and two['validation_images'] == 50
    monkeypatch.setattr(evaluate, 'use_all_cores', lambda accelerator: None)
    evaluate.main(**vars(evaluate.parse_evaluate(
        [str(tmp_path / 'two'), '--dataset', str(digits_folder), '--num-workers', '0'])))
    lines = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines() if ': ' in line)
    assert lines['top-1'] == f'{two["top1"]:.2f}' and lines['loss'] == f'{two["loss"]:.4f}'
    assert lines['images'] == '50'


@pytest.mark.parametrize('options, draw, argument, calls', [
    (('--aa', 'rand-m5'), '_data._seeded', 1, 64),  # its half of the images to train on and to validate
    pytest.param((), '_resident.draw_crops', 4, 4, marks=pytest.mark.slow),  # each batch
])
def test_each_process_trains_on_its_own_images_and_every_epoch_in_a_new_order(
        options, draw, argument, calls, digits_folder, tmp_path):
    """Every image has a label of its own, which the loss function sees."""
    rows = _dataset.open_dataset(str(digits_folder))
    for split, count in ('train', 64), ('test', 64):
        table = datasets.Dataset.from_dict(
            {'image': [rows['train'][i]['image'] for i in range(count)], 'label': list(range(count))},
            features=datasets.Features(image=datasets.Image(), label=datasets.Value('int64')))
        table.to_parquet(tmp_path / 'rows' / f'{split}.parquet')
    script = tmp_path / 'script.py'
    script.write_text(f'''
import os, sys
import _data, _resident, _training, tiny, train

draw = {draw}

def recorded(*args):
    with open({str(tmp_path)!r} + '/epochs' + os.environ['RANK'], 'a') as file:
        file.write(str(args[{argument}]))
    return draw(*args)

{draw} = recorded

class Recorder(_training.nn.CrossEntropyLoss):
    def forward(self, logits, labels):
        with open({str(tmp_path)!r} + '/labels' + os.environ['RANK'], 'a') as file:
            file.write(' '.join(map(str, labels.tolist())) + chr(10))
        return super().forward(logits, labels)

_training.nn.CrossEntropyLoss = Recorder
train.main(**vars(train.parse_train(sys.argv[1:])))
''')
    launch(2, script, 'digits', '--model', tiny.NAME, '--dataset', tmp_path / 'rows', '--epochs', 2, '--batch-size', 16,
           '--tracker', 'none', '--output', tmp_path / 'run', *options)
    lines = [(tmp_path / f'labels{rank}').read_text().splitlines() for rank in (0, 1)]
    seen = [[list(map(int, line.split())) for line in of_rank] for of_rank in lines]
    assert [len(lines) for lines in seen] == [8, 8]  # 2 epochs of 64 / 16 steps
    for epoch in range(2):
        first, second = (sum(lines[4 * epoch:4 * epoch + 4], []) for lines in seen)
        assert sorted(first + second) == list(range(64))
    assert seen[0][:4] != seen[0][4:]
    for rank in 0, 1:  # and with new augmentation
        epochs = (tmp_path / f'epochs{rank}').read_text()
        assert epochs.count('0') == epochs.count('1') == calls


@pytest.mark.parametrize('every, kept', [
    ('10min', ['epoch_0005']), ('1epoch', ['epoch_0004', 'epoch_0005']), ('2epochs', ['epoch_0004', 'epoch_0005']),
    ('3epochs', ['epoch_0003', 'epoch_0005']),
])
def test_the_end_and_the_last_checkpoint_before_it_are_kept(every, kept, digits_folder, tmp_path, monkeypatch):
    accuracies = iter([10.0, 90.0, 20.0, 30.0, 40.0])
    monkeypatch.setattr(_loop, 'score', lambda *args: dict(top1=next(accuracies), top5=100.0, loss=1.0))
    recipe = make_recipe(digits_folder, model=tiny.STATIC, epochs=5, batch_size=64, checkpoint_every=every)
    record = run(recipe, tmp_path)
    assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == kept
    assert (record['best_top1'], record['best_epoch'], record['top1']) == (90, 2, 40)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(digits_folder, tmp_path, monkeypatch):
    normalize = _loaders.Normalize.forward
    calls = []

    def poisoned(self, images):
        calls.append(1)
        # 4 batches to train and 4 to validate in epoch 1: the tenth is step 5, the second of epoch 2
        return normalize(self, images) * (float('nan') if len(calls) == 10 else 1)

    monkeypatch.setattr(_loaders.Normalize, 'forward', poisoned)
    with pytest.raises(SystemExit, match=r'the loss is nan at step 5 with learning rate 0\.0'):
        run(make_recipe(digits_folder, checkpoint_every='1epoch'), tmp_path)
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir()] == ['epoch_0001']
    assert not (tmp_path / 'result.json').exists()


def test_every_preset_is_valid_and_help_shows_its_values(capsys):
    for preset, recipe in PRESETS.items():
        check_recipe(recipe if recipe.model else dataclasses.replace(recipe, init='hf-hub:acme/digits'))
        with pytest.raises(SystemExit) as exit:
            train.parse_train([preset, '--help'])
        assert exit.value.code == 0
        text = capsys.readouterr().out
        assert f'({recipe.dataset})' in text and f'({recipe.lr})' in text
        for field in dataclasses.fields(Recipe):
            assert '--' + field.name.replace('_', '-') in text
    assert train.parse_train(['cifar10', '--lr', '0.2', '--no-channels-last']).recipe == dataclasses.replace(
        PRESETS['cifar10'], lr=0.2, channels_last=False)


@pytest.mark.parametrize('arguments', [['cifar11'], ['digits', '--learning-rate', '1'], ['digits', '--epochs', 'many']])
def test_unknown_presets_and_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        train.parse_train(arguments)
    assert 'error: ' in capsys.readouterr().err


@pytest.mark.parametrize('change, message', [
    (dict(model='resnet18_fdm'), r"--model must be a model registered in timm.*resnet18_fmd.*got 'resnet18_fdm'"),
    (dict(model='resnet18.a1_in1k'), "--model must be without a tag, .*: --init resnet18.a1_in1k starts"),
    (dict(model='resnet18_fmd.nowhere'), "--model must be without a tag, .* got 'resnet18_fmd.nowhere'"),
    (dict(temperature=0.0), '--temperature must be positive and finite in float32, got 0.0'),
    (dict(lr=-1.0), '--lr must be positive and finite in float32, got -1.0'),
    (dict(temperature=1e300), '--temperature must be positive and finite in float32, got 1e\\+300'),
    (dict(weight_decay=1e308), '--weight-decay must .*, got 1e\\+308'),
    (dict(seed=-1), '--seed must .*, got -1'),
    (dict(seed=2**32), '--seed must .*, got 4294967296'),
    (dict(image_size=100000000), '--image-size must .*, got 100000000'),
    (dict(dataset=''), "--dataset must be 'digits', .*, got ''"),
    (dict(opt='sdg'), "--opt must .*got 'sdg'"),
    (dict(opt='lbfgs'), "--opt must .*got 'lbfgs'"),
    (dict(opt='adahessian'), "--opt must .*got 'adahessian'"),
    (dict(aa='x'), "--aa must be a policy of timm.*got 'x'"),
    (dict(epochs=0), '--epochs must be at least 1, got 0'),
    (dict(annealed_by=2.0), '--annealed-by must be between 0 and 1, got 2.0'),
    (dict(crop='center'), "--crop must be one of rrc, pad, got 'center'"),
    (dict(precision='int8'), "--precision must be one of auto, bf16, fp16, fp32, got 'int8'"),
    (dict(tracker='paper'), "--tracker must be one of none,.*got 'paper'"),
    (dict(batch_size=1), '--batch-size must be larger, .*Expected more than 1 value per channel.*got 1'),
    (dict(model='test_vit'), '--image-size must be pixels that a test_vit can take, not 8 .*, got 8'),
    (dict(image_sizes=['12:1'], model='test_vit', image_size=160, test_size=100), '--image-sizes must .* not 12 '),
    (dict(model='test_vit', image_size=160, test_size=100), '--test-size must .* can take, not 100 .*, got 100'),
    (dict(sched='wsd', decay_epochs=1e-9), "--sched must be one whose phases have a step each, of 4 in an epoch"),
    (dict(batch_size=65), '--batch-size must be at most the 64 training images, got 65'),
    (dict(batch_size=15, accumulate=2), '--batch-size must be a multiple of 2 .*, got 15'),
    (dict(dataset='/no/such/folder'), "dataset '/no/such/folder'.* expected"),
    (dict(validation_split='dev'), "has no split 'dev'; it has train, test"),
    (dict(label_column='image'), "label column 'image' is not one of labels; it has image \\(Image\\), label"),
])
def test_bad_values_are_named_before_training(change, message, digits_folder, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(make_recipe(digits_folder, **change), tmp_path)


def test_output_that_cannot_be_written_is_named(digits_folder, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit, match='--output .*file/run cannot be written'):
        run(make_recipe(digits_folder), tmp_path / 'file' / 'run')
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(_output.shutil, 'disk_usage', lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(SystemExit, match='--output .* has 1 MiB free, checkpoints need'):
        run(make_recipe(digits_folder), tmp_path / 'full')


def test_another_run_is_neither_overwritten_nor_resumed_with_other_settings(digits_folder, tmp_path):
    run(make_recipe(digits_folder, epochs=1), tmp_path)
    for resume, changes, message in [
        (None, {}, 'holds another run'),
        ('auto', dict(model='resnet18'), "is of a run with model 'tiny_dynamic', this one has 'resnet18'"),
        ('auto', dict(lr=0.01), 'is of a run with lr 0.05, this one has 0.01'),
        (str(tmp_path / 'nowhere'), {}, "--resume must be 'auto' or .* got .*nowhere: it has no manifest"),
    ]:
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match=message):
            run(make_recipe(digits_folder, **dict(dict(epochs=1), **changes)), tmp_path, resume)


def test_temperature_falls_linearly_and_stays_at_one():
    assert [annealed_temperature(p, 30, 0.5) for p in (0, 0.25, 0.5, 1)] == [30, 15.5, 1, 1]
    assert annealed_temperature(0, annealed_by=0) == 1
    for arguments in dict(progress=1.5), dict(progress=0, start=0), dict(progress=0, annealed_by=-1):
        with pytest.raises(ValueError, match=f'got {list(arguments.values())[-1]}'):
            annealed_temperature(**arguments)


@pytest.mark.slow
def test_a_compiled_channels_last_run_trains(digits_folder, tmp_path):
    result = run(make_recipe(digits_folder, compile=True, channels_last=True, ema_decay=0.9), tmp_path)
    assert result['loss'] < 10
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


@pytest.mark.slow
def test_the_digits_preset_reaches_97_percent(tmp_path):
    command = [sys.executable, '-m', 'accelerate.commands.launch', RECIPES / 'train.py', 'digits', '--output', tmp_path]
    env = {name: value for name, value in os.environ.items() if name != 'OMP_NUM_THREADS'}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'result.json').read_text())['top1'] >= 97
