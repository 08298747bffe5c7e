"""`python -m fmd_timm <script>`, with scripts that do what those of timm's repository do: they are not on PyPI."""
import json
import os
import sys
from pathlib import Path

import processes
import pytest
import timm

import fmd_timm.__main__

ENVIRONMENT = {**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])}

SCRIPT = """
import argparse
import json
import multiprocessing
import sys

import neighbour

def double(x):
    return 2 * x

if __name__ == '__main__':
    import timm
    parser = argparse.ArgumentParser()
    parser.add_argument('--model')
    model = timm.create_model(parser.parse_args().model)
    with multiprocessing.get_context('spawn').Pool(1) as pool:  # as DataLoader's workers are started on some systems
        doubled = pool.map(double, [1, 2])
    print(json.dumps(dict(
        parameters=sum(p.numel() for p in model.parameters()), arguments=sys.argv[1:], path=sys.path[0], file=__file__,
        neighbour=neighbour.__file__, doubled=doubled, prog=parser.prog)))
    sys.exit(3)
"""


@pytest.fixture
def script(tmp_path):
    """A script with a module beside it, which it imports, that ends with exit status 3."""
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'neighbour.py').touch()
    path = tmp_path / 'scripts' / 'script.py'
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def run_here(monkeypatch):
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['__main__.py', *map(str, args)])
        monkeypatch.setattr(sys, 'path', sys.path.copy())
        fmd_timm.__main__.main()
    return run


def test_a_script_that_only_knows_timm_finds_our_models(script, tmp_path):
    command = '-m', 'fmd_timm', 'scripts/script.py', '--model', 'resnet18_fmd_cifar'
    done = processes.run(*command, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 3, done.stderr
    model = timm.create_model('resnet18_fmd_cifar')
    assert json.loads(done.stdout)['parameters'] == sum(p.numel() for p in model.parameters())


def test_the_script_runs_as_without_us(script, tmp_path):
    args = 'scripts/script.py', '--model', 'test_resnet'
    alone, done = (processes.run(*way, cwd=tmp_path, env=ENVIRONMENT) for way in (args, ('-m', 'fmd_timm', *args)))
    assert done.returncode == alone.returncode == 3, done.stderr + alone.stderr
    assert json.loads(done.stdout) == json.loads(alone.stdout)
    assert json.loads(done.stdout)['neighbour'] == str(script.parent / 'neighbour.py')


def test_an_error_of_the_script_is_its_own(run_here, tmp_path):
    (tmp_path / 'broken.py').write_text('import timm\ntimm.create_model("nothing")')
    with pytest.raises(RuntimeError, match='Unknown model .nothing.') as error:
        run_here(tmp_path / 'broken.py')
    assert str(tmp_path / 'broken.py') in [str(entry.path) for entry in error.traceback]


@pytest.mark.parametrize('name', ['validate.py', 'folder', 'validate'])
def test_a_path_without_a_script_is_refused(name, run_here, tmp_path, monkeypatch, capsys):
    (tmp_path / 'folder').mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='2'):
        run_here(name)
    message = capsys.readouterr().err
    assert f"script must be the path of a Python file, got '{name}'" in message and 'pytorch-image-models' in message


def test_help_is_ours_before_the_script_and_the_scripts_after_it(run_here, tmp_path, capsys):
    (tmp_path / 'script.py').write_text('import argparse\nargparse.ArgumentParser(description="theirs").parse_args()')
    for args, text in (['--help'], 'with the models of this'), ([tmp_path / 'script.py', '--help'], 'theirs'):
        with pytest.raises(SystemExit, match='0'):
            run_here(*args)
        assert text in capsys.readouterr().out
