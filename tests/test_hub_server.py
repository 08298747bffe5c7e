"""The Hub of the tests, as the real clients see it: huggingface_hub, timm and datasets."""
import os
from http.client import HTTPConnection
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from hub_server import READ_TOKEN, WRITE_TOKEN, Commit, Repo, redirect_clients
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

WEIGHTS = bytes(range(256)) * 12_000  # 3 MB: more than a socket buffers
CARD = b'---\nlicense: mit\n---\n# a model\n'


@pytest.fixture(params=[WRITE_TOKEN], ids=['write'])
def api(request, hub, monkeypatch):
    """A client whose token may write, or as parametrized."""
    if request.param is not None:
        monkeypatch.setenv('HF_TOKEN', request.param)
    return HfApi()


with_read_token = pytest.mark.parametrize('api', [READ_TOKEN], ids=['read'], indirect=True)


@pytest.fixture
def model(hub) -> Repo:
    """acme/model, already published"""
    repo = hub.repos['acme/model'] = Repo()
    repo.commits.append(Commit({'README.md': CARD, 'model.safetensors': WEIGHTS}, 'first'))
    return repo


# Publishing

def test_an_uploaded_folder_loads_by_branch_and_an_older_one_by_commit(hub, api, tmp_path):
    weights = tmp_path / 'model.safetensors'
    weights.write_bytes(WEIGHTS)
    (tmp_path / 'README.md').write_bytes(CARD)
    assert api.create_repo('acme/model').repo_id == 'acme/model'
    old = api.upload_folder(repo_id='acme/model', folder_path=tmp_path, commit_message='first').oid
    weights.write_bytes(WEIGHTS[::-1])
    new = api.upload_folder(repo_id='acme/model', folder_path=tmp_path, commit_message='second').oid
    assert api.upload_folder(repo_id='acme/model', folder_path=tmp_path).oid == new, 'nothing changed'

    assert Path(hf_hub_download('acme/model', 'README.md')).read_bytes() == CARD
    for revision, expected in {'main': WEIGHTS[::-1], new: WEIGHTS[::-1], old: WEIGHTS}.items():
        loaded = hf_hub_download('acme/model', 'model.safetensors', revision=revision)
        assert Path(loaded).read_bytes() == expected, revision
    initial, first, second = hub.repos['acme/model'].commits
    assert (first.title, second.title) == ('first', 'second')
    assert first['model.safetensors'] == WEIGHTS and second['model.safetensors'] == WEIGHTS[::-1]
    assert second['README.md'] == CARD
    assert len([path for method, path in hub.log if method == 'PUT']) == 2  # the README.md is not uploaded by LFS


def test_a_file_can_be_deleted_and_a_commit_on_an_outdated_parent_is_refused(model, api):
    old = api.model_info('acme/model').sha
    api.delete_file('README.md', 'acme/model')
    with pytest.raises(HfHubHTTPError, match='A commit has happened since'):
        api.delete_file('model.safetensors', 'acme/model', parent_commit=old)
    assert list(model.commits[-1]) == ['model.safetensors']


def test_a_repository_is_created_once_as_a_model_and_once_as_a_dataset(hub, api):
    assert api.create_repo('thing', private=True).repo_id == 'ann/thing'
    assert api.create_repo('ann/thing', repo_type='dataset').repo_type == 'dataset'
    assert api.create_repo('ann/thing', exist_ok=True) == f'{hub.endpoint}/ann/thing'
    with pytest.raises(HfHubHTTPError, match='409'):
        api.create_repo('ann/thing')
    assert hub.repos['ann/thing'].private and not hub.repos['datasets/ann/thing'].private


# Looking

def test_metadata_of_a_repository(model, api):
    model.commits.append(Commit({**model.commits[-1], 'runs/1/log.txt': b'epoch 0'}, 'second'))
    info = api.model_info('acme/model', files_metadata=True)
    assert {file.rfilename: file.size for file in info.siblings}['model.safetensors'] == len(WEIGHTS)
    assert not info.private and not info.gated
    assert api.list_repo_files('acme/model') == ['README.md', 'model.safetensors', 'runs/1/log.txt']
    assert [entry.path for entry in api.list_repo_tree('acme/model')] == ['README.md', 'model.safetensors', 'runs']
    assert [entry.path for entry in api.list_repo_tree('acme/model', 'runs', recursive=True)] == [
        'runs/1', 'runs/1/log.txt',
    ]
    found = api.get_paths_info('acme/model', ['README.md', 'runs/1', 'no such file'])
    assert [entry.path for entry in found] == ['README.md', 'runs/1']
    assert [ref.target_commit for ref in api.list_repo_refs('acme/model').branches] == [info.sha]
    second, first, _ = api.list_repo_commits('acme/model')
    assert (second.commit_id, second.title, first.title) == (info.sha, 'second', 'first')
    assert api.file_exists('acme/model', 'runs/1/log.txt')
    assert not api.file_exists('acme/model', 'runs/1/log.txt', revision=first.commit_id)


def test_a_part_of_a_file_can_be_asked_for(hub, model):
    connection = HTTPConnection('127.0.0.1', hub.server_port)
    for wanted, status, body in [
        ('bytes=4-', 206, CARD[4:]),
        ('bytes=4-10', 206, CARD[4:11]),
        ('bytes=4-9999', 206, CARD[4:]),
        (f'bytes={len(CARD)}-', 416, None),
    ]:
        connection.request('GET', '/acme/model/resolve/main/README.md', headers={'Range': wanted})
        response = connection.getresponse()
        content = response.read()
        assert response.status == status, wanted
        assert body is None or content == body, wanted
    connection.close()


# Refusing

