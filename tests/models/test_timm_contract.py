"""timm's own tests of its models, which its source distribution holds, pass on ours."""
import os
import re
import subprocess
import sys
import tarfile

import pytest
import timm

import fmd_timm  # noqa: F401  registers our models

TESTS_PER_MODEL = 11  # of timm 1.0.31: forward, backward, cfgs, script, features, intermediates (2), pruning, fx (3)

# timm's tests collect their models with list_models. Those of intermediate features ask for timm's own modules by name.
PLUGIN = """
import os

import timm

import fmd_timm

list_all_models = timm.list_models


def list_models(filter='', module='', **kwargs):
    ours = list_all_models(filter, fmd_timm.models._pretrained.MODULES, **kwargs)
    return [name for name in ours if os.environ['ONLY'] in name]


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
    (folder / 'only_fmd.py').write_text(PLUGIN)
    return folder


@pytest.mark.parametrize('family', [
    'resnet18_fmd', 'mobilenetv3_small_100_dy',
    *(pytest.param(family, marks=pytest.mark.slow) for family in (
        'resnet50_fmd', 'resnet18_cond', 'resnet18_dy', 'resnet18_od', 'resnet18_cifar', 'mobilenetv3_small_100_fmd')),
])
def test_timm_tests_of_its_models_pass_on_ours(family, timm_tests):
    env = {key: value for key, value in os.environ.items() if key != 'GITHUB_ACTIONS'}  # where they leave some out
    env['ONLY'] = family
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'only_fmd', '-p', 'no:cacheprovider', '-q', 'tests/test_models.py',
         '-k', f'{family} and not pretrained'],
        cwd=timm_tests, env=env, capture_output=True, text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    summary = result.stdout.splitlines()[-1]
    passed = int(re.search(r'(\d+) passed', summary).group(1))
    assert passed >= TESTS_PER_MODEL * len(timm.list_models(f'{family}*')), summary
    assert 'skipped' not in summary, summary
