"""--results-file of recipes/evaluate.py and bench.py: the columns of timm's validate.py and benchmark.py."""
import csv
import sys

import bench
import evaluate
import pytest
import timm
import tiny
import torch
from _arguments import parse_bench
from accelerate.state import AcceleratorState

from fmd_timm.hub import save_for_hub

RUNS = 'static', 'static channels_last', 'fmd', 'fmd timed', 'od timed', 'dy timed', 'cond timed'


def read(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def score(monkeypatch, *arguments):
    monkeypatch.setattr(evaluate, 'use_all_cores', lambda accelerator: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate.main(**vars(evaluate.parse_evaluate([*map(str, arguments), '--num-workers', '0'])))


def time_networks(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['bench.py'])
    bench.main(**vars(parse_bench([*map(str, arguments)])))


def test_evaluate_writes_what_it_prints(digits_folder, tmp_path, monkeypatch, capsys, fresh_accelerator):
    torch.manual_seed(0)
    save_for_hub(timm.create_model(tiny.NAME, zero_init_last=False), tmp_path / 'network', data_config=dict(
        input_size=(3, 8, 8), crop_pct=0.875, interpolation='bilinear'))
    file = tmp_path / 'new' / 'results.csv'
    score(monkeypatch, tmp_path / 'network', '--dataset', digits_folder, '--results-file', file)
    printed = dict(line.split(': ', 1) for line in capsys.readouterr().out.splitlines() if ': ' in line)
    row, = read(file)
    assert list(row) == [
        'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']
    assert [row[name] for name in ('model', 'img_size', 'crop_pct', 'interpolation')] == [
        str(tmp_path / 'network'), '8', '0.875', 'bilinear']
    for name, label in ('top1', 'top-1'), ('top5', 'top-5'):
        assert f'{float(row[name]):.2f}' == printed[label] and 0 < float(row[name]) < 100
        assert float(row[name]) + float(row[f'{name}_err']) == pytest.approx(100)
    assert float(row['param_count']) == round(int(printed['parameters']) / 1e6, 2) > 0


def test_bench_writes_the_largest_batches_of_each_network(tmp_path, monkeypatch):
    """Medians, by hand."""
    def measured(name, device, rounds):
        return [dict(
            model=name, mode=mode, batch=batch, threads=1, peak_memory_mib=None,
            milliseconds={run: [10.0 * batch + i, 10.0 * batch + i, 1e6] for i, run in enumerate(RUNS)})
            for mode, batch in (('infer', 4), ('infer', 1), ('train', 2))]

    monkeypatch.setattr(bench, 'bench_network', measured)
    monkeypatch.setattr(bench, 'RESULTS', tmp_path)
    monkeypatch.setattr(bench, 'IMAGE_SIZE', 64)
    time_networks(monkeypatch, '--models', 'mobilenetv2_050', '--results-file', tmp_path / 'results.csv')
    rows = read(tmp_path / 'results.csv')
    assert list(rows[0].items()) == list(dict(
        model='mobilenetv2_050', infer_samples_per_sec='100.0', infer_step_time='40.0', infer_batch_size='4',
        infer_img_size='64', infer_gmacs='0.01', infer_macts='0.3', train_samples_per_sec='100.0',
        train_step_time='20.0', train_batch_size='2', train_img_size='64', param_count='1.97').items())
    assert [(row['model'], row['infer_step_time'], row['param_count']) for row in rows[1:]] == [
        ('mobilenetv2_050_fmd', '43.0', '5.03'), ('mobilenetv2_050_od', '44.0', '4.44'),
        ('mobilenetv2_050_dy', '45.0', '4.57'), ('mobilenetv2_050_cond', '46.0', '4.01')]
    assert float(rows[1]['infer_macts']) == pytest.approx(0.3, rel=0.1)


def test_a_file_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, fresh_accelerator):
    (tmp_path / 'file').touch()
    monkeypatch.setattr(bench, 'bench_network', None)
    option = '--results-file', tmp_path / 'file' / 'results.csv'
    for command in (
            lambda: score(monkeypatch, 'no_such_checkpoint', '--dataset', 'no_such_dataset', *option),
            lambda: time_networks(monkeypatch, *option)):
        with pytest.raises(SystemExit, match='--results-file .*results.csv cannot be written: '):
            command()


@pytest.mark.parametrize('parse, arguments, message', [
    (evaluate.parse_evaluate, ['runs/digits', '--dataset', 'digits', '--results-file', 'results.json'],
     "argument --results-file: must end in .csv, got 'results.json'"),
    (parse_bench, ['--layers', '--results-file', 'results.csv'], '--results-file is of whole networks: leave out'),
])
def test_bad_arguments_are_named(parse, arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err
