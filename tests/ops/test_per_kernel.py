"""All K kernels in one convolution: both of its forms against the reference in float64."""
import pytest
import torch

from fmd_timm.ops import per_kernel, reference
from fmd_timm.ops.case import Attention, case_of

SHAPES = {  # B, K, I, O, kernel, stride, padding, dilation, groups, (H, W): images or results are the smaller ones
    'same_size': (3, 4, 6, 6, 3, 1, 1, 1, 1, (5, 4)),
    'wide_results': (8, 2, 2, 9, 1, 1, 0, 1, 1, (6, 5)),
    'small_results': (2, 3, 6, 4, 3, 2, 1, 1, 1, (8, 5)),
    'dilation': (2, 2, 4, 6, 3, 1, 2, 2, 1, (7, 6)),
    'uneven': (2, 2, 3, 4, (1, 3), (2, 1), (0, 1), 1, 1, (5, 6)),
    'one_kernel': (2, 1, 4, 6, 3, 1, 1, 1, 1, (5, 5)),
    'one_kernel_in_groups': (2, 1, 4, 6, 3, 2, 1, 1, 2, (5, 5)),
    'one_image': (1, 4, 5, 7, 3, 1, 1, 1, 1, (1, 2)),
}
WITHOUT = [(), ('kernel_attn',), ('in_attn',), ('out_attn',), ('in_attn', 'out_attn'), Attention._fields]


def pair(value):
    return value if isinstance(value, tuple) else (value, value)


