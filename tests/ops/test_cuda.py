"""What runs on CUDA: the order of the algorithms, and Triton only where its first results were right.

Without a GPU its name and capability are pretended, and the convolution in Triton is replaced.
"""
import logging
import subprocess
import warnings
from pathlib import Path

import processes
import pytest
import torch
from cases import assert_near, make_inputs, run, run_reference

from fmd_timm import dynamic_conv2d
from fmd_timm.ops import cuda, im2col, operator, per_image, per_kernel, reference, triton_checked
from fmd_timm.ops.case import Attention, Case, case_of
from fmd_timm.ops.triton_checked import TritonConv

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
PLAIN = Case(
    batch=128, num_kernels=4, in_channels=256, out_channels=256, groups=1, image_size=(14, 14), kernel_size=(3, 3),
    stride=(1, 1), padding=(1, 1), dilation=(1, 1), dtype=torch.bfloat16, weight_dtype=torch.float32,
    channels_last=True, weight_channels_last=True, has_in_attn=True, has_out_attn=True, has_tap_attn=False,
    device=torch.device('cuda', 0))
LARGE, LARGEST = dict(image_size=(28, 28)), dict(image_size=(56, 56), in_channels=64, out_channels=64)
POINTWISE = dict(kernel_size=(1, 1), padding=(0, 0))


@pytest.fixture(autouse=True)
def fresh_state():
    def forget():
        cuda.algorithms.cache_clear()
        triton_checked._announce.cache_clear()
        triton_checked._right.clear()

    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch):
    """Pretend one of a capability."""
    def pretend(*capability, hip=None):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
        monkeypatch.setattr(torch.version, 'hip', hip)
        cuda.algorithms.cache_clear()

    pretend(9, 0)
    return pretend


def names(question, **change):
    return [algorithm.__name__.rpartition('.')[2] for algorithm in cuda.algorithms(question, PLAIN._replace(**change))]


@pytest.mark.parametrize('change, expected', [
    (dict(), ['per_kernel', 'per_image']),
    (dict(stride=(2, 2), image_size=(28, 28)), ['per_kernel', 'per_image']),
    (LARGE, ['per_kernel', 'triton_64', 'triton_128']),
    (LARGEST, ['per_kernel', 'triton_64', 'per_image']),
    (dict(LARGE, dtype=torch.float32), ['per_kernel', 'triton_64', 'per_image']),
    (dict(LARGE, dtype=torch.float64), ['per_image']),
    (dict(LARGE, weight_dtype=torch.float64), ['per_image']),
    (dict(POINTWISE), ['per_image', 'per_kernel']),
    (dict(POINTWISE, image_size=(7, 7)), ['per_kernel', 'per_image']),
    (dict(POINTWISE, image_size=(56, 56), stride=(2, 2)), ['per_kernel', 'triton_64', 'triton_128']),
    (dict(has_tap_attn=True), ['per_image', 'triton_64', 'triton_128']),
    (dict(POINTWISE, image_size=(7, 7), has_tap_attn=True), ['per_image']),
    (dict(has_tap_attn=True, in_channels=12, out_channels=12), ['per_image', 'im2col']),
    (dict(num_kernels=1, **LARGE), ['per_kernel']),
    (dict(num_kernels=1, has_tap_attn=True), ['per_image', 'triton_64', 'triton_128']),
    (dict(batch=1, **LARGE), ['per_image', 'per_kernel']),
    (dict(batch=1, has_tap_attn=True), ['per_image']),
    (dict(groups=256, **LARGE), ['per_image']),
    (dict(groups=2, **LARGE), ['per_image']),
    (dict(num_kernels=9, **LARGE), ['per_kernel', 'per_image']),
    (dict(LARGE, in_channels=255), ['per_kernel', 'per_image']),
    (dict(LARGE, out_channels=12), ['per_kernel', 'per_image']),
    (dict(image_size=(2**15, 2**15), batch=2), ['per_kernel', 'per_image']),  # offsets in an image beyond 32 bits
], ids=str)
def test_the_order(change, expected, gpu):
    assert names('forward', **change) == expected
    assert names('prepared', **change) == expected


def test_a_tile_is_not_wider_than_what_it_makes(gpu):
    assert 'triton_128' not in names('forward', **LARGE, out_channels=64)
    assert 'triton_128' in names('backward', **LARGE, out_channels=64)
    assert 'triton_128' not in names('backward', **LARGE, in_channels=64)


