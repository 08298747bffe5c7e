"""recipes/predict.py: the classes of images, with their names."""
import csv
import json
from types import SimpleNamespace

import _classes
import predict
import pytest
import timm
import tiny
import torch
from _dataset import load_digits
from PIL import Image

from fmd_timm.hub import save_for_hub

NAMES = [f'digit {i}' for i in range(10)]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint')
    torch.manual_seed(0)
    save_for_hub(timm.create_model(tiny.NAME), folder, dict(label_names=NAMES), data_config=dict(input_size=(3, 8, 8)))
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A folder of two digits, one in a folder below and with another suffix, beside a file that is no image."""
    folder = tmp_path_factory.mktemp('pictures')
    rows = load_digits()['test']
    rows[0]['image'].save(folder / 'b.png')
    (folder / 'a').mkdir()
    rows[1]['image'].save(folder / 'a' / 'c.JPG')
    (folder / 'notes.txt').write_text('none')
    return folder


def run(capsys, *arguments):
    """Lines as printed: a path, then its classes."""
    predict.main(**vars(predict.parse_predict([str(argument) for argument in arguments])))
    return capsys.readouterr().out.splitlines()


def expected(checkpoint, path, top):
    model = timm.create_model(f'local-dir:{checkpoint}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        probabilities = model(transform(Image.open(path).convert('RGB')).unsqueeze(0)).softmax(1)[0]
    return [f'{100 * p.item():8.2f} %  {NAMES[i]}' for p, i in zip(*probabilities.topk(top))]


def test_files_and_folders_are_classified_with_the_names_of_the_checkpoint(checkpoint, pictures, capsys):
    lines = run(capsys, checkpoint, pictures / 'b.png', pictures, '--top', 2)
    first, second = pictures / 'a' / 'c.JPG', pictures / 'b.png'
    assert lines == [
        str(second), *expected(checkpoint, second, 2), str(first), *expected(checkpoint, first, 2), str(second),
        *expected(checkpoint, second, 2),
    ]


def test_there_are_no_more_classes_than_the_network_has(checkpoint, pictures, capsys):
    lines = run(capsys, checkpoint, pictures / 'b.png', '--top', 99)
    assert sorted(line.partition('%  ')[2] for line in lines[1:]) == NAMES
    assert sum(float(line.partition('%')[0]) for line in lines[1:]) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize('cfg, num_classes, names', [
    (dict(label_names=('a', 'b')), 2, ['a', 'b']),
    (dict(label_names={'0': 'n1', '2': 'n2'}, label_descriptions={'n2': 'a cat'}), 3, ['n1', 'class 1', 'a cat']),
    ({}, 2, ['class 0', 'class 1']),
])
def test_classes_have_the_best_names_there_are(cfg, num_classes, names):
    assert _classes.shown_names(SimpleNamespace(pretrained_cfg=cfg, num_classes=num_classes), 'checkpoint') == names


def test_imagenet_checkpoints_of_timm_have_imagenets_names():
    names = _classes.shown_names(timm.create_model('test_resnet', pretrained=False), 'checkpoint')
    assert len(names) == 1000 and names[0].startswith('tench')


@pytest.mark.parametrize('cfg, message', [
    (dict(label_names=['a', 'b']), 'label_names in its configuration must be 3 names, .*got 2 names'),
    (dict(label_names=['a', 'b', 'c', 'd']), 'must be 3 names, .*got 4 names'),
    (dict(label_names=[['a'], ['b'], ['c']]), r"got \[\['a'\], "),
    (dict(label_names=7), 'got 7'),
    (dict(label_names={'0': ['a']}), r"got \[\['a'\], 'class 1'"),
    (dict(label_names=['a', 'b', 'c'], label_descriptions=['x']), r"label_descriptions .* got \['x'\]"),
])
def test_names_that_are_none_are_refused(cfg, message):
    with pytest.raises(SystemExit, match=f"checkpoint 'x': .*{message}"):
        _classes.shown_names(SimpleNamespace(pretrained_cfg=cfg, num_classes=3), "checkpoint 'x'")


def test_a_terminal_does_not_obey_a_name(pictures, tmp_path, capsys):
    names = ['\x1b[31mred\n', 'фото', 'a\u202eb', *NAMES[3:]]
    save_for_hub(
        timm.create_model(tiny.NAME), tmp_path, dict(label_names=names), data_config=dict(input_size=(3, 8, 8)))
    lines = run(capsys, tmp_path, pictures / 'b.png', '--top', 10)
    assert len(lines) == 11
    shown = {line.partition('%  ')[2] for line in lines[1:]}
    assert shown == {r'\x1b[31mred\n', 'фото', r'a\u202eb', *NAMES[3:]}
    for format in 'csv', 'json':
        assert all(map(str.isprintable, run(capsys, tmp_path, pictures / 'b.png', '--top', 10, '--format', format)))


def test_a_folder_has_images_that_pillow_reads_and_a_broken_one_is_left_out(checkpoint, pictures, tmp_path, capsys):
    content = (pictures / 'b.png').read_bytes()
    for name in 'good.png', '._good.png', '.hidden/good.png', 'film.mpg', 'book.pdf', 'data.h5':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'broken.png').write_bytes(content[:40])
    with pytest.raises(SystemExit, match='^1 of 2 images could not be read$'):
        run(capsys, checkpoint, tmp_path, '--top', 2, '--output', tmp_path / 'found.json')
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / 'good.png'), *expected(checkpoint, pictures / 'b.png', 2)]
    assert f'warning: image {tmp_path / "broken.png"} cannot be decoded: ' in err
    found, = json.loads((tmp_path / 'found.json').read_text())
    assert found['image'] == str(tmp_path / 'good.png')


def test_predictions_are_written_as_well(checkpoint, pictures, tmp_path, capsys):
    lines = run(capsys, checkpoint, pictures, '--top', 2, '--output', tmp_path / 'new' / 'p.json')
    found = json.loads((tmp_path / 'new' / 'p.json').read_text())
    printed = []
    for image in found:
        printed.append(image['image'])
        printed += [f'{100 * c["probability"]:8.2f} %  {c["label"]}' for c in image['classes']]
    assert printed == lines
    run(capsys, checkpoint, pictures, '--top', 2, '--output', tmp_path / 'p.csv')
    with (tmp_path / 'p.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(r['image'], r['rank'], r['label'], float(r['probability'])) for r in rows] == [
        (image['image'], str(rank), c['label'], c['probability'])
        for image in found for rank, c in enumerate(image['classes'], 1)]


@pytest.mark.parametrize('format', ['csv', 'json'])
def test_what_is_printed_is_what_is_written(format, checkpoint, pictures, tmp_path, capsys):
    file = tmp_path / f'p.{format}'
    lines = run(capsys, checkpoint, pictures, '--top', 2, '--format', format, '--output', file)
    assert lines == file.read_text().splitlines() and len(lines) > 4


def test_images_go_to_the_accelerator_whatever_it_is(checkpoint, monkeypatch):
    """A GPU, or MPS on a Mac."""
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: torch.device('meta'))
    classify, _ = predict.open_checkpoint(str(checkpoint))
    assert classify(torch.zeros(1, 3, 8, 8)).device.type == 'meta'


def test_bad_arguments_are_named(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').touch()
    for arguments, message in [
        ((checkpoint, tmp_path / 'none.png'), r'image .*none.png was not found, expected a file or a folder'),
        ((checkpoint, tmp_path / 'empty'), 'folder .*empty has no images'),
        ((checkpoint, pictures, '--output', 'p.txt'), r'--output must end in .csv or .json, got p.txt'),
        ((checkpoint, pictures, '--output', tmp_path / 'file' / 'p.csv'), '--output .*p.csv cannot be written'),
        ((checkpoint, pictures, '--top', 0), '--top must be at least 1, got 0'),
        ((tmp_path / 'empty', pictures), "checkpoint '.*empty' has no config.json and no model.safetensors"),
        (('resnet18_fdm', pictures), "checkpoint must be a folder, hf-hub:owner/name or .*got 'resnet18_fdm'"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(capsys, *arguments)
