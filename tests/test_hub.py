import json

import pytest
import timm
import torch
from safetensors import safe_open
from transformers import AutoModelForImageClassification

import fmd_timm
from fmd_timm.hub import save_for_hub

SMALL = dict(channels=(8, 16, 32, 64))
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
