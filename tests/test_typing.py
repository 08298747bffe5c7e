"""py.typed: type checkers read our annotations, which are true of a program that uses the public API."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typed_program

CHECKOUT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_program_works(tmp_path):
    typed_program.main(tmp_path)
    assert (tmp_path / 'config.json').is_file()


@pytest.mark.slow  # mypy reads all of PyTorch
def test_mypy_knows_its_types_and_finds_its_mistakes(tmp_path):
    """As where the package is installed: of what is in it, mypy reads the annotations alone."""
    pytest.importorskip('mypy')
    command = [
        sys.executable, '-m', 'mypy', '--strict', '--follow-imports', 'silent', '--cache-dir', tmp_path,
        typed_program.__file__]
    done = subprocess.run(
        command, cwd=tmp_path, env=dict(os.environ, MYPYPATH=str(CHECKOUT)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
