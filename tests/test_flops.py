"""Counters of FLOPs agree: PyTorch's, and where they are installed fvcore and thop."""
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from fmd_timm import flops, prepare_for_inference


@pytest.fixture(params=['', 'prepared'])
def model(request):
    model = timm.create_model('resnet18_od', channels=(8, 8, 8, 16), layers=(1, 1, 1, 1), num_classes=5).eval()
    return prepare_for_inference(model) if request.param else model


@torch.no_grad()
def macs_by_pytorch(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def test_fvcore(model):
    fvcore = pytest.importorskip('fvcore.nn')
    x = torch.randn(2, 3, 64, 64)
    counted = fvcore.FlopCountAnalysis(model, x).set_op_handle(**flops.FVCORE_HANDLES)
    others = 'batch_norm', 'adaptive_avg_pool2d'  # which PyTorch does not count
    assert sum(n for name, n in counted.by_operator().items() if name not in others) == macs_by_pytorch(model, x)


def test_thop(model):
    thop = pytest.importorskip('thop')
    x = torch.randn(2, 3, 64, 64)
    expected = macs_by_pytorch(model, x)
    _, _, layers = thop.profile(model, inputs=(x,), custom_ops=flops.THOP_OPS, verbose=False, ret_layer_info=True)
    block = layers['layer1'][2]['0'][2]
    conv = model.layer1[0].conv1
    assert block['conv1'][0] == macs_by_pytorch(conv, torch.randn(2, 64, 16, 16))
    total, _ = thop.profile(model, inputs=(x,), custom_ops=flops.THOP_OPS, verbose=False)
    assert total == pytest.approx(expected, rel=0.05)  # with BatchNorms and pooling