@pytest.mark.parametrize('question', ['forward', 'backward'])
@pytest.mark.parametrize('change', [{}, LARGE, LARGEST, POINTWISE, dict(has_tap_attn=True), dict(groups=2)], ids=str)
def test_the_first_is_always_plain_pytorch_and_there_are_at_most_three(question, change, gpu):
    algorithms = cuda.algorithms(question, PLAIN._replace(**change))
    assert algorithms[0] in (per_kernel, per_image, im2col)
    assert len(algorithms) <= 3
    assert all(hasattr(algorithm, question) for algorithm in algorithms)


@pytest.mark.parametrize('capability, hip, expected', [
    ((7, 5), None, False), ((8, 0), None, True), ((8, 6), None, True), ((12, 0), None, True), ((9, 4), '6.2', False)])
def test_triton_is_only_for_ampere_and_later_of_nvidia(capability, hip, expected, gpu):
    gpu(*capability, hip=hip)
    assert ('triton_64' in names('forward', **LARGE)) == expected


def inputs(taps=False, channels=8, size=6):
    """grad_y, x, weight, attention, case"""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, size, size), torch.randn(2 * channels, 8, 3, 3)
    attention = Attention(
        torch.rand(3, 2), torch.rand(3, 8), torch.rand(3, channels), torch.rand(3, 9) if taps else None)
    case = case_of(x, weight, attention, (1, 1), (1, 1), (1, 1), 1)
    return torch.randn(3, channels, size, size), x, weight, attention, case


@pytest.fixture
def triton_conv(monkeypatch):
    """A convolution 'in Triton' that is right, to be spoiled."""
    pytest.importorskip('triton')
    from fmd_timm.ops import triton_conv

    def image_gradient(grad_y, x, weight, attention, case, channels):
        grad_x, _, gradients = per_image.backward(grad_y, x, weight, attention, case)
        return grad_x, gradients.in_attn

    monkeypatch.setattr(triton_conv, 'forward', lambda *arguments: reference.forward(*arguments[:-1]))
    monkeypatch.setattr(triton_conv, 'image_gradient', image_gradient)
    monkeypatch.setattr(triton_conv, 'backward', lambda *arguments: per_image.backward(*arguments[:-1]))
    return triton_conv


class Fallback:
    forward, backward = staticmethod(lambda *a: 'fallback'), staticmethod(lambda *a: 'fallback')


def run_both(tile, case_inputs):
    return tile.forward(*case_inputs[1:]), tile.backward(*case_inputs)


def test_what_was_right_runs_in_triton_without_a_warning(triton_conv, monkeypatch):
    tile, case_inputs = TritonConv(64, Fallback), inputs()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run_both(tile, case_inputs)
        monkeypatch.setattr(triton_conv, 'forward', lambda *arguments: 'triton')
        monkeypatch.setattr(triton_conv, 'backward', lambda *arguments: 'triton')
        assert run_both(tile, case_inputs) == ('triton', 'triton')  # and is not checked again


def spoil(triton_conv, monkeypatch, what, change):
    right = getattr(triton_conv, what)
    monkeypatch.setattr(triton_conv, what, lambda *arguments: change(right(*arguments)))


@pytest.mark.parametrize('what, change, message', [
    ('forward', lambda y: y * 1.001, 'the result is off by 1.0e-03'),
    ('forward', lambda y: y.index_fill(3, torch.tensor([5]), float('nan')), 'the result is off by nan'),
    ('image_gradient', lambda g: (g[0] + 1e-2, g[1]), 'the gradient of x is off'),
    ('image_gradient', lambda g: (g[0], g[1].flip(0)), 'the gradient of in_attn is off'),
])
def test_wrong_numbers_are_not_used_and_warned_of_once(triton_conv, monkeypatch, what, change, message):
    spoil(triton_conv, monkeypatch, what, change)
    with pytest.warns(UserWarning, match=f'triton_64 .*{message}.*for Case.*num_kernels=2, in_channels=8,') as caught:
        for _ in range(2):
            assert run_both(TritonConv(64, Fallback), inputs()) == ('fallback', 'fallback')
    assert len(caught) == 1


