"""Two processes under DistributedDataParallel train as one process with both batches does."""
import processes
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fmd_timm import set_temperature

PROCESSES = 2


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
