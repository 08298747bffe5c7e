"""recipes/bench.py: what it times is what it says, and the documentation's table is made from its files."""
import json
import os
import sys
from functools import partial
from pathlib import Path

import _bench_data
import _bench_edge
import bench
import pytest
import timm
import torch
from _arguments import parse_bench
from _exported import FORMATS

from fmd_timm.ops import c_conv, operator

CHECKOUT = Path(__file__).parents[2]
NARROW = dict(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1))


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, 'IMAGE_SIZE', 32)
    monkeypatch.setattr(bench, 'RESULTS', tmp_path)
    monkeypatch.setattr(bench, 'cases', lambda device: [('infer', 1, 1), ('train', 2, 1)])
    yield tmp_path
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['bench.py', *arguments])
    bench.main(**vars(parse_bench(list(arguments))))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='of the CPU')
def test_networks_are_timed_and_become_a_table(small, monkeypatch, capsys):
    run(monkeypatch, '--models', 'resnet18', '--rounds', '1')
    record = json.loads(next(small.glob('*.json')).read_text())
    infer, train = record['cases']
    assert {(case['mode'], case['batch'], case['threads']) for case in record['cases']} == {
        ('infer', 1, 1), ('train', 2, 1)}
    assert set(train['milliseconds']) == {
        'static', 'static channels_last', 'fmd', 'fmd timed', 'od timed', 'dy timed', 'cond timed', 'fmd by reference'}
    assert set(infer['milliseconds']) == {*train['milliseconds'], 'static prepared', 'fmd prepared'}
    assert all(len(times) == 1 and min(times) > 0 for times in infer['milliseconds'].values())
    assert record['device'] and torch.__version__.startswith(record['versions']['torch'])

    capsys.readouterr()
    run(monkeypatch, '--table')
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('| resnet18, inference'))
    assert row.split(' | ')[2].strip() == f'**{bench.ratio(infer["milliseconds"], "fmd prepared"):.2f}**'


@pytest.mark.skipif(torch.cuda.is_available(), reason='of the CPU')
def test_layers_are_timed_by_every_algorithm(small, monkeypatch):
    monkeypatch.setattr(bench, 'layers_of', lambda name: [
        dict(in_channels=16, out_channels=32, kernel=3, stride=2, pixels=9, count=1)])
    run(monkeypatch, '--models', 'resnet18', '--layers', '--rounds', '1')
    record = json.loads(next(small.glob('*.layers.json')).read_text())
    assert [(case['batch'], case['mode']) for case in record['cases']] == [
        (1, 'forward'), (16, 'forward'), (16, 'backward')]
    for case in record['cases']:
        assert {'static', 'im2col', 'per_kernel', 'per_image'} <= set(case['milliseconds'])
        # 16 channels are too few for its gradients
        assert ('c_conv' in case['milliseconds']) == (c_conv.is_available() and case['mode'] == 'forward')


def test_layers_of_a_network_are_its_dynamic_convolutions():
    layers = bench.layers_of('resnet18')
    assert sum(layer['count'] for layer in layers) == 16
    assert dict(in_channels=256, out_channels=512, kernel=3, stride=2, pixels=14, count=1) in layers


def test_timing_is_switched_on_where_the_name_says_so(monkeypatch):
    """And off again: the user's setting is what it was."""
    seen, in_order = [], operator.fastest
    monkeypatch.setattr(bench, 'IMAGE_SIZE', 32)
    monkeypatch.setattr(bench.timm, 'create_model', partial(timm.create_model, **NARROW))

    def fastest(*args):
        seen.append(torch.backends.cudnn.benchmark)
        return in_order(*args)

    monkeypatch.setattr(operator, 'fastest', fastest)
    runs = bench.variants('resnet18', 'infer', 1, torch.device('cpu'))
    for name in 'fmd', 'fmd timed', 'od timed':
        seen.clear()
        runs[name]()
        assert set(seen) == {name != 'fmd'}
    assert not torch.backends.cudnn.benchmark


def test_as_the_authors_compute_it_is_the_same_network():
    model = timm.create_model('resnet18_fmd', num_classes=5, **NARROW).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(bench.as_the_authors(model)(x), expected, rtol=1e-4, atol=1e-4)


def test_ratio_is_to_the_faster_static_network_of_the_same_round():
    times = {'static': [9.0, 9.0, 9.0], 'static channels_last': [1.0, 2.0, 3.0], 'fmd': [2.0, 2.0, 9.0]}
    assert bench.ratio(times, 'fmd') == 2.0


@pytest.mark.parametrize('arguments, message', [
    (['--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--data', 'digits', '--epochs', '0'], '--epochs must be at least 1, got 0'),
    (['--models', 'resnet18', 'vit_tiny_patch16_224'], 'must be static CNNs of timm, got vit_tiny_patch16_224: '),
    (['--models', 'resnet18', 'resnet18_fmd'], 'must be static CNNs of timm, got resnet18_fmd: '),
    (['--models', 'resnet180'], 'must be static CNNs of timm, got resnet180: '),
    (['--edge', '--models', 'resnet26'], '--models must have a form with FMDConv, got resnet26'),
])
def test_bad_arguments_are_refused(arguments, message, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *arguments)


