"""A network inflated from a static one computes the same at first, and then learns to be dynamic."""
import copy
import logging

import pytest
import timm
import torch
import torch.nn as nn
from hub_server import Commit, Repo
from safetensors.torch import save, save_file

from fmd_timm import (
    CondConv2d,
    DyConv2d,
    DynamicConv2d,
    FMDConv2d,
    ODConv2d,
    inflate,
    inflate_state_dict,
    make_dynamic,
    set_temperature,
)

METHODS = [CondConv2d, DyConv2d, ODConv2d, FMDConv2d]
NARROW = dict(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1))
FAMILIES = [
    'test_resnet', 'regnety_002', 'test_efficientnet', 'tf_mobilenetv3_small_minimal_100', 'convnext_atto',
    'mobilenetv3_small_050',
]


def make_static(name, **kwargs):
    """With weights as of a trained network: none is 0 or 1, so that every block and bias has an effect."""
    torch.manual_seed(0)
    args = dict(num_classes=5, **(NARROW if name in ('resnet18', 'resnet50', 'resnet18_cifar') else {}))
    model = timm.create_model(name, **dict(args, **kwargs))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor.uniform_(0.5, 1.0)
    return model.eval()


def make_images(batch=2, channels=3, **kwargs):
    torch.manual_seed(1)
    return torch.randn(batch, channels, 64, 64, **kwargs)


def dynamic_convs(model):
    return [module for module in model.modules() if isinstance(module, DynamicConv2d)]


def assert_same(model, static, rtol, images=None):
    """Relative to the largest logit."""
    dtype = next(static.parameters()).dtype
    images = make_images(dtype=dtype) if images is None else images
    with torch.no_grad():
        y, expected = model(images), static(images)
    error = (y - expected).abs().max() / expected.abs().max()
    assert error < rtol, f'relative error {error:.1e}'


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', [
    'resnet50', 'resnet20_cifar', *(
        pytest.param(name, marks=pytest.mark.slow) for name in ('resnet18', 'resnet18_cifar', 'mobilenetv3_small_100')),
])
def test_logits_are_those_of_the_static_network_at_any_temperature(name, method):
    static = make_static(name)
    model = inflate(static, method)
    assert {type(conv) for conv in dynamic_convs(model)} == {method}
    assert_same(model, static, 1e-4)
    static, model = static.double(), model.double()
    for temperature in 1.0, 30.0:
        set_temperature(model, kernel=temperature, gate=temperature)
        assert_same(model, static, 1e-9)


@pytest.mark.parametrize('name, method', [
    pytest.param('densenet121', FMDConv2d, marks=pytest.mark.slow),
    *((name, FMDConv2d) for name in FAMILIES),
    *(pytest.param(name, method, marks=pytest.mark.slow)
      for name in FAMILIES for method in METHODS if method is not FMDConv2d),
])
def test_every_family_of_make_dynamic_can_be_inflated(name, method):
    static = make_static(name).double()
    model = inflate(static, method, num_kernels=2)
    assert len(dynamic_convs(model)) > 5
    assert_same(model, static, 1e-9)


@pytest.mark.parametrize('num_kernels', [1, 2, 3, 8])
@pytest.mark.parametrize('method', METHODS)
def test_any_number_of_kernels(method, num_kernels):
    static = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)).double()
    model = inflate(static, method, num_kernels=num_kernels)
    assert_same(model, static, 1e-12, make_images(channels=6, dtype=torch.float64))


def test_mean_of_the_kernels_is_the_static_kernel_to_the_last_bit():
    static = nn.Conv2d(16, 8, 3)
    conv = inflate(nn.Sequential(static), FMDConv2d, noise=0.9)[0]
    for name, scale in ('weight', 4), ('bias', 2):  # gates of 1/2 on both sides; on the output only
        kernels = torch.stack(getattr(conv, name).double().chunk(4))
        assert torch.equal(kernels.mean(0), scale * getattr(static, name).double())
        assert len({tuple(kernel.flatten().tolist()) for kernel in kernels}) == 4


def test_perturbations_are_as_large_as_said_and_those_of_the_seed():
    static = nn.Sequential(nn.Conv2d(16, 8, 3))
    for noise in 0.0, 0.1:
        kernels = torch.stack(inflate(static, DyConv2d, noise=noise)[0].weight.chunk(4))
        share = (kernels / static[0].weight - 1).abs()
        assert share.max().item() == pytest.approx(noise, rel=0.01, abs=1e-7)
    states = [inflate(static, FMDConv2d, seed=seed).state_dict() for seed in (0, 0, 1)]
    for key in '0.weight', '0.attention.squeeze.weight':
        assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_the_random_state_and_the_static_network_stay():
    static = make_static('resnet18')
    before, random_state = copy.deepcopy(static.state_dict()), torch.get_rng_state()
    inflate(static)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in static.state_dict().items())
    assert not dynamic_convs(static)


