"""recipes/publish.py --space: the page of recipes/demo.py as a Space."""
import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import processes
import publish
import pytest
from hub_server import WRITE_TOKEN, Commit, Repo
from huggingface_hub import SpaceCard
from inputs import make_run

import fmd_timm

CHECKOUT = Path(__file__).parents[2]
SPACE = 'acme/page'
ROOT = {'.gitattributes', 'README.md', 'requirements.txt', 'app.py'}

IMPORT = """
import importlib, pathlib, sys
sys.path.insert(0, 'recipes')
for path in pathlib.Path('recipes').glob('*.py'):
    if path.stem != 'demo':
        module = importlib.import_module(path.stem)
        assert pathlib.Path(module.__file__) == path.absolute(), module
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    make_run(folder, channels=[8, 16, 32, 64], layers=[1, 1, 1, 1])
    return folder


@pytest.fixture
def publish_here(hub, run, monkeypatch):
    """recipes/publish.py in this process, as somebody who may write; returns the Space."""
    monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # before it tries again

    def publish_it(*args, space=SPACE):
        publish.main(**vars(publish.parse_publish(
            ['--run', str(run), '--repo', 'acme/digits', '--space', space, *args])))
        return hub.repos.get(f'spaces/{space}')
    return publish_it


def save(space, folder):
    """The files of a Space, as the Hub gives them to the machine that runs it."""
    for name, content in space.at('main').items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def test_a_space_holds_the_page_and_whatever_it_imports(hub, publish_here, tmp_path, capsys):
    space = publish_here()
    assert 'acme/digits' in hub.repos and f'{hub.endpoint}/spaces/{SPACE}' in capsys.readouterr().out
    files = space.at('main')
    recipes = {name for name in files if name.startswith('recipes/')}
    assert files.keys() == ROOT | recipes and space.sdk == 'gradio' and not space.private
    for name in recipes:
        assert files[name] == (CHECKOUT / name).read_bytes()
    assert files['requirements.txt'].decode() == f'fmd-timm[demo]=={fmd_timm.__version__}\n'
    assert "parse_demo(['hf-hub:acme/digits'])" in files['app.py'].decode()
    data = SpaceCard(files['README.md'].decode()).data
    assert (data.sdk, data.app_file, data.models, data.license) == ('gradio', 'app.py', ['acme/digits'], 'apache-2.0')

    save(space, tmp_path)
    done = processes.run('-c', IMPORT, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(CHECKOUT)))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_space_starts_with_the_network_of_the_hub(publish_here, tmp_path):
    pytest.importorskip('gradio', reason="the page needs gradio: pip install -e '.[demo]'")
    save(publish_here(), tmp_path)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, 'app.py'], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=dict(os.environ, PYTHONPATH=str(CHECKOUT), GRADIO_SERVER_PORT=str(port)))
    try:
        assert any(f'127.0.0.1:{port}' in line for line in server.stdout)
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/config') as answer:
            assert json.load(answer)['title'] == 'resnet18_fmd_cifar'
    finally:
        server.kill()
        server.communicate()


def test_a_space_is_published_again_without_what_the_page_no_longer_imports(hub, publish_here):
    space = publish_here('--private')
    assert space.private
    publish_here()
    assert len(space.commits) == 2  # there was nothing to change
    space.commits.append(Commit(space.at('main') | {'recipes/_old.py': b'', 'notes.txt': b'mine'}, 'theirs'))
    publish_here()
    assert 'notes.txt' in space.at('main') and 'recipes/_old.py' not in space.at('main')


def test_another_space_is_replaced_only_when_told(hub, publish_here):
    theirs = hub.repos['spaces/acme/theirs'] = Repo(sdk='gradio')
    theirs.commits.append(Commit(theirs.at('main') | {'app.py': b'theirs', 'README.md': b''}, 'theirs'))
    with pytest.raises(SystemExit, match='^the Space acme/theirs holds app.py: publish to another Space, .* --replace'):
        publish_here(space='acme/theirs')
    assert len(theirs.commits) == 2 and 'acme/digits' not in hub.repos
    with pytest.raises(SystemExit, match='^--private: the Space acme/theirs is there already and public$'):
        publish_here('--private', space='acme/theirs')
    assert publish_here('--replace', space='acme/theirs').at('main')['app.py'] != b'theirs'


def test_a_failed_upload_says_so_and_leaves_the_network_and_no_empty_space(hub, publish_here):
    hub.fail(f'POST .*/spaces/{SPACE}/commit/main', 500)
    with pytest.raises(SystemExit, match=f'^publishing to {SPACE} failed: .* made for it is removed again$'):
        publish_here()
    assert list(hub.repos) == ['acme/digits']


def test_a_dry_run_says_what_a_space_would_hold(hub, publish_here, capsys):
    publish_here('--dry-run')
    said = capsys.readouterr().out
    assert f'would push to the Space {SPACE}: README.md, requirements.txt, app.py, recipes/' in said
    assert not hub.repos


@pytest.mark.parametrize('space, message', [
    ('page', "--space must be OWNER/NAME, got 'page'"), ('acme/my page', "--space 'acme/my page' is not valid"),
    ('other/page', 'ann may not write to other/page, only to repositories of ann, acme')])
def test_a_space_of_a_bad_name_or_of_somebody_else_is_refused(hub, publish_here, space, message):
    with pytest.raises(SystemExit, match=f'^{message}'):
        publish_here(space=space)
    assert not hub.repos