def test_tokens_say_who_calls(api):
    me = api.whoami()
    assert me['name'] == 'ann' and me['auth']['accessToken']['role'] == 'write'
    assert [(org['name'], org['roleInOrg']) for org in me['orgs']] == [('acme', 'write')]
    assert api.whoami(token=READ_TOKEN)['auth']['accessToken']['role'] == 'read'
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        api.whoami(token='hf_revoked')


def test_an_invalid_token_is_refused_even_where_none_is_needed(model, api):
    assert api.model_info('acme/model', token=False).id == 'acme/model'
    with pytest.raises(HfHubHTTPError, match='Invalid credentials') as refusal:
        api.model_info('acme/model', token='hf_revoked')
    assert refusal.value.response.status_code == 401
    assert not isinstance(refusal.value, RepositoryNotFoundError)


@with_read_token
def test_a_read_token_loads_but_does_not_push(hub, model, api):
    model.private = True
    hf_hub_download('acme/model', 'README.md')
    for push in [
        lambda: api.create_repo('acme/other'),
        lambda: api.upload_file(path_or_fileobj=b'changed', path_in_repo='README.md', repo_id='acme/model'),
    ]:
        with pytest.raises(HfHubHTTPError, match='403 Forbidden: Your token may only read'):
            push()
    assert list(hub.repos) == ['acme/model'] and model.commits[-1]['README.md'] == CARD


def test_nobody_pushes_into_a_namespace_of_others(hub, api):
    hub.repos['google/model'] = Repo()
    for push in [
        lambda: api.create_repo('google/other'),
        lambda: api.upload_file(path_or_fileobj=b'mine', path_in_repo='README.md', repo_id='google/model'),
    ]:
        with pytest.raises(HfHubHTTPError, match='403 Forbidden: You do not have the rights .* "google"'):
            push()


def test_a_private_repository_is_missing_for_strangers(model, api):
    model.private = True
    assert api.model_info('acme/model').private
    with pytest.raises(RepositoryNotFoundError):
        api.model_info('acme/model', token=False)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('acme/model', 'README.md', token=False)


@pytest.mark.parametrize('api', [WRITE_TOKEN, None], ids=['write', 'anonymous'], indirect=True)
def test_missing_things_have_the_exceptions_of_the_hub(model, api):
    for look in [
        lambda: api.model_info('acme/missing'),
        lambda: api.dataset_info('acme/model'),
        lambda: hf_hub_download('acme/missing', 'model.safetensors'),
        lambda: hf_hub_download('no-namespace', 'model.safetensors'),
    ]:
        with pytest.raises(RepositoryNotFoundError):
            look()
    with pytest.raises(EntryNotFoundError):
        hf_hub_download('acme/model', 'missing.safetensors')
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download('acme/model', 'model.safetensors', revision='0' * 40)


def test_files_of_a_gated_repository_are_refused_and_its_metadata_is_not(hub, model, api):
    hub.gate('acme/model')
    assert api.model_info('acme/model').gated == 'manual'
    with pytest.raises(GatedRepoError, match='Access to acme/model is restricted'):
        hf_hub_download('acme/model', 'model.safetensors')


def test_a_dropped_download_is_an_error_that_leaves_nothing_broken(hub, model):
    hub.drop_next_download('model.safetensors', after_bytes=1_000_000)
    with pytest.raises(Exception, match='(?i)reset by peer'):
        hf_hub_download('acme/model', 'model.safetensors')
    assert try_to_load_from_cache('acme/model', 'model.safetensors') is None
    assert list(Path(os.environ['HF_HOME']).rglob('blobs/*')) == []
    assert Path(hf_hub_download('acme/model', 'model.safetensors')).read_bytes() == WEIGHTS
    assert hub.log.count(('GET', '/acme/model/resolve/main/model.safetensors')) == 2


# Environment

def test_environment_leaves_out_what_would_win_over_its_own():
    everyday = ('HF_HUB_OFFLINE', 'HF_HUB_CACHE', 'HF_DATASETS_CACHE', 'HF_TOKEN', 'HF_TOKEN_PATH')
    environment = dict.fromkeys(everyday, 'mine') | dict(UNRELATED='kept')
    redirect_clients(environment, 'http://127.0.0.1:1', 'home')
    assert 'mine' not in environment.values() and environment['UNRELATED'] == 'kept'
    assert (environment['HF_ENDPOINT'], environment['HF_HOME']) == ('http://127.0.0.1:1', 'home')


# The other clients

def test_timm_loads_the_model_that_it_pushed(hub, api):
    model = timm.create_model('test_resnet', num_classes=7).eval()
    timm.models.push_to_hf_hub(model, 'acme/test_resnet.tiny', private=True, safe_serialization=True)
    loaded = timm.create_model('hf-hub:acme/test_resnet.tiny', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    repo = hub.repos['acme/test_resnet.tiny']
    assert repo.private
    assert {'README.md', 'config.json', 'model.safetensors'} <= set(repo.commits[-1])


def test_datasets_loads_the_images_that_it_pushed(hub, api):
    images = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 100, 200)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['dark', 'light']))
    made = datasets.Dataset.from_dict({'image': images, 'label': [0, 0, 1]}, features)
    made.push_to_hub('acme/shades', split='train')
    made.select([0]).push_to_hub('acme/shades', split='validation')

    loaded = datasets.load_dataset('acme/shades')
    assert {split: len(part) for split, part in loaded.items()} == {'train': 3, 'validation': 1}
    assert loaded['train'].features == features
    for image, row in zip(images, loaded['train'], strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(row['image']))
    assert 'data/train-00000-of-00001.parquet' in hub.repos['datasets/acme/shades'].commits[-1]
