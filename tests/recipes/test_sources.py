"""recipes/_sources.py: weights are fetched from the Hub, as safetensors only, and what fails is named."""
import io
import json
import socket
import time

import pytest
import timm
import torch
from _sources import find_source, load_network
from hub_server import Commit, Repo
from inputs import make_run

from fmd_timm.hub import save_for_hub

NARROW = dict(channels=[8, 16, 32, 64], layers=[1, 1, 1, 1])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    make_run(folder, **NARROW)
    return folder


@pytest.fixture
def published(hub, folder, monkeypatch):
    """acme/small, as publishing leaves it."""
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # before it tries again
    repo = hub.repos['acme/small'] = Repo()
    files = {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')}
    repo.commits.append(Commit(files, 'first'))
    return repo


@pytest.mark.parametrize('status, message', [
    (403, 'the Hub does not allow it: .*HTTP 403: Not for you'),
    (404, 'there is nothing of that name .HTTP 404'),
    (429, 'the Hub has had too many requests from here: .*HTTP 429'),
    (500, 'the Hub has a fault of its own: try again later .HTTP 500'),
    (None, 'the connection to the Hub failed: check the network, and try again .Read'),
])
def test_a_download_that_fails_says_why(hub, published, status, message):
    hub.fail('(HEAD|GET) .*/model.safetensors', status, 'Not for you')
    with pytest.raises(SystemExit, match=f"^--init 'acme/small': model.safetensors of .* could not be .*{message}"):
        find_source('acme/small', '--init')


def test_a_gated_repository_and_one_that_is_not_there_are_told_apart(hub, published):
    hub.gate('acme/small')
    with pytest.raises(SystemExit, match='is gated: ask for access on its page'):
        find_source('acme/small', '--init')
    with pytest.raises(SystemExit, match='there is no such repository, or it is private'):
        find_source('acme/smell', '--init')


def test_without_a_network_the_cache_or_the_error_comes_at_once(hub, published, monkeypatch):
    online = find_source('acme/small', 'checkpoint')

    def unreachable(*_):
        raise OSError(101, 'Network is unreachable')

    monkeypatch.setattr(time, 'sleep', lambda _: pytest.fail('waits to try again'))
    monkeypatch.setattr(socket.socket, 'connect', unreachable)
    monkeypatch.setattr('huggingface_hub.utils._http._GLOBAL_CLIENT', None)
    assert find_source('acme/small', 'checkpoint') == online
    with pytest.raises(SystemExit, match='the connection to the Hub failed: .*unreachable'):
        find_source('acme/other', 'checkpoint')


class Opened:
    """Its pickle runs code."""
    def __reduce__(self):
        return pytest.fail, ('a pickle was opened',)


@pytest.mark.parametrize('name, args', [('test_resnet', {}), ('resnet18_fmd_cifar', NARROW)])
def test_a_repository_can_not_name_another_file_for_its_weights(name, args, hub, tmp_path):
    network = timm.create_model(name, **args)
    save_for_hub(network, tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['pretrained_cfg'] |= dict(hf_hub_filename='w.bin', custom_load='hf', url='http://127.0.0.1:1/w.bin')
    pickled = io.BytesIO()
    torch.save({'fc.weight': Opened()}, pickled)
    repo = hub.repos['acme/evil'] = Repo()
    repo.commits.append(Commit({
        'config.json': json.dumps(config).encode(), 'w.bin': pickled.getvalue(),
        'model.safetensors': (tmp_path / 'model.safetensors').read_bytes()}, 'first'))
    loaded = load_network(find_source('acme/evil', '--init'), '--init')
    assert torch.equal(loaded.state_dict()['fc.weight'], network.state_dict()['fc.weight'])
    if name.endswith('_fmd_cifar'):  # with timm alone
        with pytest.raises(RuntimeError, match='must be a .safetensors file, got w.bin of acme/evil'):
            timm.create_model('hf-hub:acme/evil', pretrained=True)
    assert not [path for _, path in hub.log if path.endswith('w.bin')]


def test_a_folder_with_a_pickle_beside_the_safetensors_loads_the_latter(tmp_path):
    save_for_hub(timm.create_model('test_resnet'), tmp_path)
    torch.save({'fc.weight': Opened()}, tmp_path / 'pytorch_model.bin')
    assert load_network(find_source(str(tmp_path), 'checkpoint'), 'checkpoint').num_classes == 1000