@pytest.mark.parametrize('method', METHODS)
def test_a_few_steps_make_the_network_dynamic(method):
    """At first the zero last layers give no gradient to the attention's layers before them; they do from then on."""
    # wide enough that not all ReLUs in front of a last layer are closed
    model = inflate(make_static('resnet18', channels=(32, 32, 64, 64)), method).train()
    convs, images = dynamic_convs(model), make_images(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    reached = set()
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(8) % 5).backward()
        reached |= {key for key, parameter in model.named_parameters() if parameter.grad.abs().max() > 0}
        optimizer.step()
    assert reached == {key for key, _ in model.named_parameters()}

    shares = []
    for conv in convs:
        kernels = conv.weight.chunk(4)
        assert all(not torch.equal(kernels[0], kernel) for kernel in kernels[1:])
        conv.register_forward_hook(lambda conv, args, _: shares.append(conv.attention(args[0])[0]))
    with torch.no_grad():
        model.eval()(images)
    for share in shares:
        assert (share - share.mean(1, keepdim=True)).abs().max() > 1e-6  # over the kernels
    assert any((share - share.mean(0)).abs().max() > 1e-6 for share in shares)  # and over the images


@pytest.mark.parametrize('noise', [-0.1, 1.0, float('nan')])
def test_noise_out_of_range_is_refused(noise):
    with pytest.raises(ValueError, match=f'noise must be at least 0 and below 1, got {noise}'):
        inflate(nn.Sequential(nn.Conv2d(6, 8, 3)), noise=noise)


def test_a_state_dict_that_does_not_fit_is_refused_by_name():
    model = timm.create_model('resnet18_fmd', **NARROW)
    state = make_static('resnet18', channels=(8, 16, 32, 48)).state_dict()
    message = r'layer4.0.conv1.weight is \(48, 32, 3, 3\) in the static state_dict, expected \(64, 32, 3, 3\)'
    with pytest.raises(ValueError, match=message):
        inflate_state_dict(state, model)
    del state['layer1.0.conv1.weight']
    with pytest.raises(ValueError, match='layer1.0.conv1.weight is missing'):
        inflate_state_dict(state, model)


