"""recipes/export.py: a checkpoint becomes a file that another runtime computes the same with."""
import copy
import dataclasses
import hashlib
import json

import datasets
import export
import onnx
import predict
import pytest
import timm
import tiny
import torch
import torch.nn as nn
from _arguments import EXPORT_SUFFIXES
from _dataset import load_digits
from _exported import FORMATS, PRODUCTS
from _stored import store_kernels_int8
from hub_server import Commit, Repo
from PIL import Image
from test_export import make_layers
from test_inference import METHODS, randomize

from fmd_timm import DynamicConv2d, prepare_for_inference
from fmd_timm.hub import save_for_hub

# By weights: the largest difference of logits, and how many of 50 images have the same best class at least.
BOUNDS = {'fp32': (2e-6, 50), 'fp16': (1e-3, 49), 'int8': (1e-3, 49), 'int8-static': (0.1, 46)}
NAMES = [f'digit {i}' for i in range(10)]
pytestmark = [pytest.mark.usefixtures('fresh_accelerator'), pytest.mark.filterwarnings('ignore')]  # of exporters


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory, digits_folder):
    """A run, of a network whose branches all count: those of a new one end in BatchNorms of zeros."""
    folder = tmp_path_factory.mktemp('run')
    torch.manual_seed(0)
    network = randomize(timm.create_model(tiny.NAME, num_classes=10))
    save_for_hub(network, folder, dict(label_names=NAMES), data_config=dict(input_size=(3, 8, 8), crop_pct=0.9))
    recipe = tiny.make_recipe(digits_folder, image_size=8)
    (folder / 'result.json').write_text(json.dumps(dict(recipe=dataclasses.asdict(recipe))))
    return folder


def run(*arguments):
    return export.main(**vars(export.parse_export([str(argument) for argument in arguments])))