def test_another_configuration_is_checked_for_itself(triton_conv, monkeypatch):
    right = triton_conv.forward
    monkeypatch.setattr(triton_conv, 'forward', lambda *arguments: right(*arguments) * (128 // arguments[-1]))
    with pytest.warns(UserWarning, match='triton_64'):
        assert run_both(TritonConv(64, Fallback), inputs()) == ('fallback', 'fallback')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'fallback' not in run_both(TritonConv(128, Fallback), inputs())
        monkeypatch.setattr(triton_conv, 'forward', right)
        assert 'fallback' not in run_both(TritonConv(64, Fallback), inputs(channels=16))


def test_another_batch_is_not_checked_again(triton_conv, monkeypatch):
    tile, case = TritonConv(64, Fallback), inputs()[-1]
    assert tile.is_right(case)
    monkeypatch.setattr(triton_checked, '_reason_against', None)
    assert tile.is_right(case._replace(batch=7, channels_last=True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_may_be_off_as_far_as_it_rounds(dtype, triton_conv, monkeypatch):
    case = inputs()[-1]._replace(dtype=dtype)
    assert TritonConv(64, Fallback).is_right(case)
    spoil(triton_conv, monkeypatch, 'forward', lambda y: y * 1.05)
    with pytest.warns(UserWarning, match='the result is off by 5'):
        assert not TritonConv(128, Fallback).is_right(case)


def errors():
    pytest.importorskip('triton')
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    return [
        CompilationError(None, None, 'a message'), OutOfResources(9, 8, 'shared memory'), PTXASError('a message'),
        subprocess.CalledProcessError(1, 'gcc'), FileNotFoundError('gcc'),
        RuntimeError('Failed to find C compiler. Please specify via CC environment variable.'),
        RuntimeError('PassManager::run failed'), RuntimeError('Cannot find ptxas'),
    ]


@pytest.mark.parametrize('what', ['forward', 'image_gradient'])
@pytest.mark.parametrize('number', range(8))
def test_what_does_not_compile_runs_in_pytorch_with_one_warning(number, what, triton_conv, monkeypatch):
    error = errors()[number]
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise error

    monkeypatch.setattr(triton_conv, what, fail)
    with pytest.warns(UserWarning, match=f'Triton fails.*{str(error)[:9]}') as caught:
        for _ in range(2):
            assert run_both(TritonConv(64, Fallback), inputs()) == ('fallback', 'fallback')
    assert len(caught) == len(calls) == 1


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('full'), torch.AcceleratorError('illegal access'),
    RuntimeError('Triton Error [CUDA]: an illegal memory access was encountered'), KeyboardInterrupt(), TypeError('x'),
], ids=repr)
def test_an_error_that_is_not_of_the_compiler_is_not_hidden_and_proves_nothing(error, triton_conv, monkeypatch):
    def fail(*arguments):
        raise error

    with monkeypatch.context() as broken, warnings.catch_warnings():
        warnings.simplefilter('error')
        broken.setattr(triton_conv, 'forward', fail)
        with pytest.raises(type(error)):
            TritonConv(64, Fallback).forward(*inputs()[1:])
    assert 'fallback' not in run_both(TritonConv(64, Fallback), inputs())


def test_while_a_graph_is_captured_nothing_is_checked(triton_conv, monkeypatch, gpu):
    case = inputs()[-1]._replace(device=torch.device('cuda', 0))
    with monkeypatch.context() as capturing, warnings.catch_warnings():
        warnings.simplefilter('error')
        capturing.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        capturing.setattr(triton_checked, '_reason_against', None)
        assert not TritonConv(64, Fallback).is_right(case)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(triton_checked, '_reason_against', lambda channels, case: None)
    assert TritonConv(64, Fallback).is_right(case)  # it was not held against it
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        assert TritonConv(64, Fallback).is_right(case)


def test_the_check_leaves_random_numbers_alone(triton_conv):
    case = inputs()[-1]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert TritonConv(64, Fallback).is_right(case)
    assert torch.equal(torch.rand(4), expected)


def test_one_line_is_said_before_the_first_compilation(triton_conv, caplog):
    with caplog.at_level(logging.WARNING):
        for channels in 64, 128:
            assert TritonConv(channels, Fallback).is_right(inputs()[-1])
    assert [record.message for record in caplog.records] == [
        'dynamic_conv2d: compiling Triton kernels, a few seconds for each kind of layer']


def falls_back_without_triton():
    case_inputs = inputs()
    with pytest.warns(UserWarning, match='Triton is missing') as caught:
        for _ in range(2):
            assert run_both(TritonConv(64, Fallback), case_inputs) == ('fallback', 'fallback')
    assert len(caught) == 1


@pytest.mark.slow
def test_without_triton_pytorch_runs_with_one_warning():
    script = 'import sys; sys.modules["triton"] = None; import test_cuda; test_cuda.falls_back_without_triton()'
    done = processes.run('-c', script, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_triton_is_not_imported_before_it_is_tried():
    script = (
        'import sys, torch, test_cuda\n'
        'torch.cuda.get_device_capability = lambda device: (9, 0)\n'
        'assert "triton_64" in test_cuda.names("forward", **test_cuda.LARGE)\n'
        'assert "fmd_timm.ops.triton_conv" not in sys.modules\n'
    )
    done = processes.run('-c', script, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


def test_the_operator_asks_for_this_order(gpu):
    for question in 'forward', 'backward':
        assert operator.algorithms(question, PLAIN) is cuda.algorithms(question, PLAIN)


LAYERS = {  # B, K, I, O, kernel, stride, padding, dilation, (H, W); whether it has taps: one for each order
    'large': ((2, 4, 8, 16, 3, 1, 1, 1, (28, 28)), False),
    'small': ((3, 4, 8, 16, 3, 2, 1, 1, (14, 14)), False),
    'pointwise': ((3, 4, 8, 16, 1, 1, 0, 1, (14, 14)), False),
    'taps': ((3, 4, 16, 8, 3, 1, 1, 1, (5, 5)), True),
    'odd_taps': ((3, 2, 5, 7, 3, 1, 1, 1, (6, 6)), True),
    'one_kernel': ((3, 1, 8, 16, 3, 1, 1, 1, (6, 6)), False),
    'one_image': ((1, 4, 8, 16, 3, 1, 1, 1, (6, 6)), False),
}
DEVICE = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # float32 may be multiplied as TF32


def layer_inputs(layer, dtype=torch.bfloat16):
    """x, weight, attention and case, on the GPU if there is one."""
    shape, has_taps = LAYERS[layer]
    inputs = make_inputs(
        *shape, dtype=dtype, weight_dtype=torch.float32, without=() if has_taps else ('tap_attn',), device=DEVICE)
    x = inputs[0].to(memory_format=torch.channels_last)
    return x, *inputs[1:3], inputs[3]._replace(channels_last=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('layer', LAYERS)
def test_each_algorithm_of_the_order_is_right(layer, dtype, gpu):
    x, weight, attention, case = layer_inputs(layer, dtype)
    exact = run_reference(x, weight, attention, case)
    for question in 'forward', 'backward':
        for algorithm in cuda.algorithms(question, case._replace(device=torch.device('cuda', 0))):
            if DEVICE.type == 'cuda' or not isinstance(algorithm, TritonConv):  # test_triton.py has an interpreter
                assert_near(run(algorithm, x, weight, attention, case), exact, TOLERANCES[dtype])


def step(x, weight, attention, case):
    """The operator's result and the gradients of all tensors."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, weight, *attention)]
    y = dynamic_conv2d(*leaves, stride=case.stride, padding=case.padding)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), [t for t in leaves if t is not None])


def assert_same(found, expected):
    assert_near(dict(enumerate(found)), dict(enumerate(t.double() for t in expected)), TOLERANCES[torch.bfloat16])


@needs_gpu
@pytest.mark.parametrize('layer', LAYERS)
def test_untimed_results_repeat_bit_for_bit(layer):
    inputs = layer_inputs(layer)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        first, second = step(*inputs), step(*inputs)
    assert all(map(torch.equal, first, second))


@needs_gpu
@pytest.mark.parametrize('benchmark', [False, True], ids=['ordered', 'timed'])
@pytest.mark.parametrize('layer', LAYERS)
def test_a_captured_graph_gives_what_eager_gives(layer, benchmark):
    inputs = layer_inputs(layer)
    with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
        eager = step(*inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(*inputs)
        graph.replay()
    assert_same(captured, eager)


@needs_gpu
@pytest.mark.parametrize('layer', LAYERS)
def test_compiled_with_graphs_it_gives_what_eager_gives(layer):
    x, weight, attention, case = layer_inputs(layer)

    def convolve(*tensors):
        return dynamic_conv2d(*tensors, stride=case.stride, padding=case.padding)

    compiled = torch.compile(convolve, mode='reduce-overhead')
    for _ in range(3):  # recorded in the second, replayed in the third
        found = compiled(x, weight, *attention).clone()
    assert_same([found], [convolve(x, weight, *attention)])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='one GPU or none')
@pytest.mark.parametrize('layer', LAYERS)
def test_it_runs_on_a_gpu_that_is_not_the_current_one(layer):
    x, weight, attention, case = layer_inputs(layer)
    there = Attention(*(t if t is None else t.to('cuda:1') for t in attention))
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        found = step(x.to('cuda:1'), weight.to('cuda:1'), there, case)
    assert all(t.device.index == 1 for t in found)
    assert_same([t.to(DEVICE) for t in found], step(x, weight, attention, case))


@needs_gpu
@pytest.mark.parametrize('layer', LAYERS)
def test_an_odd_address_gives_the_same_numbers(layer):
    x, *others = layer_inputs(layer)
    pixels = x.permute(0, 2, 3, 1)
    shifted = torch.cat([x.new_zeros(1), pixels.flatten()])[1:].view(pixels.shape).permute(0, 3, 1, 2)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        assert_same(step(shifted, *others), step(x, *others))
