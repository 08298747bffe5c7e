"""The operator in plain ATen operations: the same results, found by exporters and by nobody else."""
import pytest
import torch
import torch._decomp
from inputs import SHAPES, make_inputs
from torch._dynamo.testing import EagerAndRecordGraphs

from fmd_timm import FMDConv2d, decompositions
from fmd_timm.ops import decomposition

OPERATOR = torch.ops.fmd_timm.dynamic_conv2d.default
ATTENTION = 'kernel_attn', 'in_attn', 'out_attn', 'tap_attn'


def make_arguments(shape, batch, **kwargs):
    """Of the operator, in its order."""
    tensors, conv_args = make_inputs(batch, *shape[1:], tap_attn=True, **kwargs)
    tensors = [tensors[name].detach() for name in ('x', 'weight', *ATTENTION)]
    pairs = [v if isinstance(v, tuple) else (v, v) for v in map(conv_args.get, ('stride', 'padding', 'dilation'))]
    return [*tensors, *pairs, conv_args['groups']]


@pytest.mark.parametrize('without', [(), ('tap_attn',), ('in_attn', 'out_attn'), ATTENTION], ids=str)
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_computes_the_same(shape, batch, without):
    if 'kernel_attn' in without:
        shape = (shape[0], 1, *shape[2:])
    arguments = make_arguments(shape, batch)
    for n, name in enumerate(ATTENTION, 2):
        if name in without:
            arguments[n] = None
    expected = OPERATOR(*arguments)
    for for_onnxruntime in False, True:
        torch.testing.assert_close(decomposition.decompose(*arguments, for_onnxruntime), expected)


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_a_single_image_without_computed_kernels(shape):
    arguments = make_arguments(shape, 1)
    y = decomposition.decompose(*arguments, computed_kernels=False)
    torch.testing.assert_close(y, OPERATOR(*arguments))


@pytest.mark.parametrize('batch', [1, 3])
def test_a_single_kernel_may_have_a_share_or_factors_of_its_taps(batch):
    for without in [2], [5]:
        arguments = make_arguments(SHAPES['one_kernel'], batch)
        for n in without:
            arguments[n] = None
        torch.testing.assert_close(decomposition.decompose(*arguments), OPERATOR(*arguments))


@pytest.mark.parametrize('batch', [1, 3])
def test_images_keep_their_dtype_and_layout(batch):
    arguments = make_arguments(SHAPES['3x3'], batch, dtype=torch.float32)
    arguments[0] = arguments[0].half().to(memory_format=torch.channels_last)
    y, expected = decomposition.decompose(*arguments), OPERATOR(*arguments)
    assert y.dtype == torch.float16 and y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_a_single_image_is_one_convolution_and_any_batch_a_product_of_matrices():
    any_batch = {0: torch.export.Dim.DYNAMIC},
    for batch, shapes, computed, convolution in (
            (1, None, True, True), (2, any_batch, True, False), (1, None, False, False)):
        program = torch.export.export(make_layer(), (torch.randn(batch, 4, 9, 9),), dynamic_shapes=shapes)
        called = {node.target for node in program.run_decompositions(decompositions(computed)).graph.nodes}
        assert (torch.ops.aten.convolution.default in called) == convolution
        assert (torch.ops.aten.bmm.default in called) != convolution


@pytest.mark.parametrize('batch, computed_kernels, count', [(1, True, 1), (1, False, 3), (2, True, 3)])
def test_a_depthwise_layer_is_as_many_convolutions_as_kernels(batch, computed_kernels, count):
    layer = FMDConv2d(4, 4, 3, padding=1, groups=4, num_kernels=3).eval()
    shapes = None if batch == 1 else ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(layer, (torch.randn(batch, 4, 9, 9),), dynamic_shapes=shapes)
    called = [node.target for node in program.run_decompositions(decompositions(computed_kernels)).graph.nodes]
    assert called.count(torch.ops.aten.convolution.default) == count
    assert torch.ops.aten.bmm.default not in called


def make_layer():
    torch.manual_seed(0)
    return FMDConv2d(4, 6, 3, stride=2, padding=1).eval()


@torch.no_grad()
def test_an_exported_program_keeps_the_operator_until_it_is_taken_out():
    any_size = {n: torch.export.Dim.DYNAMIC for n in (0, 2, 3)}
    layer, x = make_layer(), torch.randn(2, 4, 9, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=(any_size,))
    without = program.run_decompositions(decompositions())
    assert OPERATOR in {node.target for node in program.run_decompositions().graph.nodes}
    assert not [node for node in without.graph.nodes if 'fmd_timm' in str(node.target)]
    for size in (1, 4, 9, 8), (5, 4, 12, 7):
        x = torch.randn(size)
        torch.testing.assert_close(without.module()(x), layer(x))


@torch.no_grad()
def test_compiled_networks_keep_the_operator(monkeypatch):
    calls, registered = [], torch._decomp.decomposition_table[OPERATOR]
    monkeypatch.setitem(
        torch._decomp.decomposition_table, OPERATOR, lambda *args: calls.append(args) or registered(*args))
    torch._dynamo.reset()
    layer, backend = make_layer(), EagerAndRecordGraphs()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    inductor = torch.compile(layer, fullgraph=True, dynamic=True, backend='aot_eager_decomp_partition')
    for batch, size in (2, 9), (3, 12):
        x = torch.randn(batch, 4, size, size)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(inductor(x), layer(x))
    assert 'fmd_timm.dynamic_conv2d' in backend.graphs[0].code
    assert not calls  # nor for the size of a result, which tensors without memory ask for


def test_a_version_of_torch_with_another_table_is_named(monkeypatch):
    monkeypatch.delattr(torch._decomp, 'register_decomposition')
    with pytest.warns(UserWarning, match='has another table of decompositions .*fmd_timm.decompositions'):
        decomposition.register()