@pytest.mark.parametrize('format, batch, weights', [
    ('onnx', '1', 'fp32'),
    ('openvino', '1', 'fp32'), ('openvino', 'dynamic', 'fp16'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('onnx', 'dynamic', 'int8'), ('onnx', '1', 'int8-static'), ('torch-export', 'dynamic', 'fp16'),
        ('onnx', 'dynamic', 'fp16'), ('torch-export', '1', 'fp32'),
        ('torch-export', '1', 'int8'), ('openvino', '1', 'int8'),
        ('executorch', '1', 'fp32'), ('executorch', 'dynamic', 'fp32'))),
])
def test_a_file_and_its_record(checkpoint, tmp_path, capsys, format, batch, weights):
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    path = tmp_path / f'model{EXPORT_SUFFIXES[format]}'
    record = run(checkpoint, '--format', format, '--batch', batch, '--weights', weights, '--output', path)
    files = {path} if format != 'openvino' else {path, path.with_suffix('.bin')}
    assert set(tmp_path.iterdir()) == {*files, tmp_path / f'{path.name}.json'}
    assert json.loads((tmp_path / f'{path.name}.json').read_text()) == json.loads(json.dumps(record))
    assert record['files'] == {
        file.name: dict(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
        for file in files}
    weights_sha256 = hashlib.sha256((checkpoint / 'model.safetensors').read_bytes()).hexdigest()
    assert record['checkpoint']['revision'] == f'sha256 {weights_sha256}'
    assert record['images'] == 50 and record['infer_ms_per_image'] > 0
    largest, least = BOUNDS[weights]
    assert record['largest_relative_difference'] < largest and record['top1_agreement'] >= least
    assert weights == 'fp32' or record['largest_relative_difference'] > 1e-5  # they are stored otherwise
    assert abs(record['top1'] - record['pytorch_top1']) <= 2 * (50 - record['top1_agreement'])
    assert {'torch', *FORMATS[format].packages} <= record['versions'].keys()

    network = timm.create_model(f'local-dir:{checkpoint}', pretrained=True).eval()
    logits, metadata = FORMATS[format].open(path)
    config = timm.data.resolve_model_data_config(network)
    assert metadata.label_names == NAMES and metadata.data_config == json.loads(json.dumps(config))
    for size in (1,) if batch == '1' else (1, 2, 5):
        x = torch.randn(size, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(logits(x), network(x), rtol=0, atol=largest)  # of logits below 1
    if format == 'executorch':  # XNNPACK computes all convolutions, those of mixed kernels as products of matrices
        convs = sum(isinstance(module, nn.Conv2d | DynamicConv2d) for module in network.modules())
        assert record['delegated']['aten::convolution'] + record['delegated']['aten::bmm'] == convs
        assert not record['not_delegated'].keys() & set(PRODUCTS)
        with pytest.raises(RuntimeError):
            logits(torch.randn(2 if batch == '1' else 9, 3, 8, 8))
    if format == 'onnx':
        picture = tmp_path / 'digit.png'
        load_digits()['test'][0]['image'].save(picture)
        lines = [predict_lines(source, picture, capsys) for source in (checkpoint, path)]
        assert (lines[0] == lines[1] or weights == 'int8-static') and len(lines[0]) == len(lines[1]) == 4


@pytest.mark.slow
def test_accuracy_is_of_all_images_with_labels_of_the_network(checkpoint, digits_folder, tmp_path, capsys):
    options = '--format', 'torch-export', '--output', tmp_path / 'model.pt2'
    rows = datasets.load_dataset('parquet', data_files=str(digits_folder / 'test.parquet'), split='train')
    network = timm.create_model(f'local-dir:{checkpoint}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad():
        best = network(torch.stack([transform(image.convert('RGB')) for image in rows['image']])).argmax(1)
    expected = 100 * (best == torch.tensor(rows['label'])).double().mean().item()
    for images in (), ('--images', digits_folder):
        record = run(checkpoint, *options, *images)
        assert record['top1'] == record['pytorch_top1'] == pytest.approx(expected)
        assert f'top-1: {expected:.2f}, in PyTorch {expected:.2f}' in capsys.readouterr().out
        assert record['compared_on'].endswith("split 'test'") and record['images'] == 50

    folder = tmp_path / 'pictures'
    folder.mkdir()
    for n in range(3):
        rows[n]['image'].save(folder / f'{n}.png')
    record = run(checkpoint, *options, '--images', folder)
    assert record['top1'] is record['pytorch_top1'] is None and record['top1_agreement'] == record['images'] == 3
    assert 'no accuracy is measured: ' in capsys.readouterr().out
    (folder / '1.png').write_bytes(b'no picture')
    with pytest.raises(SystemExit, match="split 'train': the image in row 1 .* cannot be decoded"):
        run(checkpoint, *options, '--images', folder)


@pytest.mark.parametrize('name, output', [
    ('hf-hub:acme/digits', 'digits'), (f'{tiny.NAME}.mine', f'{tiny.NAME}.mine')])
def test_a_checkpoint_of_the_hub(name, output, hub, checkpoint, tmp_path, monkeypatch):
    commits = hub.repos.setdefault('acme/digits', Repo()).commits
    commits.append(Commit({name: (checkpoint / name).read_bytes() for name in (
        'model.safetensors', 'config.json', 'result.json')}, 'upload'))
    cfg = dataclasses.replace(
        timm.get_pretrained_cfg(tiny.NAME), hf_hub_id='acme/digits', tag='mine', num_classes=10, input_size=(3, 8, 8),
        crop_pct=0.9, label_names=NAMES)
    monkeypatch.setitem(timm.models._registry._model_pretrained_cfgs, f'{tiny.NAME}.mine', cfg)
    monkeypatch.chdir(tmp_path)
    record = run(name, '--format', 'torch-export')
    assert {path.name for path in tmp_path.iterdir()} == {f'{output}.pt2', f'{output}.pt2.json'}
    assert (record['checkpoint']['repo'], record['checkpoint']['revision']) == (
        'acme/digits', f'commit {commits[-1].id}')
    assert record['images'] == 50 and record['largest_relative_difference'] < 2e-6


def predict_lines(source, picture, capsys):
    capsys.readouterr()
    predict.main(**vars(predict.parse_predict([str(source), str(picture), '--top', '3'])))
    return capsys.readouterr().out.splitlines()


def test_files_of_others_and_none_are_refused(tmp_path, capsys):
    path, image = tmp_path / 'model.onnx', tmp_path / 'image.png'
    Image.new('RGB', (8, 8)).save(image)
    with pytest.raises(SystemExit, match='checkpoint .*model.onnx could not be loaded: NoSuchFile'):
        predict_lines(path, image, capsys)
    x = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in 'xy']
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['x'], ['y'])], 'graph', x[:1], x[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 20)], ir_version=10), path)
    with pytest.raises(SystemExit, match="does not say how images are prepared: its metadata has no 'input_size'"):
        predict_lines(path, image, capsys)


