"""Networks leave PyTorch by its own calls and timm's: onnxruntime computes what they do, for any batch and image size.

All BatchNorms have random weights and statistics: those of a new residual branch are zero, behind which a wrong kernel
would not show.
"""
import copy
from functools import partial

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from test_inference import METHODS, randomize
from timm.utils.onnx import onnx_export

from fmd_timm import CondConv2d, FMDConv2d, ODConv2d, decompositions, inflate, make_dynamic, prepare_for_inference

TOLERANCES = {torch.float32: 2e-6, torch.float16: 5e-3}  # of the largest output
EXPORTERS = {'dynamo': True, 'torchscript': False}
NARROW = dict(channels=(8, 8, 8, 16), layers=(1, 1, 1, 1), num_classes=5, zero_init_last=False)
ANY_SIZE = {0: 'batch', 2: 'height', 3: 'width'}
pytestmark = pytest.mark.filterwarnings('ignore')  # of the exporters: they are many


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def make_layers(method):
    """Full, depthwise, grouped and pointwise, with strides, padding, dilation and a bias."""
    torch.manual_seed(0)
    return randomize(nn.Sequential(
        method(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        method(8, 8, (3, 5), stride=2, padding=(1, 2), groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        method(8, 12, 3, stride=(1, 2), padding=2, dilation=(2, 1), groups=4, num_kernels=3),
        method(12, 10, 1), nn.Flatten(2)))


def make_dynamic_network(name, method, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    make_dynamic(model, method, **kwargs)
    return randomize(model)


def make_named(name, **kwargs):
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **NARROW, **kwargs))


@torch.no_grad()
def assert_same_in_onnxruntime(path, model, sizes, dtype=torch.float32):
    session = onnxruntime.InferenceSession(path)
    for size in sizes:
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = copy.deepcopy(model).double()(x.double())
        y = torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert y.dtype == dtype and y.shape == expected.shape
        error = ((y - expected).abs().max() / expected.abs().max()).item()
        assert error < TOLERANCES[dtype], f'{size}: relative error {error:.1e}'


@pytest.mark.parametrize('exporter, method, prepare', [
    ('torchscript', ODConv2d, False), ('torchscript', FMDConv2d, True),  # the other one takes ten times as long
    *(slow(exporter, method, prepare) for exporter in EXPORTERS for method in METHODS for prepare in (False, True)),
])
def test_layers_of_every_kind_by_the_lines_of_pytorchs_documentation(exporter, method, prepare, tmp_path):
    model, path, x = make_layers(method), tmp_path / 'model.onnx', torch.randn(2, 3, 17, 12)
    exported = prepare_for_inference(model) if prepare else model
    if exporter == 'dynamo':
        torch.onnx.export(exported, (x,), dynamo=True, dynamic_shapes=(ANY_SIZE,)).save(path)
    else:
        torch.onnx.export(exported, (x,), path, dynamo=False, input_names=['x'], dynamic_axes={'x': ANY_SIZE})
    assert_same_in_onnxruntime(path, model, [(1, 3, 17, 12), (2, 3, 17, 12), (5, 3, 30, 33)])


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_a_single_image_of_one_size(exporter, tmp_path):
    model, path = ODConv2d(3, 8, 3, stride=2, padding=1).eval(), tmp_path / 'model.onnx'
    torch.onnx.export(model, (torch.randn(1, 3, 17, 12),), path, dynamo=EXPORTERS[exporter])
    assert_same_in_onnxruntime(path, model, [(1, 3, 17, 12)])


@pytest.mark.slow
def test_a_program_that_was_exported_before(tmp_path):
    model, x, batch = make_layers(FMDConv2d), torch.randn(2, 3, 17, 12), torch.export.Dim('batch')
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    for exported in program, program.run_decompositions(decompositions()):
        torch.onnx.export(exported, (), tmp_path / 'model.onnx')
        assert_same_in_onnxruntime(tmp_path / 'model.onnx', model, [(1, 3, 17, 12), (3, 3, 17, 12)])


NETWORKS = {
    **{name: partial(make_named, name) for name in ('resnet18_cond', 'resnet18_dy', 'resnet18_od', 'resnet18_fmd')},
    'grouped bottlenecks': lambda: make_named('resnet50_fmd', cardinality=4, base_width=64, conv_bias=True),
    'efficientnet': lambda: make_dynamic_network('test_efficientnet', ODConv2d, num_kernels=2),
    'convnext': lambda: make_dynamic_network('test_convnext', CondConv2d),
    'padding of tensorflow': lambda: make_dynamic_network('tf_mobilenetv3_small_minimal_100', FMDConv2d),
    'a single kernel': lambda: make_named('resnet18_od', num_kernels=1),
    'inflated': lambda: randomize(inflate(timm.create_model('test_resnet', num_classes=5))),
}


@pytest.mark.parametrize('exporter, name, prepare, dtype', [
    ('torchscript', 'inflated', False, torch.float32), ('torchscript', 'resnet18_fmd', True, torch.float16),
    *(slow(exporter, name, *kind) for exporter in EXPORTERS for name in NETWORKS
      for kind in ((False, torch.float32), (True, torch.float16))),
], ids=str)
def test_networks_by_timms_own_function(exporter, name, prepare, dtype, tmp_path):
    model, path, is_fixed = NETWORKS[name](), str(tmp_path / 'model.onnx'), name == 'padding of tensorflow'
    exported = prepare_for_inference(model) if prepare else copy.deepcopy(model)
    onnx_export(
        exported.to(dtype), path, torch.randn(1, 3, 64, 64).to(dtype), use_dynamo=EXPORTERS[exporter],
        dynamic_size=not is_fixed)
    size = (64, 64) if is_fixed else (96, 64)
    assert_same_in_onnxruntime(path, model, [(1, 3, 64, 64), (2, 3, 64, 64), (5, 3, *size)], dtype)
