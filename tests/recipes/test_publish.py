"""recipes/publish.py, and loading what it published, in fresh processes against a Hub on this machine."""
import hashlib
import json
import os
import re
import shutil
import socket
from functools import partial
from pathlib import Path

import export
import processes
import publish
import pytest
import timm
import torch
import yaml
from _dataset import load_digits
from _exported import FORMATS
from hub_server import READ_TOKEN, WRITE_TOKEN, Commit, Repo, empty_caches
from huggingface_hub import parse_eval_result_entries
from inputs import make_record, make_run, save_logits
from safetensors.torch import load_file, save_file

CHECKOUT = Path(__file__).parents[2]
FILES = {'model.safetensors', 'config.json', 'result.json', 'README.md'}
REPO, ARCHITECTURE = 'acme/digits', 'mobilenetv3_small_100_fmd'
NAME = f'{ARCHITECTURE}.test'

LOAD = """
import json, sys, timm, torch, fmd_timm
from safetensors.torch import load_file
for name, run in zip(sys.argv[1::2], sys.argv[2::2]):
    model = timm.create_model(name, pretrained=True).eval()
    state_dict = model.state_dict()
    for key, tensor in load_file(f'{run}/model.safetensors').items():
        assert torch.equal(state_dict[key], tensor), f'{key} of {name} is not that of {run}'
    images, logits = torch.load(f'{run}/logits.pt')
    with torch.no_grad():
        torch.testing.assert_close(model(images), logits)
    assert list(model.pretrained_cfg['label_names']) == json.load(open(f'{run}/config.json'))['label_names'], name
"""


def train_run(checkout, folder):
    """The folder that training leaves after one epoch on 64 real digits."""
    digits = load_digits()
    digits['train'].select(range(64)).to_parquet(checkout / 'images' / 'train.parquet')
    digits['test'].select(range(50)).to_parquet(checkout / 'images' / 'test.parquet')
    done = run_in(
        checkout, 'recipes/train.py', 'digits', '--model', ARCHITECTURE, '--dataset', 'images',
        '--image-size', '64', '--epochs', '1', '--warmup-epochs', '0', '--batch-size', '32', '--output', folder,
    )
    assert done.returncode == 0, done.stderr
    save_logits(timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), folder)


def run_in(checkout, *args, token=WRITE_TOKEN):
    return processes.run(*args, cwd=checkout, env=dict(os.environ, HF_TOKEN=token, PYTHONPATH=str(checkout)))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope='module')
def hub(hub_server):
    hub_server.clear()
    return hub_server


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
    """A copy of this checkout in which nothing is published, with a trained run that can get a tag."""
    folder = tmp_path_factory.mktemp('checkout')
    for name in 'fmd_timm', 'recipes':
        shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    (folder / 'hub_cards').mkdir()
    train_run(folder, folder / 'run')
    return folder


@pytest.fixture(scope='module')
def small_run(tmp_path_factory):
    """Quick to publish, but only without a tag."""
    folder = tmp_path_factory.mktemp('small')
    make_run(folder, channels=[8, 16, 32, 64])
    return folder


@pytest.fixture
def python(checkout):
    """Run Python in the copied checkout, as a user whose caches are empty."""
    empty_caches()
    return partial(run_in, checkout)


@pytest.fixture(scope='module')
def published(hub, checkout):
    """The arguments that published the run of `checkout`."""
    args = ['recipes/publish.py', '--run', 'run', '--repo', REPO, '--tag', 'test']
    done = run_in(checkout, *args)
    assert done.returncode == 0, done.stderr
    assert f'{hub.endpoint}/{REPO}' in done.stdout
    return args


@pytest.fixture
def publish_offline(monkeypatch):
    """recipes/publish.py in this process, where no connection can be made."""
    def run(*args):
        monkeypatch.setattr(socket.socket, 'connect', lambda *_: pytest.fail('this takes no network'))
        publish.main(**vars(publish.parse_publish([str(arg) for arg in args])))
    return run


def record_in(checkout):
    return json.loads((checkout / 'hub_cards' / f'{NAME}.json').read_text())


# Publishing