@torch.no_grad()
@pytest.mark.parametrize('method', METHODS)
def test_kernels_in_int8_are_near_those_in_float32(method):
    prepared = prepare_for_inference(make_layers(method))
    stored = store_kernels_int8(copy.deepcopy(prepared))
    kernels = [name for name, t in stored.state_dict().items() if t.dtype == torch.int8]
    assert len(kernels) == 4 and all(name.endswith('weight') for name in kernels)
    x = torch.randn(3, 3, 17, 12)
    expected, found = prepared(x), stored(x)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert 1e-5 < error < 2e-2


@pytest.mark.slow
def test_weights_of_fewer_bytes_make_a_smaller_file(tmp_path, digits_folder):
    network = timm.create_model(tiny.NAME, num_classes=10, channels=(32, 64, 64, 128))
    save_for_hub(randomize(network), tmp_path, data_config=dict(input_size=(3, 8, 8)))
    sizes = {
        (format, weights): run(
            tmp_path, '--format', format, '--weights', weights, '--images', digits_folder
        )['files'][f'model{EXPORT_SUFFIXES[format]}']['bytes']
        for format in ('onnx', 'torch-export') for weights in ('fp32', 'fp16', 'int8')}
    for format in 'onnx', 'torch-export':
        assert sizes[format, 'fp16'] < 0.65 * sizes[format, 'fp32']
        assert sizes[format, 'int8'] < 0.45 * sizes[format, 'fp32']


@pytest.mark.slow
def test_executorch_takes_layers_that_see_a_single_pixel(tmp_path, digits_folder):
    pytest.importorskip('executorch')
    network = timm.create_model(tiny.NAME, num_classes=10, layers=(1, 1, 1, 2))  # the last block sees and has one
    save_for_hub(randomize(network), tmp_path, data_config=dict(input_size=(3, 8, 8)))
    record = run(tmp_path, '--format', 'executorch', '--images', digits_folder)
    assert record['largest_relative_difference'] < 2e-6


def test_a_file_that_computes_something_else_is_not_kept(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'prepare_for_inference', lambda _: randomize(timm.create_model(tiny.NAME)).eval())
    with pytest.raises(SystemExit, match='the file computes something else: .* expected 0.0001 at most'):
        run(checkpoint, '--format', 'torch-export', '--output', tmp_path / 'model.pt2')
    assert not list(tmp_path.iterdir())


def test_a_file_that_its_runtime_does_not_compute_is_not_kept(checkpoint, tmp_path, monkeypatch):
    def open_broken(path):
        return lambda images: images.reshape(7, -1), None

    monkeypatch.setitem(FORMATS, 'torch-export', FORMATS['torch-export']._replace(open=open_broken))
    with pytest.raises(SystemExit, match="its runtime does not compute it .RuntimeError: shape '.7, -1.' is invalid"):
        run(checkpoint, '--format', 'torch-export', '--batch', 'dynamic', '--output', tmp_path / 'model.pt2')
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_named(checkpoint, digits_folder, tmp_path, monkeypatch):
    for arguments, message in [
        ((checkpoint, '--format', 'onnx', '--output', 'model.pt'), '--output must end in .onnx for --format onnx, got'),
        ((checkpoint, '--format', 'openvino', '--weights', 'int8-static'),
         '--weights must be one of fp32, fp16, int8 for --format openvino, got int8-static'),
        ((checkpoint, '--format', 'onnx', '--images', tmp_path), "dataset '.*' could not be loaded"),
        ((tmp_path, '--format', 'onnx'), 'has no config.json and no model.safetensors'),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*arguments)
    save_for_hub(timm.create_model(tiny.NAME, num_classes=0), tmp_path)
    with pytest.raises(SystemExit, match='has no classifier'):
        run(tmp_path, '--format', 'onnx')
    save_for_hub(timm.create_model(tiny.STATIC), tmp_path)
    with pytest.raises(SystemExit, match='--weights int8 is for the kernels of dynamic convolutions'):
        run(tmp_path, '--format', 'onnx', '--weights', 'int8', '--images', digits_folder)
    with pytest.raises(SystemExit, match='--images must be .* has no result.json of a training run'):
        run(tmp_path, '--format', 'onnx')
    monkeypatch.setitem(FORMATS, 'onnx', FORMATS['onnx']._replace(packages=('onnx', 'no_such_runtime')))
    with pytest.raises(SystemExit, match=r"needs no_such_runtime: pip install -e '.\[export\]'"):
        run(tmp_path, '--format', 'onnx')
