"""recipes/convert.py: checkpoints of the authors' code become ours, and nothing in them is executed."""
import argparse
import json

import convert
import pytest
import timm
import torch
from _arguments import parse_convert
from safetensors.torch import load_file

from fmd_timm.authors import _authors_parts
from fmd_timm.layers import DynamicConv2d

NARROW = dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1))


@pytest.fixture
def narrow(monkeypatch):
    """Networks of a size for tests."""
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, **kwargs: create(name, **dict(NARROW, **kwargs)))


def as_theirs(network):
    """Its weights by the authors' names."""
    theirs = {name: tensor for name, tensor in network.state_dict().items() if '_temperature' not in name}
    for name, conv in network.named_modules():
        if isinstance(conv, DynamicConv2d):
            for key, parts in _authors_parts(conv).items():
                tensor = theirs.pop(f'{name}.{key}', None)
                sizes = [torch.Size(shape).numel() for _, shape in parts]
                for (part, shape), values in zip(parts, tensor.flatten().split(sizes) if parts else ()):
                    theirs[f'{name}.{part}'] = values.view(shape)
    return theirs


@pytest.mark.parametrize('model, args, temperature', [
    ('resnet18_od', dict(num_kernels=2), 1.0), ('resnet18_fmd', dict(conv_bias=True), 34.0)])
@pytest.mark.parametrize('wrap', [
    lambda weights: weights,
    lambda weights: dict(epoch=3, state_dict={f'module.{name}': t for name, t in weights.items()}, optimizer={})])
def test_a_checkpoint_of_the_authors_is_loaded_by_timm(model, args, temperature, wrap, narrow, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=7, **args).eval()
    fmd_timm_convs = [module for module in network.modules() if isinstance(module, DynamicConv2d)]
    torch.save(wrap(as_theirs(network)), tmp_path / 'theirs.pth')
    convert.main(**vars(parse_convert([
        str(tmp_path / 'theirs.pth'), '--model', model, '--output', str(tmp_path / 'ours')])))
    weights = load_file(tmp_path / 'ours' / 'model.safetensors')
    for name, tensor in network.state_dict().items():
        expected = torch.full_like(tensor, temperature) if 'kernel_temperature' in name else tensor
        assert torch.equal(weights[name], expected), name
    config = json.loads((tmp_path / 'ours' / 'config.json').read_text())
    assert config['num_classes'] == 7 and config['pretrained_cfg']['interpolation'] == 'bilinear'
    loaded = timm.create_model(f'local-dir:{tmp_path / "ours"}', pretrained=True)
    kernels = {module.num_kernels for module in loaded.modules() if isinstance(module, DynamicConv2d)}
    assert kernels == {fmd_timm_convs[0].num_kernels}


@pytest.mark.parametrize('saved, model, message', [
    (argparse.Namespace(), 'resnet18_od', 'is not loaded: .* holds more than weights'),
    (dict(weights=3), 'resnet18_od', 'must hold tensors by their names'),
    (dict(weight=torch.ones(2)), 'resnet18_od', 'has no dynamic convolution: expected kernels of 5 dimensions'),
    ({'conv.weight': torch.ones(2, 1, 1, 1, 1)}, 'resnet18_od', r"is not of a resnet18_od: .*unexpected keys \['conv"),
    ({}, 'resnet19_od', "--model must be a model registered in timm, such as resnet18_od, got 'resnet19_od'"),
    ({}, 'resnet18_dy', "--model must be a network of ODConv or FMDConv, got 'resnet18_dy'"),
])
def test_what_is_no_checkpoint_of_the_authors_is_refused(saved, model, message, narrow, tmp_path):
    torch.save(saved, tmp_path / 'theirs.pth')
    with pytest.raises(SystemExit, match=message):
        convert.main(**vars(parse_convert([str(tmp_path / 'theirs.pth'), '--model', model])))


def test_a_file_that_is_not_there_or_none_of_torch_is_named(narrow, tmp_path):
    (tmp_path / 'text.pth').write_text('weights')
    for name, message in ('text.pth', 'is not loaded: it is no file of torch.save'), ('none.pth', 'can not be read'):
        with pytest.raises(SystemExit, match=f'{name} {message}'):
            convert.main(tmp_path / name, 'resnet18_od', tmp_path / 'ours')