def test_the_repository_holds_the_four_files_and_nothing_else(hub, checkout, published):
    files = hub.repos[REPO].at(record_in(checkout)['hub']['commit'])
    assert files.keys() == FILES | {'.gitattributes'}
    for name in FILES - {'README.md'}:
        assert files[name] == (checkout / 'run' / name).read_bytes(), name
    assert files['README.md'] == (checkout / 'hub_cards' / f'{NAME}.md').read_bytes()


def test_the_hub_checks_the_card_before_a_repository_is_made(hub, published):
    paths = [path for _, path in hub.log]
    assert paths.index('/api/validate-yaml') < paths.index('/api/repos/create')


def test_the_record_of_a_tag_is_that_of_the_run_and_where_its_weights_are(checkout, published):
    record = record_in(checkout)
    hub, cfg = record.pop('hub'), record.pop('pretrained_cfg')
    assert record == json.loads((checkout / 'run/result.json').read_text())
    assert hub['repo'] == REPO
    assert hub['sha256'] == sha256(checkout / 'run/model.safetensors')
    assert timm.models.PretrainedCfg(**cfg).label_names == record['label_names']
    assert cfg['num_classes'] == 10
    assert not {'file', 'source', 'url', 'hf_hub_id'} & cfg.keys()


def test_a_tag_can_be_published_again(hub, checkout, python, published):
    before = record_in(checkout)
    edit(checkout / 'run/result.json', seed=before['seed'] + 1, recipe=dict(before['recipe'], seed=before['seed'] + 1))
    done = python(*published)
    assert done.returncode == 0, done.stderr
    after = record_in(checkout)
    assert after['seed'] == before['seed'] + 1
    assert after['hub']['commit'] == hub.repos[REPO].at('main').id != before['hub']['commit']
    assert sorted(path.name for path in (checkout / 'hub_cards').iterdir()) == [f'{NAME}.json', f'{NAME}.md']


def test_a_hub_that_does_not_hold_what_was_sent_is_noticed(checkout, python, published, monkeypatch):
    before = record_in(checkout)
    monkeypatch.setattr(Commit, '__getitem__', lambda self, path: self.get(path) + b' ' * (path == 'config.json'))
    done = python(*published)
    assert done.returncode == 1
    assert f'config.json of {REPO} at' in done.stderr and 'is not what was uploaded' in done.stderr
    assert 'Traceback' not in done.stderr
    assert record_in(checkout) == before


def test_a_run_without_tag_keeps_its_arguments(hub, python, small_run):
    done = python('recipes/publish.py', '--run', small_run, '--repo', 'ann/small', '--private')
    assert done.returncode == 0, done.stderr
    assert hub.repos['ann/small'].private
    assert hub.repos['ann/small'].at('main').keys() == FILES | {'.gitattributes'}
    with_transformers = """
from transformers import AutoModelForImageClassification
wrapped = AutoModelForImageClassification.from_pretrained('ann/small').eval()
with torch.no_grad():
    torch.testing.assert_close(wrapped(images).logits, logits)
"""
    done = python('-c', LOAD + with_transformers, 'hf-hub:ann/small', small_run)
    assert done.returncode == 0, done.stderr


REFUSED = {
    ('hf_wrong', 'acme/refused'): 'nothing was sent to acme/refused: the Hub does not accept the token',
    (READ_TOKEN, 'acme/refused'): 'the token of ann may only read',
    (WRITE_TOKEN, 'other/refused'): 'ann may not write to other/refused, only to repositories of ann, acme',
}


def test_nothing_is_pushed_without_the_right_to(hub, python, small_run):
    done = python('-c', f"""
import os, sys
sys.path.insert(0, 'recipes')
import publish
for token, repo in {list(REFUSED)}:
    os.environ['HF_TOKEN'] = token
    arguments = publish.parse_publish(['--run', {str(small_run)!r}, '--repo', repo])
    try:
        publish.main(**vars(arguments))
    except SystemExit as refusal:
        print(refusal.code)
""")
    assert done.returncode == 0, done.stderr
    for message, line in zip(REFUSED.values(), done.stdout.splitlines(), strict=True):
        assert message in line
    assert not {'acme/refused', 'other/refused'} & hub.repos.keys()


def put(hub, name, **files):
    """A repository with files of somebody."""
    repo = hub.repos[name] = Repo()
    content = {path.replace('_json', '.json'): text.encode() for path, text in files.items()}
    repo.commits.append(Commit(repo.commits[-1] | content, 'theirs'))
    return repo


