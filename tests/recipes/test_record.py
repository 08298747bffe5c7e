"""recipes/_record.py: records are whole, valid JSON, and nothing that only describes a run can end it."""
import json

import _record
import pytest
import torch
from accelerate import Accelerator


def test_a_record_with_a_number_that_json_lacks_is_refused_and_the_old_one_stays(tmp_path):
    path = tmp_path / 'runs' / 'result.json'
    _record.write_json(path, dict(loss=0.5, name='Flößer'))
    for value in float('nan'), float('inf'):
        with pytest.raises(ValueError, match='not JSON compliant'):
            _record.write_json(path, dict(loss=value))
    assert _record.read_json(path) == dict(loss=0.5, name='Flößer')
    assert [found.name for found in path.parent.iterdir()] == ['result.json']


def test_a_file_that_could_not_be_finished_does_not_take_the_place_of_the_old_one(tmp_path):
    path = tmp_path / 'table.md'
    _record.write_text(path, 'old\n')
    with pytest.raises(KeyboardInterrupt), _record.replacing(path) as unfinished:
        unfinished.write_text('ne')
        raise KeyboardInterrupt
    assert path.read_text() == 'old\n'


def test_without_git_and_installed_packages_a_record_says_so(monkeypatch):
    def missing(package):
        raise _record.PackageNotFoundError(package)

    monkeypatch.setenv('PATH', '')
    monkeypatch.setattr(_record, 'version', missing)
    record = _record.circumstances('train.py')
    assert record['git_commit'] is None and record['versions']['torch'] is None
    assert record['versions']['python'] and record['finished'] and 'recipes/train.py' in record['command']


@pytest.mark.parametrize('benchmark', [False, True])
def test_a_record_says_whether_algorithms_were_chosen_by_their_time(benchmark, monkeypatch, fresh_accelerator):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', benchmark)
    record = json.loads(json.dumps(_record.hardware(Accelerator(cpu=True))))
    assert record['cudnn_benchmark'] is benchmark and record['device_type'] == 'cpu' and record['precision'] == 'fp32'
