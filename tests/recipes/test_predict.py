"""recipes/predict.py: the classes of images, with their names."""
from types import SimpleNamespace

import predict
import pytest
import timm
import tiny
import torch
from _data import load_digits
from PIL import Image, ImageOps

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


def test_photographs_are_turned_upright(tmp_path):
    image = Image.linear_gradient('L').resize((6, 4)).convert('RGB')
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / 'photo.png', exif=exif)
    turned = predict.read_image(tmp_path / 'photo.png', 'RGB')
    assert turned.size == (4, 6) and turned.tobytes() == image.transpose(Image.Transpose.ROTATE_270).tobytes()
    assert ImageOps.exif_transpose(turned).size == (4, 6)


@pytest.mark.parametrize('cfg, num_classes, names', [
    (dict(label_names=('a', 'b')), 2, ['a', 'b']),
    (dict(label_names={'0': 'n1', '2': 'n2'}, label_descriptions={'n2': 'a cat'}), 3, ['n1', 'class 1', 'a cat']),
    ({}, 2, ['class 0', 'class 1']),
])
def test_classes_have_the_best_names_there_are(cfg, num_classes, names):
    assert predict.class_names(SimpleNamespace(pretrained_cfg=cfg, num_classes=num_classes)) == names


def test_imagenet_checkpoints_of_timm_have_imagenets_names():
    names = predict.class_names(timm.create_model('test_resnet', pretrained=False))
    assert len(names) == 1000 and names[0].startswith('tench')


def test_bad_arguments_are_named(checkpoint, pictures, tmp_path, capsys):
    broken = tmp_path / 'broken.png'
    broken.write_bytes((pictures / 'b.png').read_bytes()[:40])
    (tmp_path / 'empty').mkdir()
    for arguments, message in [
        ((checkpoint, tmp_path / 'none.png'), r'image .*none.png was not found, expected a file or a folder'),
        ((checkpoint, tmp_path / 'empty'), 'folder .*empty has no images'),
        ((checkpoint, broken), 'image .*broken.png cannot be decoded: '),
        ((checkpoint, pictures, '--top', 0), '--top must be at least 1, got 0'),
        ((tmp_path / 'empty', pictures), "checkpoint '.*empty' has no config.json and no model.safetensors"),
        (('resnet18_fdm', pictures), "checkpoint must be a folder, hf-hub:owner/name or .*got 'resnet18_fdm'"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(capsys, *arguments)
