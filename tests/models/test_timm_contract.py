"""timm's own tests of its models, which its source distribution holds, pass on ours."""
import os
import re
import subprocess
import sys
import tarfile

import processes
import pytest
import timm

import fmd_timm  # noqa: F401  registers our models
from fmd_timm.models._pretrained import MODULES

TESTS_PER_MODEL = 11  # of timm 1.0.31: forward, backward, cfgs, script, features, intermediates (2), pruning, fx (3)
BY_DEFAULT = 'resnet20_fmd_cifar'  # all take minutes

# timm's tests collect their models with list_models. Those of intermediate features ask for timm's own modules by name.
PLUGIN = """
import os

import timm

import fmd_timm

list_all_models = timm.list_models


def list_models(filter='', module='', **kwargs):
    ours = list_all_models(filter, fmd_timm.models._pretrained.MODULES, **kwargs)
    return [name for name in ours if name.partition('.')[0] == os.environ['ONLY']]


timm.list_models = list_models
"""


@pytest.fixture(scope='session')
def timm_tests(tmp_path_factory):
    """A folder with tests/ and the pytest settings of the installed timm."""
    folder = tmp_path_factory.mktemp('timm')
    download = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', f'timm=={timm.__version__}', '--no-deps', '--no-binary=:all:',
         '--retries=1', '--timeout=15', '--disable-pip-version-check', f'--dest={folder}'],
        capture_output=True, text=True,
    )
    if download.returncode:
        pytest.skip(f'no source distribution of timm {timm.__version__}: {download.stderr.strip()[-300:]}')
    with tarfile.open(next(folder.glob('timm-*.tar.gz'))) as sdist:
        for member in sdist.getmembers():
            member.name = member.name.partition('/')[2]  # without the folder timm-<version>
            if member.name.startswith('tests/') or member.name == 'pyproject.toml':
                sdist.extract(member, folder, filter='data')
    (folder / 'only_ours.py').write_text(PLUGIN)
    return folder


@pytest.mark.parametrize('name', [
    name if name == BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow)
    for name in timm.list_models(module=MODULES)
])
def test_timm_tests_of_its_models_pass_on_ours(name, timm_tests):
    env = {key: value for key, value in os.environ.items() if key != 'GITHUB_ACTIONS'}  # where they leave some out
    done = processes.run(
        '-m', 'pytest', '-p', 'only_ours', '-p', 'no:cacheprovider', '-q', 'tests/test_models.py',
        '-k', f'{name} and not pretrained', cwd=timm_tests, env=dict(env, ONLY=name),
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    summary = done.stdout.splitlines()[-1]
    assert int(re.search(r'(\d+) passed', summary).group(1)) >= TESTS_PER_MODEL, summary
    assert 'skipped' not in summary, summary
