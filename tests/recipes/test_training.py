"""recipes/_training.py: what a step does, and that recipes/_timing.py times the steps of recipes/train.py."""
import dataclasses

import _accelerator
import _start
import _timing
import _training
import pytest
import timm
import tiny
import torch
import train
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.layers import DropPath
from tiny import make_recipe, run
from torch import nn

pytestmark = pytest.mark.usefixtures('fresh_accelerator')


@pytest.fixture
def steps(monkeypatch):
    """The trainings that `_training.train_step` was called with, in order."""
    seen, train_step = [], _training.train_step

    def recorded(training, images, labels):
        seen.append(training)
        return train_step(training, images, labels)

    monkeypatch.setattr(_training, 'train_step', recorded)
    return seen


@pytest.fixture
def temperatures(monkeypatch):
    """The temperatures that `_training` has set, in order."""
    seen, set_temperature = [], _training.set_temperature

    def recorded(model, kernel):
        seen.append(kernel)
        set_temperature(model, kernel=kernel)

    monkeypatch.setattr(_training, 'set_temperature', recorded)
    return seen


def time_models(recipe, models, output, monkeypatch, rounds=1, steps=4):
    monkeypatch.setattr(_timing, 'ROUNDS', rounds)
    monkeypatch.setattr(_timing, 'STEPS', steps)
    _timing.main('digits', recipe, models, output)


def test_the_steps_that_are_timed_are_those_of_training(digits_folder, tmp_path, monkeypatch, steps):
    recipe = make_recipe(digits_folder, epochs=1, class_weights=True, ema_decay=0.9, smoothing=0.2, mixup=0.2)
    train.main('digits', recipe, tmp_path / 'run', None)
    trained, steps[:] = list(steps), []
    time_models(recipe, [tiny.NAME], tmp_path, monkeypatch)
    assert len(trained) == 4 and len(steps) == 2 * (1 + 4)  # 2 rounds of a step that isn't timed and 4 that are
    expected, timed = trained[0], steps[0]
    for name in 'model', 'optimizer', 'ema', 'normalize', 'erase', 'mixup', 'task':
        assert type(getattr(timed, name)) is type(getattr(expected, name)), name
    assert torch.equal(timed.task.criterion.weight, expected.task.criterion.weight) and timed.anneals
    assert {group['lr'] for group in timed.optimizer.param_groups} == {0.0}  # no loss diverges, no weight changes


def test_a_temperature_is_set_while_it_is_timed_and_only_where_there_is_one(
        digits_folder, tmp_path, monkeypatch, temperatures):
    recipe = make_recipe(digits_folder, annealed_by=0.5)
    time_models(recipe, [tiny.NAME], tmp_path, monkeypatch)
    assert temperatures == [30.0, 15.5, 1.0] * 2  # in each turn that of all training
    temperatures.clear()
    time_models(recipe, [tiny.STATIC, tiny.COND], tmp_path, monkeypatch)
    assert temperatures == []


def test_a_temperature_is_set_only_where_it_changes(digits_folder, tmp_path, temperatures):
    train.main('digits', make_recipe(digits_folder, annealed_by=0.25), tmp_path, None)
    assert temperatures == [30.0, 15.5, 1.0]  # in the first 3 of 8 steps


def test_as_many_steps_are_timed_where_an_epoch_ends_within_them(digits_folder, tmp_path, monkeypatch, steps):
    """4 batches of an epoch, of which 3 make a step: the fourth makes the last step of the epoch alone."""
    recipe = make_recipe(digits_folder, batch_size=48, accumulate=3)
    counted, train_epoch = [], _training.train_epoch

    def recorded(*args):
        result = train_epoch(*args)
        counted.append(args[0].step)
        return result

    monkeypatch.setattr(_timing, 'train_epoch', recorded)
    time_models(recipe, [tiny.NAME], tmp_path, monkeypatch)
    assert counted == [1, 4] * 2


def test_a_run_that_diverges_ends_with_an_error_and_without_a_result(digits_folder, tmp_path):
    """After one step: the loss of that step was finite."""
    recipe = make_recipe(digits_folder, epochs=1, batch_size=64, lr=1e30, clip_grad=None)
    with pytest.raises(SystemExit, match='the loss of the validation images is nan after step 1 .* has diverged'):
        train.main('digits', recipe, tmp_path, None)
    assert not (tmp_path / 'result.json').exists() and not list((tmp_path / 'checkpoints').iterdir())


