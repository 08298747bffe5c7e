"""recipes/_record.py: records are whole, valid JSON, and nothing that only describes a run can end it."""
import json
import sys

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


@pytest.mark.parametrize('number', ['NaN', 'Infinity', '-Infinity'])
def test_a_number_that_json_lacks_is_not_read_either(number, tmp_path):
    (tmp_path / 'result.json').write_text(f'{{"loss": {number}}}')
    with pytest.raises(ValueError, match=f'^{number} is not JSON'):
        _record.read_json(tmp_path / 'result.json')


TOKEN = 'hf_' + 'aB3' * 11 + 'z'


@pytest.mark.parametrize('typed, published', [
    ('digits --output runs/mine', 'digits --output runs/mine'),  # within the checkout
    ('--dataset {0}/patients --seed 1', '--dataset patients --seed 1'),
    ('--dataset={0}/patients', '--dataset=patients'),
    ('--init inflated:{0}/start', '--init inflated:start'),
    ('--init local-dir:{0}/start', '--init local-dir:start'),
    ('--dataset ../patients/', '--dataset patients'),
    ('--init hf-hub:acme/digits@main', '--init hf-hub:acme/digits@main'),
    (f'--dataset {TOKEN}', "--dataset '***'"),
    (f'--dataset https://ann:{TOKEN}@host/x', "--dataset 'https://***@host/x'"),
    ('--hub-token secret --seed 1', "--hub-token '***' --seed 1"),
    ('--api-key=secret', "'--api-key=***'"),
])
def test_a_command_is_recorded_without_folders_of_others_and_without_tokens(typed, published, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', *typed.format(tmp_path).split()])
    assert _record.circumstances('train.py')['command'] == f'python recipes/train.py {published}'


def test_settings_are_published_likewise(tmp_path):
    settings = dict(dataset=str(tmp_path / 'patients'), model=TOKEN, lr=0.1, init=None, scale=[0.1, 1.0])
    assert _record.public(settings) == dict(dataset='patients', model='***', lr=0.1, init=None, scale=[0.1, 1.0])


def test_the_current_folder_is_published_by_its_name(tmp_path, monkeypatch):
    (tmp_path / 'my flowers').mkdir()
    monkeypatch.chdir(tmp_path / 'my flowers')
    assert _record.public(dict(dataset='.')) == dict(dataset='my flowers')


def test_times_are_of_the_hardware_that_the_record_names(fresh_accelerator):
    here = _record.hardware(Accelerator(cpu=True))
    elsewhere = dict(here, device_count=8)
    record = dict(here, top1=50.0, steps_per_epoch=10, global_batch=8, legs=[
        dict(here, epoch_seconds=[9.0, 2.0, 2.0], data_wait_seconds=[9.0, 0.5, 0.5]),
        dict(elsewhere, epoch_seconds=[9.0, 7.0], data_wait_seconds=[9.0, 7.0]),
        dict(here, epoch_seconds=[8.0, 4.0, 6.0], data_wait_seconds=[8.0, 0.0, 1.5]),
    ])
    assert _record.training_times(record) == dict(
        median_epoch_seconds=3.0, data_wait_share=0.25, ies=6.0, rcs=0.5 / 3, train_images_per_second=80 / 3.0)
    only_first = dict(record, legs=[
        dict(here, epoch_seconds=[9.0], data_wait_seconds=[0.0]),
        dict(elsewhere, epoch_seconds=[1.0, 1.0], data_wait_seconds=[0.0, 0.0])])
    assert _record.training_times(only_first)['median_epoch_seconds'] == 9.0
    begun_elsewhere = dict(record, legs=[
        dict(elsewhere, epoch_seconds=[], data_wait_seconds=[]),
        dict(here, step=3, epoch_seconds=[5.0], data_wait_seconds=[0.0])])
    assert _record.training_times(begun_elsewhere)['median_epoch_seconds'] is None
    finished_here = dict(record, legs=[
        dict(elsewhere, epoch_seconds=[1.0], data_wait_seconds=[0.0]),
        dict(here, epoch_seconds=[], data_wait_seconds=[])])
    assert set(_record.training_times(finished_here).values()) == {None}
