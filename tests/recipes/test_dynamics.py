"""recipes/_dynamics.py: what is said of a network's attention is what a direct computation gives."""
import math

import _dynamics
import pytest
import timm
import torch
from _data import LabelledImages
from _dataset import load_digits
from _dynamics import averaged, entropy, summarized, watched
from _loaders import Normalize
from torchvision.transforms import v2

from fmd_timm import CondConv2d, DyConv2d, FMDConv2d, ODConv2d, make_dynamic


def small(layer, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model('resnet10t', num_classes=3, zero_init_last=False)
    make_dynamic(model, layer, **kwargs)
    return model.eval()


def test_entropy_is_1_for_equal_shares_and_0_for_one_kernel():
    shares = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]).double()
    assert entropy(shares).tolist() == pytest.approx([1, 0, math.log(2) / math.log(4)])
    assert entropy(3 * shares).tolist() == pytest.approx(entropy(shares).tolist())  # CondConv's do not sum to 1


@pytest.mark.parametrize('layer', [CondConv2d, DyConv2d, FMDConv2d, ODConv2d])
def test_statistics_over_batches_are_those_over_all_images(layer):
    model = small(layer)
    images = torch.randn(12, 3, 32, 32)
    seen = []
    name, conv = next((name, module) for name, module in model.named_modules() if isinstance(module, layer))
    hook = conv.attention.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.inference_mode(), watched(model) as statistics:
        for batch in images.split(5):
            model(batch)
    hook.remove()
    kernel_attn, *gates = [None if attn[0] is None else torch.cat(attn).double() for attn in zip(*seen)]
    layer_statistics, mean_attn = statistics[name], kernel_attn.mean(0, keepdim=True)
    assert layer_statistics.images == 12
    assert layer_statistics.kernel_entropy() == pytest.approx(entropy(kernel_attn).mean().item(), abs=1e-9)
    assert layer_statistics.usage_entropy() == pytest.approx(entropy(mean_attn).item(), abs=1e-9)
    assert layer_statistics.usage_entropy() >= layer_statistics.kernel_entropy()
    gates = [gate for gate in gates if gate is not None]
    expected = torch.cat(gates, 1).std(0, unbiased=False).mean().item() if gates else None
    assert layer_statistics.gate_std() == (pytest.approx(expected, rel=1e-4) if gates else None)
    kernels = conv.weight.unflatten(0, (conv.num_kernels, -1))
    distance = (kernels - kernels.mean(0)).flatten(1).norm(dim=1).mean() / kernels.mean(0).norm()
    assert layer_statistics.kernel_distance() == pytest.approx(distance.item(), rel=1e-5)
    unsaid = [name for name, number in summarized(statistics).items() if number is None]
    assert unsaid == ([] if gates else ['gate_std'])


def test_an_averaged_network_is_static_and_is_dynamic_again_afterwards():
    model = small(FMDConv2d)
    images = torch.randn(6, 3, 32, 32)
    with torch.inference_mode():
        with watched(model) as statistics:
            expected = model(images)
        with averaged(statistics):
            replaced = model(images)
            with watched(model) as constant:
                model(images)
        with averaged(statistics, kernels_only=True), watched(model) as gated:
            model(images)
        again = model(images)
    assert torch.equal(again, expected) and not torch.allclose(replaced, expected, atol=1e-4)
    assert all(layer.gate_std() < 1e-6 for layer in constant.values())
    assert any(layer.gate_std() > 1e-3 for layer in gated.values())
    assert [layer.usage_entropy() for layer in gated.values()] == pytest.approx(
        [layer.kernel_entropy() for layer in gated.values()], abs=1e-6)


def test_one_kernel_has_no_entropy_and_a_static_network_has_nothing():
    model = small(FMDConv2d, num_kernels=1)
    with torch.inference_mode(), watched(model) as statistics:
        model(torch.randn(2, 3, 32, 32))
    assert next(iter(statistics.values())).kernel_entropy() is None
    assert summarized(statistics)['kernel_entropy'] is None and summarized(statistics)['gate_std'] > 0
    with watched(timm.create_model('resnet10t')) as statistics:
        assert statistics == {} and set(summarized(statistics).values()) == {None}


def test_a_record_sums_up_the_images_as_they_are_validated(monkeypatch):
    images = LabelledImages(load_digits()['test'], 'test', 'digits', transform=v2.Resize((32, 32)))
    normalize = Normalize((0.5,) * 3, (0.25,) * 3)
    model = small(FMDConv2d)
    monkeypatch.setattr(_dynamics, 'MOST_IMAGES', 20)
    places = images.sample(20)
    with torch.inference_mode(), watched(model) as statistics:
        model(normalize(torch.stack([images[place][0] for place in places])))
    observed = _dynamics.observe(model, images, normalize, batch=8)
    assert summarized(observed) == pytest.approx(summarized(statistics), rel=1e-4)
    means = _dynamics.kernel_means(observed)
    assert means.keys() == statistics.keys()
    for name, layer in statistics.items():
        assert means[name] == pytest.approx(layer.means()[0][0].tolist(), rel=1e-4)
    static = timm.create_model('resnet10t', num_classes=3)
    assert set(summarized(_dynamics.observe(static, images, normalize, batch=8)).values()) == {None}
