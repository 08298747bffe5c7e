"""recipes/compare.py: what it measures and writes, that it goes on after a stop, and what it refuses to compare."""
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import _accelerator
import _measure
import _pictures
import _report
import _timing
import compare
import numpy as np
import processes
import pytest
import tiny
import torch
import train
from _presets import PRESETS
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

STATIC = 'test_resnet'  # timm's own, 0.4 M parameters
RESULTS = Path(compare.__file__).parent / 'results'
PAGE = Path(__file__).parents[2] / 'recipes' / 'README.md'
RUN_RECIPE = compare.run_recipe


def run_here(state, script, arguments):
    """compare.run_recipe without a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    module, parse = {
        'train.py': (train, train.parse_train), '_timing.py': (_timing, _timing.parse_timing)}[script]
    module.main(**vars(parse(arguments)))
    return True


def run_in_fork(state, script, arguments):
    """compare.run_recipe in a process of tests/processes.py."""
    done = processes.run(compare.RECIPES / script, *arguments)
    print(done.stdout, done.stderr)
    return done.returncode == 0


def must_not_run(state, script, arguments):
    raise AssertionError(f'{script} was started')


def on_one_thread(patch):
    """This process goes on with other tests, and the records must be of one device."""
    torch.set_num_threads(1)
    for module in compare, _accelerator:
        patch.setattr(module, 'use_all_cores', lambda state: None)
    patch.setattr(torch.backends.cudnn, 'benchmark', False)  # which timing sets
    patch.setattr(_timing, 'ROUNDS', 3)
    patch.setattr(_timing, 'STEPS', 2)
    patch.setattr(train, 'time_inference', partial(_measure.time_inference, repeats=1))


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    on_one_thread(monkeypatch)
    monkeypatch.setattr(compare, 'run_recipe', must_not_run)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(digits_folder, output, *options, models=(tiny.NAME, STATIC), seeds=2):
    argv = ['digits', '--models', *models, '--seeds', seeds, '--output', output, '--dataset', digits_folder,
            '--epochs', 2, '--batch-size', 16, '--warmup-epochs', 0, '--tracker', 'none', *options]
    compare.main(**vars(compare.parse_compare([str(argument) for argument in argv])))


@pytest.fixture(scope='module')
def finished(digits_folder, tmp_path_factory):
    """A comparison of two models with two seeds."""
    output = tmp_path_factory.mktemp('comparison')
    with pytest.MonkeyPatch.context() as patch:
        on_one_thread(patch)
        patch.setattr(compare, 'run_recipe', run_here)
        run(digits_folder, output)
    AcceleratorState._reset_state(reset_partial_state=True)
    return output


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / 'comparison'))


def change(path, **values):
    path.write_text(json.dumps(dict(json.loads(path.read_text()), **values)))


def test_the_table_is_computed_from_the_records(finished):
    comparison = json.loads((finished / 'comparison.json').read_text())
    times = json.loads((finished / 'timing.json').read_text())
    assert list(comparison['models']) == [STATIC, tiny.NAME] and comparison['static'] == STATIC
    for name, figures in comparison['models'].items():
        runs = [json.loads((finished / name / f'seed_{seed}' / 'result.json').read_text()) for seed in (0, 1)]
        first, second = (record['top1'] for record in runs)
        assert figures['top1'] == dict(
            mean=pytest.approx((first + second) / 2), std=pytest.approx(abs(first - second) / 2**0.5))
        assert figures['top5']['mean'] == pytest.approx((runs[0]['top5'] + runs[1]['top5']) / 2)
        assert len(times['epoch_seconds'][name]) == times['rounds'] == 3
        seconds = sorted(times['epoch_seconds'][name])[1]
        assert figures['epoch_seconds'] == seconds
        assert figures['train_images_per_second'] == pytest.approx(64 / seconds)
        accuracy = (first + second) / 200
        if accuracy:
            assert figures['ies'] == pytest.approx(seconds / accuracy)
            assert figures['rcs'] == pytest.approx(accuracy / seconds)
            assert figures['ies_infer'] == pytest.approx(figures['infer_ms_per_image'] / accuracy)
            assert figures['rcs_infer'] == pytest.approx(figures['infer_images_per_second'] * accuracy)
        assert figures['parameters'] == runs[0]['parameters'] and figures['gmacs'] == runs[0]['gmacs']
        assert figures['peak_memory_mib'] == max(record['peak_memory_mib'] for record in runs)
        assert figures['training_epoch_seconds'] == pytest.approx(
            (runs[0]['median_epoch_seconds'] + runs[1]['median_epoch_seconds']) / 2)
        assert f' {figures["top1"]["mean"]:.2f} ± {figures["top1"]["std"]:.2f}' in (finished / 'table.md').read_text()


def test_every_figure_is_also_relative_to_the_static_network(finished):
    models = json.loads((finished / 'comparison.json').read_text())['models']
    times = json.loads((finished / 'timing.json').read_text())
    static, dynamic = models[STATIC], models[tiny.NAME]
    assert dynamic['relative'].keys() == {row for row, _, _ in _report.ROWS}
    assert static['relative'].pop('data_wait_share') is None  # a share of each network's own epoch
    assert all(value in (0, 1) for value in static['relative'].values())
    ratios = [a / b for a, b in zip(times['epoch_seconds'][tiny.NAME], times['epoch_seconds'][STATIC])]
    assert dynamic['relative']['epoch_seconds'] == statistics.median(ratios)
    assert dynamic['relative']['gmacs'] == dynamic['gmacs'] / static['gmacs']
    assert dynamic['relative']['top1'] == pytest.approx(dynamic['top1']['mean'] - static['top1']['mean'])
    assert dynamic['relative']['ies'] == pytest.approx(
        statistics.median(ratios) * static['top1']['mean'] / dynamic['top1']['mean'])
    assert dynamic['relative']['rcs'] == pytest.approx(1 / dynamic['relative']['ies'])


@pytest.mark.parametrize('name', ['training', 'inference'])
def test_the_pictures_show_every_model_without_colour(finished, name):
    image = Image.open(finished / f'{name}.png').convert('RGB')
    pixels = np.asarray(image).astype(int)
    assert min(image.size) > 500
    assert (pixels.max(2) < 100).sum() > 2000  # axes, markers and text
    assert np.ptp(pixels, axis=2).max() == 0
    svg = (finished / f'{name}.svg').read_text()
    assert STATIC in svg and tiny.NAME in svg and 'equal IES' in svg and 'Top-1, %' in svg


def test_models_take_turns_and_the_order_turns_too(digits_folder, tmp_path, monkeypatch):
    turns, time_inference = [], _timing.time_inference

    def recorded(accelerator, model, *args):
        turns.append(type(model).__name__)
        return time_inference(accelerator, model, *args)

    monkeypatch.setattr(_timing, 'time_inference', recorded)
    recipe = dataclasses.replace(
        PRESETS['digits'], dataset=str(digits_folder), batch_size=16, tracker='none', accumulate=2, mixup=0.2,
        ema_decay=0.9)
    _timing.main('digits', recipe, [STATIC, tiny.NAME], tmp_path)
    turns = list(zip(turns[::2], turns[1::2]))
    assert len(turns) == 1 + _timing.ROUNDS
    assert all(first != second for first, second in turns)
    assert all(turn == later[::-1] for turn, later in zip(turns, turns[1:]))
    record = json.loads((tmp_path / 'timing.json').read_text())
    assert record['steps_per_epoch'] == 4 and record['versions'] and record['device']
    assert record['cudnn_benchmark'] is True  # each with the algorithms that are fastest here


def test_a_finished_comparison_is_only_written_again(copied, digits_folder):
    for path in copied.glob('*.*'):
        if path.name != 'timing.json':
            path.rename(path.with_name('old ' + path.name))
    run(digits_folder, copied)
    for old in copied.glob('old *'):
        assert old.read_bytes() == (copied / old.name.removeprefix('old ')).read_bytes(), old.name
    assert not list(copied.rglob('checkpoints'))


@pytest.mark.slow
def test_a_model_that_joins_is_timed_with_the_others_and_trained_alone(copied, digits_folder, monkeypatch):
    shutil.rmtree(copied / tiny.NAME)
    change(copied / 'timing.json', models=[STATIC])
    started = []

    def recorded(state, script, arguments):
        own = arguments[arguments.index('--tracker') + 2:]  # after those that all share
        started.append(' '.join([script, *own]))
        return run_here(state, script, arguments)

    monkeypatch.setattr(compare, 'run_recipe', recorded)
    run(digits_folder, copied)
    run_arguments = f'train.py --model {tiny.NAME} --seed {{0}} --output {copied}/{tiny.NAME}/seed_{{0}} --resume auto'
    assert started == [
        f'_timing.py --models {STATIC} {tiny.NAME} --output {copied}', *(run_arguments.format(seed) for seed in (0, 1))]


@pytest.mark.slow
def test_a_run_that_fails_loses_no_other_and_goes_on_from_its_checkpoint(
        copied, digits_folder, tmp_path, monkeypatch, capfd):
    """In processes as the user has them: recipes/train.py that knows the tiny network and is killed once."""
    (tmp_path / 'recipes').mkdir()
    (tmp_path / 'recipes' / 'train.py').write_text(f'''
import os, signal, sys
sys.path[:0] = {[str(compare.RECIPES), str(Path(tiny.__file__).parent)]!r}
import _accelerator, _checkpoints, _loop, tiny, torch, train
torch.set_num_threads(1)
save = _checkpoints.save
def save_and_die(*args):
    folder = save(*args)
    if not os.path.exists({str(tmp_path / 'killed')!r}):
        open({str(tmp_path / 'killed')!r}, 'w').close()
        os.kill(os.getpid(), signal.SIGKILL)
    return folder
_checkpoints.save = save_and_die
_loop.parse_every = lambda every: (float('inf'), 1)
_accelerator.use_all_cores = lambda state: None
train.main(**vars(train.parse_train(sys.argv[1:])))
''')
    monkeypatch.setattr(compare, 'RECIPES', tmp_path / 'recipes')
    monkeypatch.setattr(compare, 'run_recipe', RUN_RECIPE)
    expected = json.loads((copied / tiny.NAME / 'seed_0' / 'result.json').read_text())
    shutil.rmtree(copied / tiny.NAME / 'seed_0')
    with pytest.raises(SystemExit, match=f'failed, and left out of the table: {tiny.NAME} with seed 0; the same'):
        run(digits_folder, copied)
    monkeypatch.setattr(compare, 'run_recipe', run_in_fork)  # which starts sooner
    assert json.loads((copied / 'comparison.json').read_text())['models'][tiny.NAME]['seeds'] == [1]
    assert f'run 2 of 4: {tiny.NAME}, seed 0' in capfd.readouterr().out

    AcceleratorState._reset_state(reset_partial_state=True)
    run(digits_folder, copied)
    printed = capfd.readouterr().out
    assert 'epoch 2: ' in printed and 'epoch 1: ' not in printed
    record = json.loads((copied / tiny.NAME / 'seed_0' / 'result.json').read_text())
    assert record['top1'] == expected['top1'] and record['loss'] == pytest.approx(expected['loss'], rel=1e-4)
    assert json.loads((copied / 'comparison.json').read_text())['models'][tiny.NAME]['seeds'] == [0, 1]
    assert 'recipes/train.py digits' in record['command'] and f'--model {tiny.NAME} --seed 0' in record['command']


@pytest.mark.slow  # eight processes that have to find one another
def test_the_processes_of_a_launch_run_each_recipe_together_and_end_together(tmp_path):
    """On two CPU processes, twice: where both succeed, and where the second one fails while the first one waits."""
    (tmp_path / 'good.py').write_text(
        'import sys\nfrom pathlib import Path\nfrom accelerate import PartialState\n'
        'state = PartialState(cpu=True)\nstate.wait_for_everyone()\n'
        'Path(sys.argv[1], f"met_{state.process_index}_of_{state.num_processes}").touch()\n')
    (tmp_path / 'bad.py').write_text(
        'import os, sys, time\nsys.exit("broken") if os.environ["RANK"] == "1" else time.sleep(600)\n')
    (tmp_path / 'script.py').write_text(f'''
import sys
from pathlib import Path
sys.path.insert(0, {str(compare.RECIPES)!r})
import compare
from accelerate import PartialState
compare.RECIPES = Path({str(tmp_path)!r})
state = PartialState(cpu=True)
results = [compare.run_recipe(state, script, [{str(tmp_path)!r}]) for script in ('good.py', 'bad.py', 'good.py')]
Path({str(tmp_path)!r}, f'results_{{state.process_index}}').write_text(str(results))
''')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run(
        [*command, tmp_path / 'script.py'], env=dict(os.environ, ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1'),
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.glob('met_*')} == {'met_0_of_2', 'met_1_of_2'}
    assert [(tmp_path / f'results_{rank}').read_text() for rank in (0, 1)] == ['[True, False, True]'] * 2


@pytest.mark.parametrize('values, difference', [
    (dict(device='Abacus (2 threads)'), r"device is 'Abacus \(2 threads\)', not '.*'"),
    (dict(device_count=8), 'device_count is 8, not 1'),
    (dict(versions=dict(torch='1.0')), "version of torch is '1.0', not '.*'"),
])
def test_records_of_another_device_are_refused(values, difference, copied, digits_folder):
    change(copied / STATIC / 'seed_1' / 'result.json', **values)
    refusal = f'{STATIC}/seed_1/result.json cannot be compared with'
    with pytest.raises(SystemExit, match=f'{refusal} this run: .*{difference}'):
        run(digits_folder, copied)
    with pytest.raises(SystemExit, match=f'{refusal} .*timing.json: '):
        _report.write(copied)


def test_another_recipe_is_refused_in_the_folder_of_a_comparison(copied, digits_folder):
    with pytest.raises(SystemExit, match=r'timing.json cannot be compared with this run: lr is 0.1, not 0.01$'):
        run(digits_folder, copied, '--lr', 0.01)


@pytest.mark.parametrize('arguments, message', [
    (['--seeds', '0'], '--seeds must be at least 1, got 0'),
    (['--models', 'resnet18', 'resnet18'], '--models names a model twice: resnet18 resnet18'),
    (['--model', 'resnet18'], '--model, --seed and --resume are those of each run'),
    (['--resume', 'auto'], '--model, --seed and --resume are those of each run'),
    (['--init', 'resnet18.a1_in1k'], 'a comparison trains from random weights'),
    (['--learning-rate', '1'], 'unrecognized arguments: --learning-rate'),
])
def test_options_that_are_not_of_a_comparison_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.parse_compare(['digits', *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('models, message', [
    ((tiny.NAME,), 'exactly one static network.* got none among tiny_dynamic'),
    ((STATIC, 'resnet18'), 'exactly one static network.* got test_resnet and resnet18 among'),
    (('resnet18.a1_in1k', tiny.NAME), "--model must be without a tag, which names weights"),
    ((STATIC, 'resnet18_fdm'), "--model must be a model registered in timm.*got 'resnet18_fdm'"),
])
def test_models_that_cannot_be_compared_are_refused_before_any_is_trained(models, message, digits_folder, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(digits_folder, tmp_path / 'output', models=models)
    assert not (tmp_path / 'output').exists()


def test_bad_values_and_data_are_refused_before_any_model_is_trained(digits_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, 'run_recipe', run_here)
    for options, message in [
        (['--lr', -1], '--lr must be positive and finite in float32, got -1.0'),
        (['--batch-size', 65], '--batch-size must be at most the 64 training images, got 65'),
        (['--label-column', 'image'], "label column 'image' is not one of labels"),
    ]:
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match=message):
            run(digits_folder, tmp_path / 'output', *options)
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit, match='--output .*file/output cannot be written'):
        run(digits_folder, tmp_path / 'file' / 'output')


def test_every_preset_is_compared_with_its_static_twin():
    assert compare.parse_compare(['cifar10']).models == [
        'resnet18_cifar', 'resnet18_cond_cifar', 'resnet18_dy_cifar', 'resnet18_od_cifar', 'resnet18_fmd_cifar']
    for preset in 'digits', 'cifar10', 'cifar100', 'imagenet':
        args = compare.parse_compare([preset, '--sched', 'cosine', '--epochs', '7'])
        assert args.seeds == 3 and args.output == Path('runs', f'compare_{preset}') and args.recipe.epochs == 7
        assert compare.static_first(args.models) == args.models


def make_records(**accuracies):
    """Records of models by accuracy in percent: each a tenth slower than the one before."""
    runs, seconds = {}, {}
    for i, (name, top1) in enumerate(accuracies.items()):
        seconds[name] = [10. + i, 20. + 2 * i, 30. + 3 * i]
        runs[name] = [dict(
            model=name, seed=0, top1=top1, top5=100., parameters=10**6 * (1 + i), gmacs=1. + i, peak_memory_mib=100.,
            median_epoch_seconds=11., dataset='digits', git_commit='abc',
        )]
    shared = dict(
        device='H100', device_type='cuda', device_count=1, precision='bf16', input_size=[3, 8, 8], global_batch=64,
        train_images=640, validation_images=50, num_classes=10, versions=dict(torch='2'))
    return runs, dict(
        shared, epoch_seconds=seconds, infer_ms_per_image=seconds, infer_images_per_second=seconds, rounds=3, steps=5,
        steps_per_epoch=10, infer_batch=64, recipe=dict(epochs=8), git_commit='abc')


def test_the_epoch_of_fmd_is_told_against_that_of_od():
    runs, times = make_records(resnet18=80., resnet18_fmd=82., resnet18_od=82.)
    comparison = _report.compare('resnet18', runs, times)
    assert comparison['epoch_against_od']['resnet18_fmd']['median'] == pytest.approx(11 / 12)
    table = _report.make_table(comparison)
    assert 'An epoch of resnet18_fmd takes 8.3 % less time than one of resnet18_od' in table
    assert '| 82.00 (+2.00) |' in table and '| 22 (1.10x) |' in table and '| 80.00 | ' in table


def test_a_model_without_a_right_answer_has_no_score():
    runs, times = make_records(resnet18=80., resnet18_fmd=0.)
    comparison = _report.compare('resnet18', runs, times)
    assert comparison['models']['resnet18_fmd']['ies'] is None
    assert '| IES, s | 25 | - |' in _report.make_table(comparison)
    assert _pictures.draw_training(comparison) and _pictures.draw_inference(comparison)


@pytest.mark.parametrize('comparison', sorted(RESULTS.glob('*/comparison.json')), ids=lambda path: path.parent.name)
def test_published_results_are_those_of_their_records(comparison, tmp_path):
    folder = comparison.parent
    copied = Path(shutil.copytree(folder, tmp_path / folder.name))
    assert _report.write(copied) == (folder / 'table.md').read_text()
    for name in 'comparison.json', 'summary.md':
        assert (copied / name).read_text() == (folder / name).read_text()


@pytest.mark.skipif(not (RESULTS / 'digits').exists(), reason='no published results of digits')
def test_the_pages_show_the_published_tables_and_picture_of_digits():
    page = PAGE.read_text()
    assert (RESULTS / 'digits' / 'table.md').read_text() in page
    assert (RESULTS / 'digits' / 'summary.md').read_text() in (PAGE.parents[1] / 'README.md').read_text()
    assert '(results/digits/training.png)' in page and (RESULTS / 'digits' / 'training.png').exists()
