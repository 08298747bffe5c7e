"""recipes/demo.py: the page says what predict.py and inspect_attention.py say of the same image."""
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

gradio = pytest.importorskip('gradio', reason="the page needs gradio: pip install -e '.[demo]'")

import demo
import predict
import timm
import tiny
import torch
from _dataset import load_digits
from _dynamics import watched
from PIL import Image

from fmd_timm import DynamicConv2d
from fmd_timm.hub import save_for_hub

NAMES = [f'digit {i}' for i in range(10)]
RECIPES = Path(__file__).parents[2] / 'recipes'


def save_network(folder, name=tiny.NAME, names=NAMES, **kwargs):
    torch.manual_seed(0)
    network = timm.create_model(name, zero_init_last=False, **kwargs)
    size = kwargs.get('in_chans', 3), 8, 8
    save_for_hub(network, folder, dict(label_names=names), data_config=dict(input_size=size))
    return str(folder)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp('network'))


@pytest.fixture(scope='module')
def twin(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp('twin'), tiny.STATIC)


@pytest.fixture(scope='module')
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp('picture') / 'seven.png'
    load_digits()['test'][3]['image'].save(path)
    return str(path)


def answer_of(page):
    """What the page calls with a file."""
    answer, = [function.fn for function in page.fns.values() if function.name == 'answer']
    return answer


def shown(classes):
    return [f'{100 * probability:8.2f} %  {name}' for name, probability in classes.items()]


def test_the_classes_of_both_networks_are_those_of_predict(checkpoint, twin, picture, capsys):
    *classes, _ = answer_of(demo.make_page(checkpoint, twin=twin))(picture)
    for source, found in zip((checkpoint, twin), classes, strict=True):
        predict.main(source, [Path(picture)], demo.TOP, None)
        assert capsys.readouterr().out.splitlines() == [picture, *shown(found)]


def test_the_bars_are_the_kernels_of_the_image_beside_the_mean_over_a_dataset(
        checkpoint, picture, digits_folder, monkeypatch):
    _, figure = answer_of(demo.make_page(checkpoint, dataset=str(digits_folder)))(picture)
    network, metadata = predict.open_network(checkpoint, 'checkpoint')
    read = predict.reader(metadata.data_config)
    with torch.inference_mode():
        with watched(network) as of_image:
            network(read(Path(picture)))
        with watched(network) as of_all:
            images = [row['image'].convert('RGB') for row in load_digits()['test'].select(range(50))]
            transform = timm.data.create_transform(**metadata.data_config)
            network(torch.stack([transform(image) for image in images]))
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == [name for name, module in network.named_modules() if isinstance(module, DynamicConv2d)]
    for name, axes in panels.items():
        bars = [bar.get_height() for bar in axes.patches]
        marks = axes.lines[-1].get_ydata()
        assert bars == pytest.approx(of_image[name].means()[0][0].tolist(), abs=1e-6)
        assert list(marks) == pytest.approx(of_all[name].means()[0][0].tolist(), abs=1e-4)
    assert f'mean over {digits_folder.name}' in [text.get_text() for text in figure.legends[0].get_texts()]


def test_some_images_of_the_dataset_are_offered(checkpoint, digits_folder):
    page = demo.make_page(checkpoint, dataset=str(digits_folder))
    offered, = [block for block in page.blocks.values() if isinstance(block, gradio.Dataset)]
    assert len(offered.samples) == demo.SAMPLES
    with Image.open(offered.samples[-1][0]['path']) as last:
        assert last.tobytes() == load_digits()['test'][49]['image'].convert('RGB').tobytes()


def test_without_a_dataset_there_is_no_mean_and_without_an_image_nothing(checkpoint, picture):
    answer = answer_of(demo.make_page(checkpoint))
    _, figure = answer(picture)
    assert len(figure.legends[0].get_texts()) == 2
    assert answer(None) == [None, None]


@pytest.mark.parametrize('name, content', [
    ('notes.png', b'no image at all'), ('cut.png', None), ('empty.jpg', b'')])
def test_a_file_that_is_no_image_gets_a_sentence_without_the_path_of_the_server(
        checkpoint, picture, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(Path(picture).read_bytes()[:60] if content is None else content)
    with pytest.raises(gradio.Error, match=f'^.?image {name} cannot be decoded: ') as error:
        answer_of(demo.make_page(checkpoint))(str(path))
    assert str(tmp_path) not in str(error.value)


def test_nothing_is_told_to_gradio(checkpoint):
    assert demo.make_page(checkpoint).analytics_enabled is False


def test_what_cannot_be_shown_is_refused(checkpoint, twin, tmp_path):
    one_kernel = save_network(tmp_path / 'one', num_kernels=1)
    others = save_network(tmp_path / 'others', tiny.STATIC, names=NAMES[::-1])
    gray = save_network(tmp_path / 'gray', in_chans=1)
    for arguments, message in [
        ((twin,), "checkpoint '.*' has no dynamic convolution"),
        ((one_kernel,), "checkpoint '.*' has one kernel in each layer, and nothing to mix"),
        ((checkpoint, None, others), '--twin must be a network of the same classes as .*, got .*others'),
        ((checkpoint, None, 'nothing'), "--twin must be a folder, .* got 'nothing'"),
        ((gray, 'digits'), '--dataset is for networks for images of 3 channels, got 1'),
    ]:
        with pytest.raises(SystemExit, match=f'^{message}'):
            demo.make_page(*arguments)


@pytest.fixture
def browser():
    """Chromium, to which no machine but this one has an address."""
    driver = pytest.importorskip('playwright.sync_api', reason='a browser needs its driver: pip install playwright')
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if chromium is None:
        pytest.skip('there is no Chromium')
    with driver.sync_playwright() as playwright:
        arguments = ['--no-sandbox', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']
        opened = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


@pytest.mark.slow
def test_a_browser_without_the_internet_shows_the_page(browser, picture, digits_folder, tmp_path, capsys):
    checkpoint, twin = (save_network(tmp_path / name, name) for name in ('resnet20_fmd_cifar', 'resnet20_cifar'))
    broken = tmp_path / 'notes.png'
    broken.write_bytes(b'no image at all')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, RECIPES / 'demo.py', checkpoint, '--dataset', str(digits_folder), '--twin', twin],
        env=dict(os.environ, GRADIO_SERVER_PORT=str(port)), stdout=subprocess.PIPE, text=True)
    try:
        url = next(found[0] for line in server.stdout if (found := re.search(f'http://127.0.0.1:{port}', line)))
        page, asked = browser.new_page(), []
        page.on('request', lambda request: asked.append(request.url))
        page.goto(url)
        page.set_input_files('input[type=file]', picture)
        page.get_by_test_id('matplotlib').locator('img').wait_for()
        text = page.inner_text('body')
        for source in checkpoint, twin:
            predict.main(source, [Path(picture)], demo.TOP, None)
            best = capsys.readouterr().out.splitlines()[1].partition('%  ')[2]
            assert best in text
        page.set_input_files('input[type=file]', str(broken))
        page.get_by_text('image notes.png cannot be decoded').first.wait_for()
        assert not [address for address in asked if not address.startswith((url, 'data:', 'blob:'))]
    finally:
        server.kill()
        server.communicate()
