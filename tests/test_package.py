"""What `pip install fmd-timm` brings."""
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def test_importing_the_package_is_light():
    script = 'import sys, fmd_timm; print([m for m in ("accelerate", "datasets", "transformers") if m in sys.modules])'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


@pytest.mark.slow
def test_the_wheel_holds_the_records_of_published_checkpoints(tmp_path):
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', tmp_path, CHECKOUT]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and 'hatchling' in done.stderr and 'No matching distribution' in done.stderr:
        pytest.skip('building a wheel needs hatchling from PyPI')
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob('fmd_timm-*.whl')
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'fmd_timm/hub_cards/{path.name}' for path in (CHECKOUT / 'hub_cards').iterdir()} <= names
    assert {'fmd_timm/py.typed', 'fmd_timm/models/dynamic_resnet.py'} <= names
    assert not [name for name in names if name.startswith(('tests/', 'recipes/'))]


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', CHECKOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
