"""Weights by `pretrained=True`: one download, errors that name their source, records that are left out."""
import copy
import logging
import os
import shutil
from pathlib import Path
from textwrap import dedent

import processes
import pytest
import timm
from hub_server import Commit, Repo
from safetensors.torch import save
from timm.models import generate_default_cfgs

import fmd_timm
from fmd_timm.models import _pretrained

NARROW = dict(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1), num_classes=1000)
RECORD = '{"hub": {"repo": "acme/resnet18_fmd", "commit": "abc"}, "pretrained_cfg": {"num_classes": 7}}'


def test_the_hub_is_asked_once_and_its_refusals_are_named(hub):
    weights = save(timm.create_model('resnet18', **NARROW).state_dict())
    for name, files in (
        ('timm/resnet18.a1_in1k', {'model.safetensors': weights}),
        ('acme/damaged', {'model.safetensors': weights[:1000]}),
        ('acme/pickle', {'pytorch_model.bin': b'a pickle', 'w.bin': b'a pickle'}),
    ):
        repo = hub.repos[name] = Repo()
        repo.commits.append(Commit(files, 'first'))
    timm.create_model('resnet18_fmd', pretrained=True, **NARROW)
    for repo, file, message in (
        ('acme/damaged', None, 'could not be loaded from the Hub repository acme/damaged: SafetensorError'),
        ('acme/pickle', None, 'from the Hub repository acme/pickle: the repository has no such file'),
        ('acme/pickle', 'w.bin', 'must be a .safetensors file, got w.bin of acme/pickle'),
    ):
        overlay = dict(hf_hub_id=repo, hf_hub_filename=file)
        with pytest.raises(RuntimeError, match=message):
            timm.create_model('resnet18_fmd', pretrained=True, pretrained_cfg_overlay=overlay, **NARROW)
    requests = [request for request in hub.log if '/resnet18.a1_in1k/' in request[1]]
    assert [method for method, path in requests] == ['HEAD', 'GET'], requests
    assert not [path for method, path in hub.log if path.endswith('.bin')]


def test_an_unreachable_hub_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    message = r'from the Hub repository acme/nowhere-to-be-found: it is not in the cache, and HF_HUB_OFFLINE'
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('resnet18_fmd', pretrained=True, pretrained_cfg_overlay=dict(
            hf_hub_id='acme/nowhere-to-be-found'), **NARROW)


def test_a_missing_file_is_named():
    message = r'the weights of resnet18_fmd could not be loaded from missing.safetensors: FileNotFoundError'
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('resnet18_fmd', pretrained=True, pretrained_cfg_overlay=dict(
            file='missing.safetensors'), **NARROW)


def test_static_weights_that_are_not_inflated_are_refused_with_a_sentence(tmp_path):
    static = timm.create_model('resnet18', **NARROW)
    path = tmp_path / 'static.safetensors'
    path.write_bytes(save(static.state_dict()))
    with pytest.raises(RuntimeError, match='weights of a static network: load them with pretrained=True'):
        timm.create_model('resnet18_fmd', checkpoint_path=str(path), **NARROW)
    model = timm.create_model(
        'resnet18_fmd', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **NARROW)
    copied = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match='weights of a static network'):
        copied.load_state_dict(static.state_dict())
    copied.load_state_dict(model.state_dict())
    path.write_bytes(save(model.state_dict()))
    timm.create_model('resnet18_fmd', checkpoint_path=str(path), **NARROW)


def test_models_are_listed_for_errors_only(monkeypatch):
    static = timm.create_model('resnet18', **NARROW)
    monkeypatch.setattr(_pretrained, 'list_models', lambda *args, **kwargs: pytest.fail('lists the models'))
    timm.create_model('resnet18_fmd', device='meta')
    timm.create_model('resnet18_fmd', pretrained=True, pretrained_cfg_overlay=dict(
        state_dict=static.state_dict()), **NARROW)


@pytest.mark.parametrize('content', [
    b'', b'{"hub": ', b'[]', b'{}', b'{"hub": {"repo": "acme/x"}, "pretrained_cfg": {}}', b'\xff\xfe',
    RECORD.replace('num_classes', 'number_of_classes').encode(), RECORD.replace('{"repo"', '["repo"').encode(),
])
def test_a_file_that_is_no_record_is_left_out_with_one_warning(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_pretrained, 'HUB_CARDS', tmp_path)
    (tmp_path / 'resnet18_fmd.bad_in1k.json').write_bytes(content)
    (tmp_path / 'resnet18_fmd.good_in1k.json').write_text(RECORD)
    with caplog.at_level(logging.WARNING):
        cfgs = _pretrained.with_published_tags({'resnet18_fmd.untrained': dict(num_classes=1000)})
        assert not _pretrained.with_published_tags({'resnet18_dy.untrained': {}}).keys() - {'resnet18_dy.untrained'}
    default = generate_default_cfgs(cfgs)['resnet18_fmd']
    assert list(default.tags) == ['good_in1k', 'untrained'] and default.default.num_classes == 7
    message, = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / 'resnet18_fmd.bad_in1k.json') in message and 'resnet18_fmd.bad_in1k is left out' in message


@pytest.mark.slow
def test_the_package_is_imported_in_spite_of_a_bad_record(tmp_path):
    package = tmp_path / 'fmd_timm'
    shutil.copytree(Path(fmd_timm.__file__).parent, package, ignore=shutil.ignore_patterns('__pycache__'))
    (package / 'hub_cards').mkdir(exist_ok=True)
    (package / 'hub_cards' / 'resnet18_fmd.bad_in1k.json').write_text('{"hub": ')
    done = processes.run('-c', dedent('''
        import fmd_timm, timm
        print(fmd_timm.__file__, timm.create_model('resnet18_fmd', device='meta').num_classes)
        print(timm.list_models('resnet18_fmd.*', include_tags=True))
    '''), env=dict(os.environ, PYTHONPATH=str(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'{package / "__init__.py"} 1000') and 'bad_in1k' not in done.stdout
    assert done.stderr.count('resnet18_fmd.bad_in1k.json') == 1