def test_what_is_compiled_is_the_wrapper_of_the_network(digits_folder, tmp_path, monkeypatch):
    """As DistributedDataParallel is one, which sends gradients between the parts of a backward pass."""
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    compiled = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self: compiled.append(self))
    monkeypatch.setattr(Accelerator, 'prepare', lambda self, network, optimizer: (Wrapper(network), optimizer))
    recipe = make_recipe(digits_folder, compile=True)
    images = train.open_images(recipe)['train']
    network, _ = _start.first_network(recipe)
    network = network.to_empty(device='cpu')
    training = _training.make_training(
        _accelerator.make_accelerator(recipe, tmp_path), _start.complete(recipe, network), network,
        dict(mean=(0.5,) * 3, std=(0.5,) * 3), images, total_steps=4)
    assert compiled == [training.model] and training.model.module is network


@pytest.mark.skipif(not torch.cuda.is_available(), reason='the loss of a CPU is there at once')
def test_to_start_reading_a_loss_does_not_wait_for_the_gpu():
    loss = torch.ones((), device='cuda')
    torch.cuda.set_sync_debug_mode('error')
    try:
        read = _training.start_reading(loss)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert read() == 1.0


@pytest.mark.slow
def test_a_network_learns_from_a_teacher(digits_folder, tmp_path):
    """A run of the recipes is one; the record says which weights it had."""
    run(make_recipe(digits_folder, epochs=1), tmp_path / 'teacher')
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = make_recipe(digits_folder, epochs=1, model=tiny.STATIC, kd_model_name=str(tmp_path / 'teacher'))
    record = run(recipe, tmp_path / 'student')
    teacher = record['teacher']
    assert teacher['architecture'] == tiny.NAME and teacher['revision'].startswith('sha256 ') and record['init'] is None
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = run(dataclasses.replace(recipe, kd_model_name=None), tmp_path / 'alone')
    assert alone['loss'] != record['loss'] and alone['teacher'] is None


def test_sizes_grow_and_the_network_is_validated_and_saved_at_another(digits_folder, tmp_path, monkeypatch):
    sizes, train_step = [], _training.train_step

    def recorded(training, images, labels):
        sizes.append(images.shape[-1])
        return train_step(training, images, labels)

    monkeypatch.setattr(_training, 'train_step', recorded)
    record = run(make_recipe(
        digits_folder, batch_size=32, image_sizes=['8:0', '12:1'], test_size=16, crop_pct=0.9, interpolation='random',
    ), tmp_path)
    assert sizes == [8, 8, 12, 12] and record['input_size'] == (3, 16, 16)
    cfg = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).pretrained_cfg
    assert (tuple(cfg['input_size']), cfg['crop_pct'], cfg['interpolation']) == ((3, 16, 16), 0.9, 'bicubic')


def test_what_is_dropped_is_of_training_alone(digits_folder, tmp_path, steps):
    record = run(make_recipe(digits_folder, epochs=1, drop=0.2, drop_path=0.3), tmp_path)
    drops = [m for m in steps[0].model.modules() if isinstance(m, DropPath)]
    assert steps[0].model.drop_rate == 0.2 and max(m.drop_prob for m in drops) == pytest.approx(0.3)
    assert record['model_args'] == {}
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True).drop_rate == 0.0


def test_arguments_of_the_network_are_those_of_the_recipe(digits_folder, tmp_path):
    record = run(make_recipe(digits_folder, epochs=1, model_kwargs=['num_kernels=2', 'act_layer=silu']), tmp_path)
    assert record['model_args'] == dict(num_kernels=2, act_layer='silu')
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.layer1[0].conv1.num_kernels == 2 and isinstance(loaded.act1, torch.nn.SiLU)


@pytest.mark.slow
def test_few_images_for_the_attentions_statistics_are_said(digits_folder, tmp_path, capsys):
    for accumulate, said in (1, False), (2, True):
        AcceleratorState._reset_state(reset_partial_state=True)
        record = run(make_recipe(digits_folder, epochs=1, accumulate=accumulate), tmp_path / str(accumulate))
        assert record['infer_batch'] == 16 // accumulate  # for no more there is memory
        assert ('BatchNorm statistics of 8 images' in capsys.readouterr().out) == said