@pytest.fixture
def publish_here(hub, monkeypatch):
    """recipes/publish.py in this process, as somebody who may write."""
    monkeypatch.setenv('HF_TOKEN', WRITE_TOKEN)
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)  # before it tries again

    def run(*args):
        publish.main(**vars(publish.parse_publish([str(arg) for arg in args])))
    yield run
    hub.faults.clear()


@pytest.mark.parametrize('files, holds', [
    (dict(config_json='{}', weights='.'), 'holds weights'),
    (dict(config_json='{}'), 'has no result.json of a run'),
    (dict(result_json='[]'), 'has no result.json of a run'),
    (dict(result_json='{"model": "resnet18_fmd_cifar", "dataset": "flowers"}'),
     'holds a run of resnet18_fmd_cifar on flowers, this one is of resnet18_fmd_cifar on digits'),
    ({'result_json': '{}', 'model.onnx': '.'}, 'holds model.onnx'),  # nobody knows whose: it has no record
])
def test_what_publishing_did_not_write_is_replaced_only_when_told(hub, publish_here, small_run, files, holds):
    repo = put(hub, 'acme/theirs', **files)
    before = repo.commits[-1]
    with pytest.raises(SystemExit, match=f'^acme/theirs {re.escape(holds)}: publish to another .* --replace'):
        publish_here('--run', small_run, '--repo', 'acme/theirs')
    assert repo.commits[-1] is before
    publish_here('--run', small_run, '--repo', 'acme/theirs', '--replace')
    assert repo.commits[-1].keys() == FILES | {'.gitattributes'} and repo.commits[-2] is before


def test_an_empty_repository_and_an_earlier_run_are_published_to(hub, publish_here, small_run):
    repo = put(hub, 'acme/mine')
    for _ in range(2):
        publish_here('--run', small_run, '--repo', 'acme/mine')
    assert len(repo.commits) == 3  # the second time there was nothing to change
    with pytest.raises(SystemExit, match='--private: acme/mine is there already and public'):
        publish_here('--run', small_run, '--repo', 'acme/mine', '--private')


def test_the_accuracy_on_a_dataset_of_the_hub_is_published_as_its_leaderboards_read_it(
        hub, publish_here, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / 'run')
    recipe = json.loads((run / 'result.json').read_text())['recipe']
    edit(run / 'result.json', dataset='acme/numbers', recipe=dict(recipe, dataset='acme/numbers'))
    repo = put(hub, 'acme/scored')
    publish_here('--run', run, '--repo', 'acme/scored')
    results = '.eval_results/numbers.yaml'
    assert repo.at('main').keys() == FILES | {'.gitattributes', results}
    entry, = parse_eval_result_entries(yaml.safe_load(repo.at('main')[results]))
    record = json.loads((run / 'result.json').read_text())
    assert (entry.dataset_id, entry.value) == ('acme/numbers', round(record['top1'], 4))
    publish_here('--run', run, '--repo', 'acme/scored')
    assert len(repo.commits) == 3  # there was nothing to change
    publish_here('--run', small_run, '--repo', 'acme/scored', '--replace')
    assert repo.at('main').keys() == FILES | {'.gitattributes'}


def test_the_card_compares_a_run_with_its_static_twin(publish_offline, small_run, tmp_path, capsys):
    def publish_with(**changes):
        record = make_record(**dict(dict(model='resnet18_cifar', method=None, top1=95.0, best_top1=95.0), **changes))
        accuracy = record['top1'] / 100
        record |= dict(
            ies=1.25 / accuracy, rcs=accuracy / 1.25, ies_infer=0.012 / accuracy, rcs_infer=81155.7 * accuracy)
        (tmp_path / 'result.json').write_text(json.dumps(record))
        publish_offline('--run', small_run, '--repo', REPO, '--twin', tmp_path, '--dry-run')
        return capsys.readouterr().out

    card = publish_with()
    assert '## Model Comparison' in card and '|resnet18_cifar|95.00|' in card
    recipe = make_record()['recipe']
    for changes, message in (
            (dict(method='FMDConv'), '--twin must be the run of a static network, .* got resnet18_cifar in '),
            (dict(seed=8, recipe=dict(recipe, seed=8)), '--twin must be a run with the seed 7, got 8 in '),
            (dict(recipe=dict(recipe, lr=0.5)), 'cannot be compared with .*: lr is 0.5, not None'),
            (dict(macts=None), 'the run record has no macts')):
        with pytest.raises(SystemExit, match=message):
            publish_with(**changes)
    with pytest.raises(SystemExit, match='result.json is not readable'):
        publish_offline('--run', small_run, '--repo', REPO, '--twin', tmp_path / 'none')


