"""Two processes under DistributedDataParallel train as one process with both batches does.

Their gloo processes run on the CPU, where SyncBatchNorm does not: what is compared exactly keeps the statistics of its
BatchNorms, which each process takes of its own images.
"""
import json
import os
from pathlib import Path

import processes
import pytest
import timm
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import train
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from fmd_timm import set_temperature

PROCESSES = 2
RECIPES = Path(train.__file__).parent
PATH = os.pathsep.join(map(str, (RECIPES, Path(tiny.__file__).parent, RECIPES.parent)))  # of processes


def make_model(num_kernels):
    torch.manual_seed(0)
    return timm.create_model(
        'resnet18_fmd_cifar', channels=(8, 8, 16, 16), layers=(1, 1, 1, 1), num_classes=3, zero_init_last=False,
        num_kernels=num_kernels,
    ).double()


def make_images():
    torch.manual_seed(1)
    return torch.randn(4, 3, 24, 24, dtype=torch.float64)


def train(rank, folder, images_of, training, num_kernels):
    """One process: two steps on its images; leaves its first gradients and its temperatures in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(make_model(num_kernels).train(training), find_unused_parameters=False)
    if rank == 0:  # DistributedDataParallel hands the buffers of this process to the others
        set_temperature(model, kernel=30.0, gate=5.0)
    gradients = []
    for _ in range(2):  # a parameter without a gradient is an error in the second step
        model.zero_grad()
        model(make_images()[images_of[rank]]).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    temperatures = [value for key, value in model.state_dict().items() if key.endswith('temperature')]
    torch.save((gradients[0], temperatures), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def run_processes(folder, images_of, training, num_kernels):
    mp.start_processes(
        train, (folder, images_of, training, num_kernels), nprocs=PROCESSES, start_method=processes.START_METHOD)
    return [torch.load(folder / f'{rank}.pt') for rank in range(PROCESSES)]


@pytest.mark.parametrize('num_kernels', [4, 1])
def test_gradients_are_those_of_one_process_with_both_batches(num_kernels, tmp_path):
    results = run_processes(tmp_path, [slice(0, 2), slice(2, 4)], False, num_kernels)
    model = make_model(num_kernels).eval()  # BatchNorm's statistics are of one process
    set_temperature(model, kernel=30.0, gate=5.0)
    model(make_images()).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for gradients, temperatures in results:
        torch.testing.assert_close(gradients, expected)
        assert {value.item() for value in temperatures} == {30.0, 5.0}


def test_process_with_one_image_trains(tmp_path):
    results = run_processes(tmp_path, [slice(0, 3), slice(3, 4)], True, 4)
    for first, second in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(first, second)
        assert first.isfinite().all() and first.any()


SCRIPT = """
import sys
import _optim, tiny, torch, train

def train_mode(model):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()

if '--keep-statistics' in sys.argv:
    sys.argv.remove('--keep-statistics')
    _optim.train_mode = train_mode
train.main(**vars(train.parse_train(sys.argv[1:])))
"""


def run_training(count, folder, *options):
    """The run record and the weights of two epochs of the digits in so many processes, unless the options say so."""
    folder.mkdir()
    script, output = folder / 'script.py', folder / 'run'
    script.write_text(SCRIPT)
    command = [script, 'digits', '--model', tiny.NAME, '--epochs', 2, '--tracker', 'none', '--output', output, *options]
    for done in processes.launch(count, *command, env=dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)):
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / 'result.json').read_text()), load_file(output / 'model.safetensors')


@pytest.mark.parametrize('loss', [
    ('--class-weights',),
    pytest.param(('--bce-loss', '--bce-target-thresh', 0.2, '--epochs', 1), marks=pytest.mark.slow)])
def test_two_processes_end_with_the_metrics_and_the_weights_of_one(loss, digits_folder, tmp_path):
    """Though they also take two passes for a step: with averaged weights, mixup, CutMix and a limit of gradients."""
    options = ('--dataset', digits_folder, '--batch-size', 16, '--hflip', 0.5, '--warmup-epochs', 0, '--clip-grad', 1.0,
               '--ema-decay', 0.9, '--mixup', 0.2, '--cutmix', 1.0, '--keep-statistics', *loss)
    expected, weights = run_training(1, tmp_path / 'one', *options)
    record, of_two = run_training(PROCESSES, tmp_path / 'two', '--accumulate', 2, *options)
    assert (expected['device_count'], record['device_count']) == (1, 2)
    assert (record['top1'], record['top5']) == (expected['top1'], expected['top5'])
    assert record['loss'] == pytest.approx(expected['loss'], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(of_two[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f'{name}: {m}')


def test_processes_stop_alike_where_the_loss_of_one_is_not_finite(digits_folder, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text("""
import os, pathlib, sys
import _loaders, tiny, train

normalize = _loaders.Normalize.forward
if os.environ['RANK'] == '1':
    _loaders.Normalize.forward = lambda self, images: normalize(self, images) * float('nan')
try:
    train.main(**vars(train.parse_train(sys.argv[1:])))
except SystemExit as error:
    pathlib.Path('said' + os.environ['RANK']).write_text(str(error))
""")
    env = dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)
    done = processes.launch(
        PROCESSES, script, 'digits', '--model', tiny.NAME, '--dataset', digits_folder, '--batch-size', 16, '--tracker',
        'none', '--output', tmp_path / 'run', cwd=tmp_path, env=env)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr[-3000:]
    said = [(tmp_path / f'said{rank}').read_text() for rank in range(PROCESSES)]
    assert said[0] == said[1] and said[0].startswith('the loss is nan at step 0')


@pytest.mark.slow
@pytest.mark.parametrize('option, tolerance', [
    (('--comm-hook', 'fp16'), 2e-2), pytest.param(('--compile',), 1e-3, marks=pytest.mark.slow)])
def test_compressed_gradients_and_compiled_networks_train_as_others_do(option, tolerance, digits_folder, tmp_path):
    options = '--dataset', digits_folder, '--batch-size', 16, '--ema-decay', 0.9, '--keep-statistics', '--epochs', 1
    expected, weights = run_training(PROCESSES, tmp_path / 'plain', *options)
    record, theirs = run_training(PROCESSES, tmp_path / 'other', *options, *option)
    assert record['loss'] == pytest.approx(expected['loss'], rel=tolerance)
    assert any(not torch.equal(theirs[name], tensor) for name, tensor in weights.items())  # it did something
    for name, tensor in weights.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=tolerance, atol=tolerance)
