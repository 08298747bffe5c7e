import os
import shutil
import sys

# Tensors are small here: more threads would only wait for each other, on a busy machine for long.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402

from fmd_timm.ops import c_conv, cpu, hybrid, im2col, per_image, per_kernel, reference  # noqa: E402

FITS = {
    reference: lambda num_kernels, has_taps, groups: True,
    per_kernel: lambda num_kernels, has_taps, groups: groups == 1 or num_kernels == 1 and not has_taps,
    im2col: lambda num_kernels, has_taps, groups: groups == 1,
    hybrid: lambda num_kernels, has_taps, groups: groups == 1,
    per_image: lambda num_kernels, has_taps, groups: True,
}


@pytest.fixture(params=FITS, ids=lambda module: module.__name__.rpartition('.')[2])
def implementation(request, monkeypatch):
    """Run the test with each implementation of dynamic_conv2d for the CPU wherever that one applies."""
    rule = cpu.choose

    def choose(num_kernels, has_taps, groups, **shape):
        if FITS[request.param](num_kernels, has_taps, groups):
            return request.param
        return rule(num_kernels=num_kernels, has_taps=has_taps, groups=groups, **shape)

    monkeypatch.setattr(cpu, 'choose', choose)


@pytest.fixture
def compiled():
    """For tests of c_conv.c, which compiles wherever it can."""
    if sys.platform != 'linux' or not shutil.which(os.environ.get('CC', 'cc')):
        pytest.skip('c_conv.c is for Linux with a C compiler')
    assert c_conv.is_available()


@pytest.fixture
def fresh_accelerator(monkeypatch):
    """For tests that call `train.main` or `_timing.main`: this process goes on with other tests."""
    import _accelerator
    import torch
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # which _timing sets, and training on CUDA
    monkeypatch.setattr(_accelerator, 'use_all_cores', lambda accelerator: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory):
    """64 digits to train and 50 to validate, as a folder of parquet files."""
    import _data

    folder = tmp_path_factory.mktemp('digits')
    digits = _data.load_digits()
    digits['train'].select(range(64)).to_parquet(folder / 'train.parquet')
    digits['test'].select(range(50)).to_parquet(folder / 'test.parquet')
    return folder
