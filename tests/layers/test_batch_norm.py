"""The BatchNorm of the attention is one like the others of a network: what freezes, converts or re-estimates them
reaches it too."""
import copy
import itertools

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch.optim.swa_utils import update_bn
from torchvision.ops import FrozenBatchNorm2d

from fmd_timm import FMDConv2d, ODConv2d, prepare_for_inference
from fmd_timm.layers.attention import PooledBatchNorm

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning', 'ignore:.torch.jit:DeprecationWarning')
with_batch_norm = pytest.mark.parametrize('method', ['od', 'fmd'])


def make_network(method, **kwargs):
    """A narrow network with statistics that are not the initial ones and residual branches that have an effect."""
    torch.manual_seed(0)
    model = timm.create_model(
        f'resnet18_{method}', channels=(8, 8, 16, 16), layers=(1, 1, 1, 1), num_classes=5, zero_init_last=False,
        **kwargs)
    model(make_images(4))
    return model.eval()


def make_images(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))


def make_conv(method):
    torch.manual_seed(0)
    conv = {'od': ODConv2d, 'fmd': FMDConv2d}[method](6, 8, 3, padding=1)
    conv(torch.randn(4, 6, 5, 5))
    return conv


def attention_norms(model):
    return {name: module for name, module in model.named_modules() if name.endswith('attention.bn')}


def swap_norms(model, make):
    """torchvision's way and everybody's: a new module in the place of each BatchNorm2d."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, make(module))
    return model


def frozen_by_torchvision(norm):
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


@pytest.mark.parametrize('script', [False, True], ids=['eager', 'script'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('args', [
    dict(), dict(momentum=None), dict(momentum=0.3), dict(affine=False), dict(track_running_stats=False),
], ids=str)
def test_it_computes_what_batch_norm_2d_does(args, training, script):
    norm, expected = (cls(6, **args).train(training) for cls in (PooledBatchNorm, nn.BatchNorm2d))
    if script:
        norm = torch.jit.script(norm)
    for _ in range(3):
        x = torch.randn(4, 6, 1, 1)
        torch.testing.assert_close(norm(x), expected(x))
    assert list(norm.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(norm.state_dict(), expected.state_dict())


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('change', [
    dict(running_mean=None, running_var=None), dict(track_running_stats=False),
    dict(running_mean=None, running_var=None, num_batches_tracked=None, track_running_stats=False),
], ids=lambda change: '_'.join(change))
def test_its_statistics_can_be_taken_away(change, training):
    """As test-time adaptation does it (TENT, AdaBN)."""
    norm, expected = PooledBatchNorm(6).train(training), nn.BatchNorm2d(6).train(training)
    for module, (name, value) in itertools.product((norm, expected), change.items()):
        setattr(module, name, value)
    x = torch.randn(4, 6, 1, 1)
    torch.testing.assert_close(norm(x), expected(x))
    torch.testing.assert_close(norm.state_dict(), expected.state_dict())


@with_batch_norm
def test_every_norm_of_a_network_is_a_batch_norm_2d(method):
    """FedBN and others choose the layers by this class."""
    model = make_network(method)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert norms == {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(attention_norms(model)) == 8 and norms > attention_norms(model).keys()


@with_batch_norm
@pytest.mark.parametrize('freeze', [
    freeze_batch_norm_2d, lambda model: swap_norms(model, frozen_by_torchvision),
], ids=['timm', 'torchvision'])
def test_a_frozen_network_trains_without_batch_statistics(freeze, method):
    model = make_network(method)
    images = make_images()
    expected, keys = model(images), model.state_dict().keys()
    frozen = freeze(copy.deepcopy(model)).train()
    assert all(isinstance(norm, FrozenBatchNorm2d) for norm in attention_norms(frozen).values())
    assert frozen.state_dict().keys() == {key for key in keys if not key.endswith('num_batches_tracked')}
    logits = frozen(images)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in frozen.parameters())
    torch.testing.assert_close(frozen(images[:1]), expected[:1])
    torch.testing.assert_close(prepare_for_inference(frozen)(images), expected, rtol=1e-4, atol=1e-5)


@with_batch_norm
def test_an_unfrozen_network_has_its_batch_norms_again(method):
    model = make_network(method)
    expected, keys = model(make_images()), list(model.state_dict())
    model = unfreeze_batch_norm_2d(freeze_batch_norm_2d(model)).eval()
    assert all(type(norm) is nn.BatchNorm2d for norm in attention_norms(model).values())
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(make_images()), expected)
    norm = model.layer1[0].conv1.attention.bn
    before = norm.running_mean.clone()
    model.train()(make_images()).sum().backward()
    assert not torch.equal(norm.running_mean, before)


@with_batch_norm
@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_a_converted_network_trains_as_before_in_one_process(convert, method):
    model = make_network(method).train()
    images = make_images()
    expected = copy.deepcopy(model)
    converted = convert(model)
    assert all(type(norm) is nn.SyncBatchNorm for norm in attention_norms(converted).values())
    torch.testing.assert_close(converted(images), expected(images))
    torch.testing.assert_close(converted.state_dict(), expected.state_dict())


@with_batch_norm
def test_statistics_can_be_estimated_anew(method):
    """`update_bn` of weight averaging: the mean over the batches, and the momentum is as before."""
    model, batches = make_network(method).double(), [make_images(batch).double() for batch in (2, 3, 4)]
    norm, inputs = model.layer2[0].conv1.attention.bn, []
    norm.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach()))
    update_bn(batches, model)
    assert [len(x) for x in inputs] == [2, 3, 4] and norm.momentum == 0.1 and norm.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, torch.stack([x.flatten(1).mean(0) for x in inputs]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.flatten(1).var(0) for x in inputs]).mean(0))


@with_batch_norm
def test_batch_statistics_in_evaluation_are_those_of_training(method):
    conv, x = make_conv(method), torch.randn(4, 6, 5, 5)
    expected = conv.train()(x)
    norm = conv.eval().attention.bn
    norm.running_mean = norm.running_var = None
    torch.testing.assert_close(conv(x), expected)
    scripted = torch.jit.script(conv)
    torch.testing.assert_close(scripted(x), expected)


@with_batch_norm
def test_without_running_statistics_the_layer_trains_on_those_of_the_batch(method):
    conv, x = make_conv(method), torch.randn(4, 6, 5, 5)
    expected = conv(x)
    conv.attention.bn = nn.BatchNorm2d(conv.attention.bn.num_features, track_running_stats=False)
    y = conv(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert all(parameter.grad is not None for parameter in conv.parameters())


@with_batch_norm
@pytest.mark.parametrize('norm', [nn.BatchNorm2d(16, track_running_stats=False), nn.GroupNorm(4, 16)])
def test_a_norm_without_running_statistics_cannot_be_folded_and_says_why(norm, method):
    conv = make_conv(method).eval()
    conv.attention.bn = norm
    with pytest.raises(ValueError, match=f'{type(norm).__name__} has no running_mean and running_var'):
        conv.attention.fold()