@pytest.fixture(scope='module')
def exported_run(tmp_path_factory, digits_folder):
    """A smaller run, with an ONNX file in its folder."""
    run = tmp_path_factory.mktemp('exported') / 'run'
    make_run(run, channels=[8, 16, 32, 64], layers=[1, 1, 1, 1])
    export.main(**vars(export.parse_export([str(run), '--format', 'onnx', '--images', str(digits_folder)])))
    return run


def assert_usage_works(card, runtime, run, capsys):
    """What the card says of an exported file prints the class that the network finds."""
    usage, = [code for code in re.findall('^```python\n(.*?)^```$', card, re.DOTALL | re.MULTILINE) if runtime in code]
    capsys.readouterr()
    seen = {}
    exec(usage, seen)
    network = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    with torch.no_grad():
        expected = network(seen['images'])
    assert capsys.readouterr().out == f'digit {expected.argmax()}\n'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of exporters
@pytest.mark.parametrize('format, batch, images', [
    ('openvino', 'dynamic', 'any number'), ('executorch', '1', '1'), ('executorch', 'dynamic', '8 at most')])
def test_files_of_other_runtimes_are_published_with_what_opens_them(
        format, batch, images, hub, publish_here, exported_run, tmp_path, digits_folder, capsys):
    for package in FORMATS[format].packages:
        pytest.importorskip(package)
    run = shutil.copytree(exported_run, tmp_path / 'run')
    export.main(**vars(export.parse_export([
        str(run), '--format', format, '--batch', batch, '--images', str(digits_folder)])))
    publish_here('--run', run, '--repo', 'acme/other', '--with', format)
    card = hub.repos['acme/other'].at('main')['README.md'].decode()
    assert f'| Images at a time | {images} |' in card.splitlines()
    assert_usage_works(card, format, run, capsys)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of exporters
def test_an_exported_file_is_published_with_its_record_and_goes_with_other_weights(
        hub, publish_here, exported_run, tmp_path, capsys):
    arguments = '--repo', 'acme/exported', '--with', 'onnx'
    publish_here('--run', exported_run, *arguments)
    repo = hub.repos['acme/exported']
    assert repo.at('main').keys() == FILES | {'.gitattributes', 'model.onnx', 'model.onnx.json'}
    for name in 'model.onnx', 'model.onnx.json', 'result.json':
        assert repo.at('main')[name] == (exported_run / name).read_bytes()
    record = json.loads((exported_run / 'model.onnx.json').read_text())
    card = repo.at('main')['README.md'].decode()
    size = (exported_run / 'model.onnx').stat().st_size / 1e6
    for row in (f'Size | {size:.1f} MB', 'Same best class | 50 of 50 images', f'Hardware | {record["device"]}',
                f'Runtime | onnxruntime {record["versions"]["onnxruntime"]}', 'Images at a time | 1',
                f'Largest difference | {record["largest_relative_difference"]:.1e}',
                f'Top-1 accuracy, and in PyTorch | {record["top1"]:.2f} %, {record["pytorch_top1"]:.2f} %'):
        assert f'| {row} |' in card.splitlines()

    assert_usage_works(card, 'onnx', exported_run, capsys)

    publish_here('--run', exported_run, *arguments)
    assert len(repo.commits) == 2  # there was nothing to change
    other = shutil.copytree(exported_run, tmp_path / 'run')
    weights = load_file(other / 'model.safetensors')
    weights['fc.bias'] += 1
    save_file(weights, other / 'model.safetensors', metadata={'format': 'pt'})
    edit(other / 'result.json', weights_sha256=sha256(other / 'model.safetensors'))
    hashes = [sha256(run / 'model.safetensors') for run in (exported_run, other)]
    message = 'of other weights: it was exported from those with sha256 {}, .* has sha256 {}. Export again: python'
    with pytest.raises(SystemExit, match=message.format(*hashes)):
        publish_here('--run', other, *arguments)
    publish_here('--run', other, '--repo', 'acme/exported')
    assert repo.at('main').keys() == FILES | {'.gitattributes'}
    assert '## Exported' not in repo.at('main')['README.md'].decode()


