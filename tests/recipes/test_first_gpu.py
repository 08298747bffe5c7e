"""recipes/first_gpu.py: on the CPU it runs through, whatever fails is in the report, and it claims nothing."""
import json
import subprocess
import sys
from pathlib import Path

import first_gpu
import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'recipes' / 'first_gpu.py'


@pytest.fixture
def trial(tmp_path):
    return first_gpu.Trial(torch.device('cpu'), tmp_path)


@pytest.fixture
def sections(monkeypatch):
    """Of a report, to be filled; the environment is put back."""
    monkeypatch.setenv('TRITON_CACHE_DIR', 'before')
    found = {}
    monkeypatch.setattr(first_gpu, 'SECTIONS', found)
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason='of a machine without a GPU')
def test_without_a_gpu_it_says_what_to_do(tmp_path, sections):
    with pytest.raises(SystemExit, match='sees no GPU; --dry-run tries this script on the CPU'):
        first_gpu.main(tmp_path / 'report.md', dry_run=False)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_so_in_its_first_line_and_what_failed_is_in_the_report(tmp_path, sections, capsys):
    def fails(trial):
        raise RuntimeError('exit code 7')

    def breaks(trial):
        raise KeyError('top1')

    sections |= {'One': lambda trial: 'fine', 'Two': fails, 'Three': breaks, 'Four': lambda trial: 'fine, too'}
    with pytest.raises(SystemExit) as ended:
        first_gpu.main(tmp_path / 'report.md', dry_run=True)
    assert ended.value.code == 1
    report = (tmp_path / 'report.md').read_text()
    assert report.startswith(first_gpu.DRY_RUN + '\n\n## One\n\nfine\n\n## Two\n\n**Failed.** exit code 7\n\n## Three')
    assert "KeyError: 'top1'" in report
    assert report.endswith('## Four\n\nfine, too\n')
    assert 'failed: Two, Three' in capsys.readouterr().out


def test_what_is_done_is_written_before_the_rest_is(tmp_path, sections):
    output = tmp_path / 'report.md'
    sections |= {'One': lambda trial: 'fine', 'Two': lambda trial: output.read_text().count('fine')}
    first_gpu.main(output, dry_run=True)
    assert output.read_text().endswith('## Two\n\n1\n')


def test_a_command_is_shown_without_its_progress_and_its_warnings_are_kept(trial):
    shown = trial.run(sys.executable, '-c', 'print("a line\\n 50%|###   | 1/2\\nUserWarning: slow")')
    assert shown.splitlines()[2:-1] == ['a line', 'UserWarning: slow']
    assert shown.splitlines()[1].startswith(f'$ {sys.executable} -c')
    assert first_gpu.list_warnings(trial).splitlines() == ['```', 'UserWarning: slow', '```']


def test_a_command_that_fails_raises_with_what_it_said(trial):
    with pytest.raises(RuntimeError, match='(?s)exit code 3.*the reason'):
        trial.run(sys.executable, '-c', 'print("the reason"); raise SystemExit(3)')


@pytest.mark.slow
def test_device_and_first_steps_are_measured(trial):
    assert 'TB/s' in first_gpu.describe_device(trial)
    steps = first_gpu.take_first_steps(trial)
    assert '| in order |' in steps and '| timed |' in steps
    assert '| forward | 64 to 64 | 3x3 | 1x1 | 16x16 |' in steps


def test_of_single_layers_it_shows_the_first_of_the_order_and_the_fastest(trial, monkeypatch):
    layer = dict(in_channels=64, out_channels=128, kernel=3, stride=2, pixels=56, batch=128, mode='forward')
    milliseconds = dict(static=[2.0, 3.0], per_kernel=[9.0, 8.0], triton_64=[4.0, 5.0], reference=[7.0, 6.0])
    record = trial.folder / 'a.layers.json'
    record.write_text(json.dumps(dict(cases=[dict(layer, milliseconds=milliseconds)])))
    monkeypatch.setattr(first_gpu, 'bench', lambda trial, *options: f'```\na line\nwrote {record}\n```')
    assert '| forward | 128 | 64->128 3x3/2 at 56 | 2.000 ms | per_kernel 4.00 | triton_64 2.00 |' in (
        first_gpu.bench_layers(trial))


def test_digits_are_trained_on_one_and_on_two_processes(trial, monkeypatch):
    def run(trial, *command):
        output = command[command.index('--output') + 1]
        output.mkdir()
        processes = command[command.index('--num_processes') + 1]
        (output / 'result.json').write_text(json.dumps(dict(top1=97.5, loss=0.1, device=f'{processes} of them')))

    monkeypatch.setattr(first_gpu.Trial, 'run', run)
    rows = first_gpu.train_digits(trial).splitlines()[2:]
    assert rows == ['| 1 | 97.5 | 0.1 | 1 of them |', '| 2 | 97.5 | 0.1 | 2 of them |']


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='of a machine without a GPU')
def test_a_dry_run_goes_through_and_leaves_the_results_alone(tmp_path):
    def results():
        return {path: path.stat().st_mtime for path in (ROOT / 'recipes' / 'results').rglob('*') if path.is_file()}

    before = results()
    run = subprocess.run(
        [sys.executable, SCRIPT, '--dry-run', '--output', tmp_path / 'report.md'], cwd=tmp_path, capture_output=True,
        text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    report = (tmp_path / 'report.md').read_text()
    assert report.startswith(first_gpu.DRY_RUN)
    assert [line.removeprefix('## ') for line in report.splitlines() if line.startswith('## ')] == [*first_gpu.SECTIONS]
    assert results() == before
