import os

# Tensors are small here: more threads would only wait for each other, on a busy machine for long.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402

import fmd_timm.ops  # noqa: E402


@pytest.fixture(params=['reference', 'dense'])
def implementation(request, monkeypatch):
    """Run the test with each implementation of dynamic_conv2d wherever that one applies."""
    monkeypatch.setattr(fmd_timm.ops, '_prefers_dense', lambda batch, out_pixels: request.param == 'dense')


@pytest.fixture
def fresh_accelerator(monkeypatch):
    """For tests that call `train.main`: this process goes on with other tests."""
    import train
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setattr(train, 'use_all_cores', lambda accelerator: None)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory):
    """64 digits to train and 50 to validate, as a folder of parquet files."""
    import data

    folder = tmp_path_factory.mktemp('digits')
    digits = data.load_digits()
    digits['train'].select(range(64)).to_parquet(folder / 'train.parquet')
    digits['test'].select(range(50)).to_parquet(folder / 'test.parquet')
    return folder
