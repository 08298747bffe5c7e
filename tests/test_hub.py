import json

import pytest
import timm
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification

import fmd_timm
from fmd_timm.hub import save_for_hub

SMALL = dict(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1))
MODELS = [
    SMALL,
    dict(SMALL, num_classes=7, in_chans=1, num_kernels=2),
    dict(SMALL, num_classes=7, global_pool='max', conv_bias=True, drop_path_rate=0.1),
]


def make_model(**kwargs):
    model = timm.create_model('resnet18_fmd_cifar', **kwargs)
    fmd_timm.set_temperature(model, kernel=3.0, gate=2.0)  # what a fresh model does not have
    return model.eval()


def assert_equal_weights(loaded, model):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize('kwargs', MODELS, ids=['defaults', 'gray', 'max-pool'])
def test_timm_and_transformers_load_the_same_network(kwargs, tmp_path):
    model = make_model(**kwargs)
    labels = [f'class {i}' for i in range(model.num_classes)]
    save_for_hub(model, tmp_path, model_config=dict(label_names=labels))
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert_equal_weights(loaded, model)
    assert_equal_weights(wrapped.timm_model, model)
    images = torch.randn(2, model.in_chans, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
        torch.testing.assert_close(wrapped(images).logits, model(images))
    assert loaded.pretrained_cfg['label_names'] == labels
    assert wrapped.config.id2label == dict(enumerate(labels))


def inflated():
    return fmd_timm.inflate(timm.create_model('regnety_002', num_classes=7), num_kernels=2, reduction=1 / 8)


def made_dynamic_twice():
    model = timm.create_model('convnext_atto', num_classes=7)
    fmd_timm.make_dynamic(model, filter_fn=lambda name, conv: 'stages.3' in name and conv.groups == 1)
    fmd_timm.make_dynamic(model, fmd_timm.ODConv2d, lambda name, conv: 'stages.2' in name and conv.groups > 1)
    return model


def more_dynamic():
    model = timm.create_model('resnet18_fmd_cifar', num_kernels=2, **SMALL)
    fmd_timm.make_dynamic(model, fmd_timm.CondConv2d, lambda name, conv: 'downsample' in name)
    return model


@pytest.mark.parametrize('make', [
    made_dynamic_twice, *(pytest.param(make, marks=pytest.mark.slow) for make in (inflated, more_dynamic))])
def test_a_network_that_was_made_dynamic_loads_like_any_other(make, tmp_path):
    model = make().eval()
    save_for_hub(model, tmp_path)
    before = json.loads((tmp_path / 'config.json').read_text())
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert_equal_weights(loaded, model)
    assert_equal_weights(wrapped.timm_model, model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)(images).shape == (2, 3)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=(-1,))
    assert features(images)[0].shape[1] == model.num_features
    save_for_hub(loaded, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text()) == before


def test_a_dynamic_cnn_is_that_of_make_dynamic_by_default():
    model = timm.create_model('dynamic_cnn', static='mobilenetv3_small_100', num_classes=5)
    static = timm.create_model('mobilenetv3_small_100', num_classes=5)
    names = fmd_timm.make_dynamic(static)
    assert {name for name, m in model.named_modules() if isinstance(m, fmd_timm.FMDConv2d)} == set(names)
    assert model.pretrained_cfg['classifier'] == 'classifier' and 'hf_hub_id' not in model.pretrained_cfg
    with pytest.raises(RuntimeError, match='dynamic_cnn has no published weights'):
        timm.create_model('dynamic_cnn', pretrained=True)


def without_a_stage():
    model = make_model(**SMALL)
    model.layer4 = torch.nn.Identity()
    return model


@pytest.mark.parametrize('make, message', [
    (lambda: fmd_timm.prepare_for_inference(make_model(**SMALL)), 'prepared for inference can not be loaded'),
    (without_a_stage, r'which could not be loaded: layer4\.0\.conv1\.weight is missing, expected \(256, 32, 3, 3\)'),
])
def test_what_could_not_be_loaded_is_not_written(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_for_hub(make(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_channels_last_models_are_saved(tmp_path):
    model = make_model(**SMALL).to(memory_format=torch.channels_last)
    save_for_hub(model, tmp_path)
    assert_equal_weights(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), model)


def test_preprocessing_of_the_run_is_recorded(tmp_path):
    save_for_hub(make_model(**SMALL), tmp_path, data_config=dict(mean=(0.1, 0.2, 0.3), crop_pct=0.9))
    data = timm.data.resolve_model_data_config(timm.create_model(f'local-dir:{tmp_path}'))
    assert (tuple(data['mean']), data['crop_pct']) == ((0.1, 0.2, 0.3), 0.9)


def test_only_safetensors_and_config_are_written(tmp_path):
    folder = tmp_path / 'new' / 'folder'
    save_for_hub(make_model(**SMALL), folder)
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    with safe_open(folder / 'model.safetensors', 'pt') as weights:
        assert weights.metadata() == {'format': 'pt'}


def test_a_failure_leaves_the_old_files(tmp_path):
    save_for_hub(make_model(**SMALL), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = make_model(**SMALL, norm_layer=torch.nn.BatchNorm2d)  # a class can't be written to config.json
    with pytest.raises(ValueError, match='norm_layer'):
        save_for_hub(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert 'num_classes' not in json.loads(before['config.json'])['model_args']
