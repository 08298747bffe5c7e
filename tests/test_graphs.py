"""The networks as graphs: TorchScript, torch.fx, torch.compile and torch.export, for any number of images.

`dynamic_conv2d` picks its implementation by the sizes of the images, so each network here holds layers of both kinds:
of 64x64 pixels, the first stage sees 16x16 pixels and the last ones 8x8 and less.
"""
import io
import pickle
import shutil

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.models import create_feature_extractor, is_notrace_module
from torch._dynamo.testing import CompileCounterWithBackend

from fmd_timm import FMDConv2d, make_dynamic, set_temperature

ONE_BLOCK = 1, 1, 1, 1
NETWORKS = {
    'basic': ('resnet18_fmd', {}),
    'bottleneck': ('resnet50_fmd', dict(layers=ONE_BLOCK)),
    'one_kernel': ('resnet18_fmd', dict(num_kernels=1, layers=ONE_BLOCK)),
    'conv_bias': ('resnet18_fmd', dict(conv_bias=True, layers=ONE_BLOCK)),
}
pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning', 'ignore:.torch.jit:DeprecationWarning')


def make_network(name='resnet18_fmd', **args):
    """A narrow network whose residual branches have an effect, with statistics that are not the initial ones."""
    torch.manual_seed(0)
    narrow = dict(channels=(8, 8, 8, 16), layers=(2, 1, 1, 1), num_classes=5, zero_init_last=False)
    model = timm.create_model(name, **dict(narrow, **args))
    model(torch.randn(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(params=NETWORKS)
def model(request):
    name, args = NETWORKS[request.param]
    return make_network(name, **args)


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def save_and_load(graph, module):
    buffer = io.BytesIO()
    module.save(graph, buffer)
    buffer.seek(0)
    return module.load(buffer)


def gradients_of(model, y):
    model.zero_grad()
    y.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_script_computes_the_same_for_any_images(model):
    scripted = torch.jit.script(model)
    for graph in scripted, save_and_load(scripted, torch.jit):
        for batch, size in (1, 32), (3, 64), (2, 96), (1, 96):
            x = torch.randn(batch, 3, size, size)
            torch.testing.assert_close(graph(x), model(x))


def test_script_trains(model):
    model.double().train()  # rounding in float32 would decide which ReLUs are open
    scripted, x = torch.jit.script(model), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected = gradients_of(model, model(x))
    torch.testing.assert_close(gradients_of(model, scripted(x)), expected)


def test_script_follows_the_temperature_of_its_model(model):
    scripted, x = torch.jit.script(model), torch.randn(2, 3, 64, 64)
    cold = scripted(x)
    set_temperature(model, kernel=30.0, gate=5.0)
    torch.testing.assert_close(scripted(x), model(x))
    assert not torch.allclose(scripted(x), cold)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('name', ['resnet18_cond', 'resnet18_dy', 'resnet18_od', 'resnet18_fmd'])
def test_evaluated_network_can_be_traced_by_torch_fx(name, dtype):
    model = make_network(name, layers=ONE_BLOCK).to(dtype)
    graph = torch.fx.symbolic_trace(model)
    for traced in graph, pickle.loads(pickle.dumps(graph)):
        for batch, size in (1, 32), (3, 64):
            x = torch.randn(batch, 3, size, size, dtype=dtype)
            assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize('args', [dict(num_kernels=1), dict(bias=True), dict(num_kernels=3)], ids=str)
@pytest.mark.parametrize('name', ['test_resnet', 'mobilenetv3_small_050'])
def test_network_made_dynamic_can_be_traced_by_torch_fx(name, args):
    model = timm.create_model(name)
    make_dynamic(model.eval(), **args)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_layer_that_pads_as_tensorflow_can_be_traced_by_torch_fx():
    conv = FMDConv2d.like(Conv2dSame(4, 6, 3, stride=2)).eval()
    graph = torch.fx.symbolic_trace(conv)
    for size in 8, 9:
        x = torch.randn(2, 4, size, size)
        assert torch.equal(graph(x), conv(x))


def test_graph_of_torch_fx_follows_the_temperature_of_its_model():
    model, x = make_network(), torch.randn(2, 3, 64, 64)
    graph = torch.fx.symbolic_trace(model)
    cold = graph(x)
    set_temperature(model, kernel=30.0, gate=5.0)
    assert torch.equal(graph(x), model(x)) and not torch.allclose(graph(x), cold)


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return is_notrace_module(type(module)) or super().is_leaf_module(module, name)


def test_dynamic_convolutions_are_leaves_of_torch_fx(model):
    graph = torch.fx.GraphModule(model, LeafTracer().trace(model))
    leaves = {node.target for node in graph.graph.nodes if node.op == 'call_module'}
    assert leaves >= {name for name, module in model.named_modules() if isinstance(module, FMDConv2d)}
    for batch in 1, 3:
        x = torch.randn(batch, 3, 64, 64)
        torch.testing.assert_close(graph(x), model(x))


def test_feature_extractor_of_timm_finds_the_same_features(model):
    extractor = create_feature_extractor(model, {'layer1': 'first', 'layer4.0.conv2': 'dynamic', 'fc': 'logits'})
    x = torch.randn(2, 3, 64, 64)
    found = {}
    model.layer4[0].conv2.register_forward_hook(lambda module, args, y: found.update(dynamic=y))
    found['logits'] = model(x)
    features = extractor(x)
    torch.testing.assert_close(features['dynamic'], found['dynamic'])
    torch.testing.assert_close(features['logits'], found['logits'])
    assert features['first'].shape[2:] == (16, 16)


def test_network_compiles_once_for_several_images_and_once_for_one():
    model, counter = make_network(layers=ONE_BLOCK).double().train(), CompileCounterWithBackend('eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in 2, 3, 5, 1, 4:
        x = torch.randn(batch, 3, 64, 64, dtype=torch.float64)
        expected = gradients_of(model, model(x))
        torch.testing.assert_close(gradients_of(model, compiled(x)), expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize('size, args, training', [
    (9, {}, True),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (11, dict(num_kernels=1), False),
        (9, {}, False), (11, {}, False), (11, {}, True), (11, dict(num_kernels=1), True))),
])
def test_layer_compiles_with_its_gradients_once_for_several_images(size, args, training):
    conv, counter = FMDConv2d(4, 6, 3, padding=1, **args), CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(conv.train(training), fullgraph=True, dynamic=True, backend=counter)
    compilations = set()
    for batch in 2, 3, 5:
        x = torch.randn(batch, 4, size, size)
        expected = gradients_of(conv, conv(x))
        torch.testing.assert_close(gradients_of(conv, compiled(x)), expected)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1


def test_compiled_layer_follows_the_temperature():
    conv, x = FMDConv2d(4, 6, 3, padding=1).eval(), torch.randn(2, 4, 9, 9)
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(conv, fullgraph=True, backend=counter)
    cold = compiled(x)
    set_temperature(compiled, kernel=30.0, gate=5.0)
    torch.testing.assert_close(compiled(x), conv(x))
    assert not torch.allclose(compiled(x), cold)
    assert counter.frame_count == 1


@pytest.mark.slow  # it compiles C++
@pytest.mark.skipif(not shutil.which('g++'), reason='the default backend of torch.compile needs a C++ compiler')
def test_layer_compiles_with_the_default_backend_once_for_several_images(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    conv = FMDConv2d(4, 6, 3, padding=1).eval()
    compiled = torch.compile(conv, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, stance in (2, 'default'), (3, 'fail_on_recompile'):
            x = torch.randn(batch, 4, 11, 11)
            with torch.compiler.set_stance(stance):
                torch.testing.assert_close(compiled(x), conv(x))


@pytest.mark.parametrize(
    'model', [kind if kind == 'basic' else pytest.param(kind, marks=pytest.mark.slow) for kind in NETWORKS],
    indirect=True)
def test_exported_network_computes_the_same_for_any_batch(model):
    batch = torch.export.Dim('batch')
    program = torch.export.export(model, (torch.randn(3, 3, 64, 64),), dynamic_shapes=({0: batch},))
    for graph in program.module(), save_and_load(program, torch.export).module():
        for batch in 1, 2, 7:
            x = torch.randn(batch, 3, 64, 64)
            torch.testing.assert_close(graph(x), model(x))
