import gc
import os
import shutil
import signal
import sys
import tempfile
from functools import partial

from hub_server import HubServer, empty_caches, redirect_clients

# Tensors are small here: more threads would only wait for each other, on a busy machine for long.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# Each worker of pytest-xdist has a core of its own, and so have the processes that its tests start: recipes use all
# cores that they may, and threads that share one wait for each other, too.
if 'PYTEST_XDIST_WORKER' in os.environ and hasattr(os, 'sched_setaffinity'):
    cores, worker = sorted(os.sched_getaffinity(0)), int(os.environ['PYTEST_XDIST_WORKER'].removeprefix('gw'))
    os.sched_setaffinity(0, cores[worker % len(cores):][:1])
# Libraries read these variables when they are imported.
HUB, CLIENTS_HOME = HubServer(), tempfile.TemporaryDirectory()
redirect_clients(os.environ, HUB.endpoint, CLIENTS_HOME.name)
gc.disable()  # while modules are imported, which stay
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what runs in the background

import pytest  # noqa: E402

# PyTorch is imported in the fixtures, for pytest-xdist's controller reads this file too, and runs no test.


GRAPHS = 'test_graphs', 'test_inference', 'test_decomposition', 'test_layers', 'test_export', 'test_exported'


def pytest_collection_modifyitems(items):
    """Each file is for one worker of pytest-xdist, which makes its fixtures once.

    So are all that start the fork server of tests/processes.py, and those that compile and export networks: the first
    one takes ten seconds more. They take longest and come first.
    """
    groups = {}
    for item in items:
        uses_processes = hasattr(item.module, 'processes')
        group = 'processes' if uses_processes else 'graphs' if item.path.stem in GRAPHS else item.path.stem
        groups.setdefault(group, []).append(item)
        item.add_marker(pytest.mark.xdist_group(group))
    items[:] = sum((groups.pop(group, []) for group in ('processes', 'graphs', *groups)), [])


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Modules and tests stay to the end. Looking for garbage among them would take a third of a second, often."""
    gc.freeze()
    gc.enable()


@pytest.fixture(params=['per_kernel', 'im2col', 'per_image', 'per_image_in_groups'])
def implementation(request, monkeypatch):
    """Run the test by each algorithm of dynamic_conv2d in PyTorch, wherever it supports the case."""
    from fmd_timm.ops import im2col, operator, per_image, per_kernel

    in_order = operator.algorithms
    algorithm = {'per_kernel': per_kernel, 'im2col': im2col}.get(request.param, per_image)
    if request.param == 'per_image_in_groups':  # as on other devices than the CPU
        monkeypatch.setattr(per_image, '_is_grouped', lambda case: True)

    def algorithms(question, case):
        return [algorithm] if algorithm.supports(case) else in_order(question, case)

    monkeypatch.setattr(operator, 'algorithms', algorithms)


@pytest.fixture(scope='session', autouse=True)
def hub_server():
    """A Hub in place of huggingface.co for whatever the tests do, themselves or in other processes."""
    with CLIENTS_HOME, HUB:
        yield HUB


@pytest.fixture
def hub(hub_server):
    """An empty Hub, and clients with empty caches."""
    hub_server.clear()
    empty_caches()
    return hub_server


@pytest.fixture
def compiled():
    """For tests of c_conv.c: they fail where there is a compiler and it doesn't compile."""
    if sys.platform != 'linux' or not any(map(shutil.which, ('cc', 'gcc', 'clang'))):
        pytest.skip('c_conv.c is for Linux with a C compiler')
    from fmd_timm.ops import c_conv

    assert c_conv.is_available()


@pytest.fixture
def fresh_accelerator(monkeypatch):
    """For tests that call `train.main` or `_timing.main`: this process goes on with other tests."""
    import _accelerator
    import _measure
    import torch
    import train
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # which _timing sets, and training on CUDA
    monkeypatch.setattr(_accelerator, 'use_all_cores', lambda accelerator: None)
    monkeypatch.setattr(train, 'time_inference', partial(_measure.time_inference, repeats=1))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory):
    """64 digits to train and 50 to validate, as a folder of parquet files."""
    import _dataset

    folder = tmp_path_factory.mktemp('digits')
    digits = _dataset.load_digits()
    digits['train'].select(range(64)).to_parquet(folder / 'train.parquet')
    digits['test'].select(range(50)).to_parquet(folder / 'test.parquet')
    return folder