@pytest.mark.slow
def test_exported_files_that_are_missing_or_others_are_refused(publish_offline, small_run, exported_run, tmp_path):
    def publish_it(run, format='onnx'):
        publish_offline('--run', run, '--repo', REPO, '--with', format)

    for run, format, names in (small_run, 'onnx', 'model.onnx, model.onnx.json'), (
            exported_run, 'openvino', 'model.xml, model.bin, model.xml.json'):
        command = rf'python recipes/export\.py .* --format {format}'
        with pytest.raises(SystemExit, match=f'^--with {format}: .* has no {names}, which this writes: {command}$'):
            publish_it(run, format)
    damaged = shutil.copytree(exported_run, tmp_path / 'run')
    (damaged / 'model.onnx').write_bytes(b'another')
    with pytest.raises(SystemExit, match='is of another model.onnx: it has .*, the file .* Export again: python'):
        publish_it(damaged)
    for record, message in ('[]', 'must hold a JSON object, got list'), ('{}', 'is no record of recipes/export.py'):
        (damaged / 'model.onnx.json').write_text(record)
        with pytest.raises(SystemExit, match=message):
            publish_it(damaged)
    shutil.copy(exported_run / 'model.onnx', damaged)
    record = json.loads((exported_run / 'model.onnx.json').read_text())
    del record['infer_ms_per_image']
    (damaged / 'model.onnx.json').write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="the record of an exported file has no 'infer_ms_per_image'"):
        publish_it(damaged)


COMMIT = 'POST .*/commit/main'


@pytest.mark.parametrize('request_, status, message', [
    ('GET .*/whoami-v2', 429, 'nothing was sent to acme/new: the Hub has had too many requests .* .HTTP 429'),
    ('GET .*/acme/new', 503, 'nothing was sent to acme/new: the Hub has a fault of its own.*HTTP 503: No .lucky. day'),
    ('POST .*/create', 403, 'failed: the Hub does not allow it.*HTTP 403: No .lucky. day.*There is no such repository'),
    (COMMIT, 409, 'failed: something of that name .*HTTP 409.*The repository that was made for it is removed again'),
    (COMMIT, 500, 'failed: the Hub has a fault of its own.*HTTP 500.*made for it is removed again'),
    (COMMIT, None, 'failed: the connection to the Hub failed: .*made for it is removed again'),
    ('PUT .*', 502, 'failed: the Hub has a fault of its own.*HTTP 502.*made for it is removed again'),
])
def test_an_upload_that_fails_says_why_and_leaves_no_empty_repository(
        hub, publish_here, small_run, request_, status, message):
    hub.fail(request_, status, 'No "lucky" day')
    hub.blobs.clear()
    with pytest.raises(SystemExit, match=message):
        publish_here('--run', small_run, '--repo', 'acme/new')
    assert 'acme/new' not in hub.repos


def test_a_repository_that_cannot_be_removed_again_is_named(hub, publish_here, small_run):
    hub.fail(COMMIT, 500)
    hub.fail('DELETE .*', 403)
    message = rf'An empty repository may be left \(.*HTTP 403\)\): look at {hub.endpoint}/acme/left'
    with pytest.raises(SystemExit, match=message):
        publish_here('--run', small_run, '--repo', 'acme/left')


def test_a_failed_upload_leaves_what_was_there(hub, publish_here, small_run):
    repo = put(hub, 'acme/old')
    hub.fail(COMMIT, 500)
    with pytest.raises(SystemExit, match='The repository is as it was'):
        publish_here('--run', small_run, '--repo', 'acme/old')
    assert hub.repos['acme/old'] is repo


def test_a_commit_that_somebody_makes_meanwhile_is_not_built_upon(hub, publish_here, small_run, monkeypatch):
    repo = put(hub, 'acme/busy')
    find_repository = publish.find_repository

    def and_then_they_commit(*args):
        found = find_repository(*args)
        repo.commits.append(Commit(repo.commits[-1] | {'weights.bin': b'.'}, 'theirs'))
        return found

    monkeypatch.setattr(publish, 'find_repository', and_then_they_commit)
    with pytest.raises(SystemExit, match=f'somebody else has changed .* It is at commit {"[0-9a-f]" * 40} now'):
        publish_here('--run', small_run, '--repo', 'acme/busy')
    assert 'weights.bin' in repo.commits[-1]