def test_static_weights_are_loaded_into_a_network_that_is_there():
    static = make_static('resnet18')
    model = timm.create_model('resnet18_od', num_classes=5, num_kernels=2, conv_bias=True, **NARROW).eval()
    before = copy.deepcopy(model.state_dict())
    state = inflate_state_dict(static.state_dict(), model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    model.load_state_dict(state)
    assert_same(model.double(), static.double(), 1e-9)


# Through create_model

@pytest.fixture
def create(tmp_path):
    """create_model with the file of a static network's weights in place of the Hub's."""
    def create(name, static, **kwargs):
        path = tmp_path / 'static.safetensors'
        save_file(static.state_dict(), path)
        overlay = dict(file=str(path), num_classes=static.num_classes)
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    return create


@pytest.mark.parametrize('name, static_name', [
    *((f'resnet18_{method}', 'resnet18') for method in ('cond', 'dy', 'od', 'fmd')),
    ('resnet50_fmd', 'resnet50'), ('resnet18_fmd_cifar', 'resnet18_cifar'),
    ('mobilenetv2_050_od', 'mobilenetv2_050'), ('mobilenetv3_small_100_dy', 'mobilenetv3_small_100'),
    ('mobilenetv3_small_100_fmd', 'mobilenetv3_small_100'),
])
def test_create_model_inflates_a_static_checkpoint_and_says_so(name, static_name, create, caplog):
    static = make_static(static_name)
    args = NARROW if name.startswith('resnet') else {}
    with caplog.at_level(logging.WARNING):
        model = create(name, static, num_classes=5, **args)
    assert_same(model, static, 1e-4)
    assert 'static.safetensors' in caplog.text and 'attention is untrained' in caplog.text
    model.train()(make_images()).sum().backward()


def test_other_classes_and_input_channels(create):
    static = make_static('resnet18')
    model = create('resnet18_fmd', static, num_classes=7, in_chans=1, **NARROW)
    gray = make_images(channels=1)
    assert model(gray).shape == (2, 7)
    with torch.no_grad():  # timm sums the first convolution over the colours
        expected = static.forward_features(gray.expand(-1, 3, -1, -1))
        torch.testing.assert_close(model.forward_features(gray), expected, rtol=1e-4, atol=1e-4)


def test_features_of_a_static_checkpoint(create):
    static = make_static('mobilenetv3_small_100')
    model = create('mobilenetv3_small_100_fmd', static, features_only=True)
    expected = static.forward_intermediates(make_images(), intermediates_only=True)
    torch.testing.assert_close(model(make_images()), expected, rtol=1e-4, atol=1e-4)


def test_the_checkpoint_of_a_dynamic_network_is_loaded_as_it_is(create, caplog):
    trained = timm.create_model('resnet18_fmd', num_classes=5, zero_init_last=False, **NARROW).eval()
    set_temperature(trained, kernel=3.0)
    with caplog.at_level(logging.WARNING):
        model = create('resnet18_fmd', trained, num_classes=5, **NARROW)
    assert 'inflated' not in caplog.text
    found = model.state_dict()
    for key, tensor in trained.state_dict().items():
        assert torch.equal(found[key], tensor), key


INFLATED = [name for name in timm.list_models(include_tags=True) if '.inflated_' in name]


def test_there_is_an_inflated_tag_of_every_224_px_network():
    assert {name.partition('.')[0] for name in INFLATED} == {
        *(f'{name}_{method}' for method in ('cond', 'dy', 'od', 'fmd') for name in (
            'resnet18', 'resnet34', 'resnet50', 'resnet101', 'mobilenetv2_050', 'mobilenetv2_100')),
        'mobilenetv3_small_100_dy', 'mobilenetv3_small_100_fmd',
    }


@pytest.mark.parametrize('name', INFLATED)
def test_inflated_tags_have_the_configuration_of_their_source(name):
    architecture, _, tag = name.partition('.inflated_')
    source = timm.get_pretrained_cfg(f'{architecture.rpartition("_")[0]}.{tag}')
    cfg = timm.get_pretrained_cfg(name)
    for key in ('mean', 'std', 'crop_pct', 'test_crop_pct', 'crop_mode', 'interpolation', 'license', 'input_size',
                'test_input_size', 'num_classes', 'first_conv', 'classifier', 'origin_url', 'paper_ids', 'hf_hub_id'):
        assert getattr(cfg, key) == getattr(source, key), key
    assert cfg.hf_hub_filename == 'model.safetensors'  # never a pickle
    assert source.hf_hub_id in cfg.description and 'constant until it is trained' in cfg.description


def test_a_network_with_random_weights_has_no_configuration_of_a_checkpoint():
    cfg = timm.create_model('resnet18_fmd', device='meta').pretrained_cfg
    assert cfg['paper_ids'] == 'arXiv:2503.17530' and cfg['crop_pct'] == 0.875
    assert not {'tag', 'hf_hub_id', 'description', 'test_input_size'} & cfg.keys()
    chosen = timm.create_model('resnet18_fmd.inflated_a1_in1k', device='meta').pretrained_cfg
    assert (chosen['tag'], chosen['crop_pct']) == ('inflated_a1_in1k', 0.95)


def test_pretrained_downloads_the_static_checkpoint_of_timm_and_inflates_it(hub, caplog):
    narrow = dict(NARROW, num_classes=1000)
    static = timm.create_model('resnet18', **narrow).eval()
    repo = hub.repos['timm/resnet18.a1_in1k'] = Repo()
    repo.commits.append(Commit({'model.safetensors': save(static.state_dict())}, 'first'))
    with caplog.at_level(logging.WARNING):
        model = timm.create_model('resnet18_fmd', pretrained=True, **narrow).eval()
    assert 'resnet18_fmd: inflated from timm/resnet18.a1_in1k, a static network. The attention is ' in caplog.text
    cfg = model.pretrained_cfg
    assert (cfg['tag'], cfg['crop_pct'], cfg['interpolation']) == ('inflated_a1_in1k', 0.95, 'bicubic')
    assert_same(model, static, 1e-4)
    assert timm.create_model('resnet18_dy', pretrained=True, num_classes=7, in_chans=1, **NARROW).num_classes == 7
    with pytest.raises(RuntimeError, match='resnet50_fmd could not be loaded from the Hub repository timm/resnet50.a1'):
        timm.create_model('resnet50_fmd', pretrained=True, **narrow)


def test_a_published_checkpoint_comes_before_the_inflated_ones(monkeypatch, tmp_path):
    from fmd_timm.models import _pretrained
    monkeypatch.setattr(_pretrained, 'HUB_CARDS', tmp_path)
    (tmp_path / 'resnet18_fmd.mine_in1k.json').write_text(
        '{"hub": {"repo": "acme/resnet18_fmd", "commit": "abc"}, "pretrained_cfg": {"num_classes": 1000}}')
    cfgs = _pretrained.inflated_cfgs('resnet18_fmd', dict(num_classes=1000), 'resnet18', ['a1_in1k'])
    default = timm.models.generate_default_cfgs(_pretrained.with_published_tags(cfgs))['resnet18_fmd']
    assert list(default.tags) == ['mine_in1k', 'untrained', 'inflated_a1_in1k']


def test_make_dynamic_then_state_dict_is_inflate():
    static = make_static('test_resnet')
    model = copy.deepcopy(static)
    make_dynamic(model, ODConv2d)
    model.load_state_dict(inflate_state_dict(static.state_dict(), model))
    assert_same(model, static, 1e-4)
