import pytest

import fmd_timm.ops


@pytest.fixture(params=['reference', 'dense'])
def implementation(request, monkeypatch):
    """Run the test with each implementation of dynamic_conv2d wherever that one applies."""
    monkeypatch.setattr(fmd_timm.ops, '_prefers_dense', lambda batch, out_pixels: request.param == 'dense')
