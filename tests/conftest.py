import os

# Tensors are small here: more threads would only wait for each other, on a busy machine for long.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest  # noqa: E402

import fmd_timm.ops  # noqa: E402


@pytest.fixture(params=['reference', 'dense'])
def implementation(request, monkeypatch):
    """Run the test with each implementation of dynamic_conv2d wherever that one applies."""
    monkeypatch.setattr(fmd_timm.ops, '_prefers_dense', lambda batch, out_pixels: request.param == 'dense')