def test_a_failed_reading_back_is_no_failed_upload(hub, publish_here, small_run):
    hub.fail('HEAD .*/resolve/.*', 503)
    with pytest.raises(SystemExit, match='acme/unread has the files as commit .* could not be read back') as refusal:
        publish_here('--run', small_run, '--repo', 'acme/unread')
    commit = hub.repos['acme/unread'].commits[-1]
    assert commit.id in str(refusal.value) and commit.keys() == FILES | {'.gitattributes'}
    hub.faults.clear()
    publish_here('--run', small_run, '--repo', 'acme/unread')
    assert hub.repos['acme/unread'].commits[-1] is commit


def test_a_dry_run_shows_the_card_and_writes_nothing(publish_offline, checkout, capsys):
    folders = checkout / 'run', CHECKOUT / 'hub_cards'
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}
    publish_offline('--run', checkout / 'run', '--repo', REPO, '--tag', 'dry', '--dry-run')
    output = capsys.readouterr().out
    assert output.startswith('---\n') and '| Top-1 accuracy | ' in output
    assert f'would push to {REPO}: ' in output and all(name in output for name in FILES)
    assert f'{ARCHITECTURE}.dry.json' in output
    assert before == {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}


@pytest.mark.parametrize('args,message', [
    (('--repo', 'digits'), "--repo must be OWNER/NAME, got 'digits'"),
    (('--repo', 'acme/my digits'), "--repo 'acme/my digits' is not valid"),
    (('--repo', REPO, '--tag', 'v1.0'), "--tag must consist of letters, digits, '_' and '-', got 'v1.0'"),
    (('--repo', REPO, '--tag', ''), "--tag must consist of .* got ''"),
    (('--repo', REPO, '--tag', 'small'), r"with its default arguments, this run has {'channels': \[8, 16, 32, 64\]}"),
])
def test_arguments_are_refused(publish_offline, small_run, args, message):
    with pytest.raises(SystemExit, match=message):
        publish_offline('--run', small_run, *args)


@pytest.mark.parametrize('name,content,message', [
    ('model.safetensors', None, 'has no model.safetensors$'),
    ('config.json', None, 'has no config.json$'),
    ('result.json', None, 'has no result.json$'),
    ('config.json', '{"architecture": ', 'config.json is not readable: Expecting value'),
    ('result.json', '[]', 'result.json must hold a JSON object, got list'),
    ('model.safetensors', 'a pickle, perhaps', 'of other weights: theirs have sha256 [0-9a-f]{64}, model.* has cdff'),
    ('result.json', dict(top1=None), 'has no top1$'),
    ('result.json', '{"top1": NaN}', 'result.json is not readable: NaN is not JSON'),
    ('result.json', dict(weights_sha256=None), 'has no weights_sha256: it is of an older fmd_timm, train again'),
    ('result.json', dict(parameters=1), 'of another network: parameters is 1, expected'),
    ('result.json', dict(num_classes=9), 'num_classes is 9, and label_names are 10'),
    ('result.json', dict(num_classes=9, label_names=['a'] * 9), 'network: num_classes is 9, expected 10'),
    ('result.json', dict(model='resnet50_fmd'), "of another network: model is 'resnet50_fmd', expected 'resnet18_fmd"),
    ('config.json', dict(label_names=['zero'] * 10), 'have different label_names'),
    ('config.json', dict(architecture='resnet18'), "'resnet18' is no architecture of fmd_timm"),
    ('config.json', dict(architecture='resnet'), "'resnet' is no architecture of fmd_timm"),
    ('config.json', dict(model_args=dict(num_classes=10)), 'transformers refuses num_classes in model_args'),
    ('config.json', dict(model_args=dict(channels=[8, 16, 32, 48])), '(?s)timm cannot load .*size mismatch'),
])
def test_a_damaged_run_is_refused(publish_offline, small_run, tmp_path, name, content, message):
    run = shutil.copytree(small_run, tmp_path / 'run')
    if content is None:
        (run / name).unlink()
    elif isinstance(content, str):
        (run / name).write_text(content)
    else:
        edit(run / name, **content)
    with pytest.raises(SystemExit, match=message):
        publish_offline('--run', run, '--repo', REPO)