def test_the_loading_of_images_is_timed(monkeypatch, tmp_path, digits_folder, fresh_accelerator, capsys):
    monkeypatch.setattr(_bench_data, 'RESULTS', tmp_path)
    monkeypatch.setattr(_bench_data, 'SECONDS', 0.02)
    run(monkeypatch, '--data', 'digits', '--dataset', str(digits_folder), '--batch-size', '16', '--rounds', '2')
    path, = tmp_path.glob('*.digits.json')
    record = json.loads(path.read_text())
    assert record['recipe']['dataset'] == digits_folder.name and record['images'] == 64
    assert [len(record['per_core'][way]) for way in ('plain', 'ours')] == [2, 2]
    assert [epoch['images'] for epoch in record['epochs']] == [64, 64]
    for epoch in record['epochs']:
        assert 0 < epoch['first_batch_seconds'] <= 64 / epoch['images_per_second']
    row, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('| `digits`, 64 images, 8 px | ')]
    assert row in _bench_data.make_table() and record['images_on_device'] and ' on the device | ' in row


@pytest.mark.slow
@pytest.mark.parametrize('runtime', [
    'pytorch', *(pytest.param(runtime, marks=pytest.mark.slow) for runtime in ('onnx', 'openvino', 'executorch'))])
@pytest.mark.filterwarnings('ignore')  # of exporters
def test_networks_are_timed_in_other_runtimes(monkeypatch, tmp_path, runtime):
    monkeypatch.setattr(_bench_edge, 'RESULTS', tmp_path)
    monkeypatch.setattr(_bench_edge, 'IMAGE_SIZE', 32)
    monkeypatch.setattr(_bench_edge, 'BATCH', 3)
    monkeypatch.setattr(_bench_edge, 'usable_cores', lambda: 1)
    monkeypatch.setattr(_bench_edge, 'METHODS', ('fmd',))
    if runtime == 'pytorch':  # without a new process, which takes seconds
        monkeypatch.setattr(_bench_edge, 'in_new_process', lambda measure: measure())
    else:
        for package in FORMATS[runtime].packages:
            pytest.importorskip(package)
    monkeypatch.setattr(_bench_edge, 'installed', lambda: [runtime])
    run(monkeypatch, '--edge', '--models', 'mobilenetv3_small_100', '--rounds', '2')

    path, = tmp_path.glob('*.json')
    record = json.loads(path.read_text())
    stored = {f'fmd {weights}' for weights in _bench_edge.WEIGHTS[runtime]}
    batches = [1, 3] if runtime in _bench_edge.BATCHED else [1]
    assert [(case['batch'], case['threads']) for case in record['cases']] == [(batch, 1) for batch in batches]
    assert set(record['cases'][0]['milliseconds']) == {'static', 'fmd', *stored}
    assert all(len(times) == 2 for times in record['cases'][-1]['milliseconds'].values())
    for file in record['files']:
        assert file['bytes'] > 5e6 and ('resident_mib' in file) == (file['batch'] == '1')
        assert runtime == 'pytorch' or file.get('resident_mib', 2) > 1  # what is in use already is not counted
        is_whole = file['variant'] not in stored
        assert (file['largest_relative_difference'] < 2e-6) == is_whole
    size = {(file['variant'], file['batch']): file['bytes'] for file in record['files']}
    assert size['fmd', '1'] > 1.5 * size['static', '1']
    if runtime == 'openvino':  # which keeps them as float32
        stored.remove('fmd int8')
    assert all(size[variant, '1'] < size['fmd', '1'] for variant in stored)
    tables = _bench_edge.make_tables()
    label = f'{_bench_edge.LABELS[runtime]}'
    fmd = bench.ratio(record['cases'][0]['milliseconds'], 'fmd')
    assert f'| mobilenetv3_small_100, {label}, batch 1, 1 thread | ' in tables and f' ms | **{fmd:.2f}** | ' in tables
    assert f'| mobilenetv3_small_100, {label} | {size["static", "1"] / 1e6:.1f}, ' in tables


def test_a_runtime_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(FORMATS, 'openvino', FORMATS['openvino']._replace(packages=('no_such_runtime',)))
    assert 'openvino' not in _bench_edge.installed()
    assert 'OpenVINO is left out: this format needs no_such_runtime: pip install' in capsys.readouterr().out


@pytest.mark.parametrize('page, make_table', [
    ('fmd_timm/ops/README.md', bench.make_table),
    ('recipes/README.md', _bench_data.make_table),
    ('recipes/EXPORT.md', _bench_edge.make_tables),
])
def test_the_pages_have_the_tables_of_the_committed_files(page, make_table):
    table = make_table()
    assert table and table in (CHECKOUT / page).read_text()