def make_inputs(B, K, I, O, kernel, stride, padding, dilation, groups, size, dtype=torch.float64, without=()):
    """x, weight, attention, case"""
    generator = torch.Generator().manual_seed(0)
    K = 1 if 'kernel_attn' in without else K

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    gates = dict(kernel_attn=normal(B, K).softmax(1), in_attn=normal(B, I).sigmoid(), out_attn=normal(B, O).sigmoid())
    attention = Attention(**{name: None if name in without else gate for name, gate in gates.items()})
    x, weight = normal(B, I, *size), normal(K * O, I // groups, *pair(kernel))
    return x, weight, attention, case_of(x, weight, attention, *map(pair, (stride, padding, dilation)), groups)


def results(algorithm, x, weight, attention, case):
    """The result and the gradients, by name."""
    y = algorithm.forward(x, weight, attention, case)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grad_x, grad_weight, gradients = algorithm.backward(grad_y, x, weight, attention, case)
    return dict(y=y, x=grad_x, weight=grad_weight, **gradients._asdict())


def in_double(x, weight, attention, case):
    attention = Attention(*(t if t is None else t.double() for t in attention))
    return x.double(), weight.double(), attention, case._replace(dtype=torch.float64, weight_dtype=torch.float64)


@pytest.mark.parametrize('without', WITHOUT, ids=lambda names: '-'.join(names) or 'all')
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_result_and_gradients_are_those_of_the_reference(shape, without):
    inputs = make_inputs(*shape, without=without)
    assert per_kernel.supports(inputs[3])
    expected = results(reference, *inputs)
    for name, got in results(per_kernel, *inputs).items():
        torch.testing.assert_close(got, expected[name], msg=lambda text, name=name: f'{name}: {text}')


class Differentiated(torch.autograd.Function):
    """per_kernel with its own gradients."""
    @staticmethod
    def forward(ctx, case, x, weight, *attention):
        ctx.case = case
        ctx.save_for_backward(x, weight, *attention)
        return per_kernel.forward(x, weight, Attention(*attention), case)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, *attention = ctx.saved_tensors
        grad_x, grad_weight, gradients = per_kernel.backward(grad_y, x, weight, Attention(*attention), ctx.case)
        return None, grad_x, grad_weight, *gradients


@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_result(shape):
    x, weight, attention, case = make_inputs(*shape)
    tensors = tuple(t if t is None else t.requires_grad_() for t in (x, weight, *attention))
    assert torch.autograd.gradcheck(lambda *values: Differentiated.apply(case, *values), tensors, fast_mode=True)


@pytest.mark.parametrize('form', ['_backward_by_images', '_backward_by_results'])
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_both_forms_of_the_gradients_are_right_whatever_is_smaller(shape, form, monkeypatch):
    inputs = make_inputs(*shape)
    expected = results(reference, *inputs)
    monkeypatch.setattr(per_kernel, 'backward', getattr(per_kernel, form))
    for name, got in results(per_kernel, *inputs).items():
        torch.testing.assert_close(got, expected[name], msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('shape, images, gradients_by', [
    # B, K, I, O, kernel, pixels a side and stride of layers of a ResNet-18 and a ResNet-50
    ((128, 4, 512, 512, 3, 7, 1), True, '_backward_by_results'),
    ((128, 4, 512, 2048, 1, 7, 1), True, '_backward_by_images'),
    ((128, 4, 256, 512, 3, 14, 2), False, '_backward_by_results'),
    ((128, 4, 512, 64, 1, 7, 1), False, '_backward_by_results'),
    ((64, 4, 512, 512, 1, 1, 1), False, '_backward_by_results'),  # to lay out the kernels anew costs more than they do
], ids=str)
def test_the_form_is_the_one_that_moves_less(shape, images, gradients_by, monkeypatch):
    B, K, I, O, kernel, size, stride = shape
    x, weight = torch.empty(B, I, size, size, device='meta'), torch.empty(K * O, I, kernel, kernel, device='meta')
    attention = Attention(*(torch.empty(B, size, device='meta') for size in (K, I, O)))
    case = case_of(x, weight, attention, *map(pair, (stride, kernel // 2, 1)), 1)
    found = []
    convolve = per_kernel._convolve
    monkeypatch.setattr(per_kernel, '_convolve', lambda x, w, case: found.append(x.shape[1]) or convolve(x, w, case))
    y = per_kernel.forward(x, weight, attention, case)
    assert found == [K * I if images else I]
    monkeypatch.setattr(per_kernel, gradients_by, lambda *arguments: gradients_by)
    assert per_kernel.backward(y, x, weight, attention, case) == gradients_by


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize('weight_dtype', [None, torch.float32], ids=['', 'float32_kernels'])
@pytest.mark.parametrize('shape', ['same_size', 'wide_results', 'small_results', 'one_kernel'])
def test_other_dtypes(shape, dtype, weight_dtype, tolerance):
    x, weight, attention, case = make_inputs(*SHAPES[shape], dtype=weight_dtype or dtype)
    x, case = x.to(dtype), case._replace(dtype=dtype)
    exact = results(reference, *in_double(x, weight, attention, case))
    for name, got in results(per_kernel, x, weight, attention, case).items():
        if exact[name] is None:
            assert got is None
            continue
        error = (got.double() - exact[name]).norm() / exact[name].norm()
        assert error < tolerance, f'{name} is off by {error:.1e}'  # NaN too fails
        assert name not in ('y', 'x') or got.dtype == dtype


@pytest.mark.parametrize('channels_last', [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize('shape', ['same_size', 'wide_results', 'small_results', 'one_kernel_in_groups'])
def test_any_memory_format_gives_the_same_numbers(shape, channels_last):
    x, weight, attention, case = make_inputs(*SHAPES[shape])
    expected = results(per_kernel, x, weight, attention, case)
    x, weight = (
        t.contiguous(memory_format=torch.channels_last) if last else t for t, last in zip((x, weight), channels_last))
    case = case_of(x, weight, attention, case.stride, case.padding, case.dilation, case.groups)
    for name, got in results(per_kernel, x, weight, attention, case).items():
        torch.testing.assert_close(got, expected[name])


def test_channels_last_images_are_not_copied_into_another_format():
    x, weight, attention, case = make_inputs(*SHAPES['same_size'])
    x = x.contiguous(memory_format=torch.channels_last)
    multiplied = per_kernel._multiplied(x, attention.kernel_attn, attention.in_attn)
    assert multiplied.is_contiguous(memory_format=torch.channels_last)
    assert per_kernel.forward(x, weight, attention, case).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('shape', ['same_size', 'wide_results'])
def test_without_out_attn_the_gradients_convolve_nothing_again(shape, monkeypatch):
    x, weight, attention, case = make_inputs(*SHAPES[shape], without=('out_attn',))
    grad_y = torch.ones(case.batch, case.out_channels, *case.output_size, dtype=x.dtype)
    monkeypatch.setattr(per_kernel, '_convolve', None)
    per_kernel.backward(grad_y, x, weight, attention, case)


def test_a_plain_convolution_multiplies_no_image(monkeypatch):
    x, weight, attention, case = make_inputs(*SHAPES['one_kernel'], without=Attention._fields)
    assert per_kernel._multiplied(x, None, None) is x
    expected = torch.nn.functional.conv2d(x, weight, padding=1)
    torch.testing.assert_close(per_kernel.forward(x, weight, attention, case), expected)


@pytest.mark.parametrize('change, supported', [
    ({}, True), (dict(has_tap_attn=True), False), (dict(groups=2), False), (dict(groups=2, num_kernels=1), True)],
    ids=str)
def test_what_it_supports(change, supported):
    *_, case = make_inputs(*SHAPES['same_size'])
    assert per_kernel.supports(case._replace(**change)) == supported