@pytest.mark.parametrize('model_args,message', [
    (dict(num_kernels=4), "with its default arguments, this run has {'num_kernels': 4}"),  # the default of today
    (dict(global_pool='max'), "give other logits than the model_args {'global_pool': 'max'}"),
])
def test_a_tag_has_to_be_the_architecture_with_its_defaults(publish_offline, checkout, tmp_path, model_args, message):
    for name in 'config.json', 'result.json':
        shutil.copy(checkout / 'run' / name, tmp_path)
    weights = load_file(checkout / 'run/model.safetensors')
    weights['classifier.weight'] *= 1000  # after one epoch all logits are near 0
    save_file(weights, tmp_path / 'model.safetensors')
    edit(tmp_path / 'config.json', model_args=model_args)
    edit(tmp_path / 'result.json', weights_sha256=sha256(tmp_path / 'model.safetensors'))
    with pytest.raises(SystemExit, match=message):
        publish_offline('--run', tmp_path, '--repo', REPO, '--tag', 'max')


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_refused(publish_offline, small_run, tmp_path, number):
    run = shutil.copytree(small_run, tmp_path / 'run')
    weights = load_file(run / 'model.safetensors')
    weights['fc.weight'][3, 5] = number
    save_file(weights, run / 'model.safetensors', metadata={'format': 'pt'})
    edit(run / 'result.json', weights_sha256=sha256(run / 'model.safetensors'))
    with pytest.raises(SystemExit, match='model.safetensors has numbers that are NaN or infinite, in fc.weight'):
        publish_offline('--run', run, '--repo', REPO)


def test_weights_of_another_run_are_refused_with_both_hashes(publish_offline, small_run, tmp_path):
    run = shutil.copytree(small_run, tmp_path / 'run')
    weights = load_file(run / 'model.safetensors')
    weights['fc.weight'] += 1
    save_file(weights, run / 'model.safetensors', metadata={'format': 'pt'})
    hashes = sha256(small_run / 'model.safetensors'), sha256(run / 'model.safetensors')
    with pytest.raises(SystemExit, match='theirs have sha256 {}, model.safetensors has {}'.format(*hashes)):
        publish_offline('--run', run, '--repo', REPO)


# Loading


def test_every_name_of_a_published_model_is_the_network_of_the_run(python, published):
    done = python('-c', LOAD, f'hf-hub:{REPO}', 'run', NAME, 'run', ARCHITECTURE, 'run')
    assert done.returncode == 0, done.stderr


def test_a_later_push_by_somebody_else_is_not_loaded_under_the_tag(hub, checkout, python, published, tmp_path):
    theirs = load_file(checkout / 'run/model.safetensors')
    theirs['classifier.bias'] += 1
    save_file(theirs, tmp_path / 'model.safetensors')
    images, logits = torch.load(checkout / 'run/logits.pt')
    torch.save((images, logits + 1), tmp_path / 'logits.pt')
    shutil.copy(checkout / 'run/config.json', tmp_path)
    commits = hub.repos[REPO].commits
    commits.append(Commit(commits[-1] | {'model.safetensors': (tmp_path / 'model.safetensors').read_bytes()}, 'better'))
    try:
        done = python('-c', LOAD, NAME, 'run', f'hf-hub:{REPO}', tmp_path)
    finally:
        commits.pop()
    assert done.returncode == 0, done.stderr


def test_loading_names_the_repository_it_fails_on_and_can_be_repeated(hub, checkout, python, published):
    hub.drop_next_download('model.safetensors', after_bytes=100_000)
    done = python('-c', f"""
import fmd_timm, timm
for name in '{NAME}', 'hf-hub:acme/nothing':
    try:
        timm.create_model(name, pretrained=True)
    except Exception as error:
        print(type(error).__name__, ' '.join(str(error).split()))
timm.create_model('{NAME}', pretrained=True)
""")
    assert done.returncode == 0, done.stderr
    dropped, missing = done.stdout.splitlines()
    commit = record_in(checkout)['hub']['commit']
    assert f'could not be loaded from the Hub repository {REPO}@{commit}' in dropped
    assert missing.startswith('RepositoryNotFoundError') and 'acme/nothing' in missing
