"""Training from weights that are there already: --init, and what fine-tuning changes about training."""
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import _checkpoints
import _dataset
import _optim
import _sources
import _start
import _training
import datasets
import pytest
import timm
import tiny
import torch
import torch.nn.functional as F
from _presets import PRESETS
from _recipe import FREEZABLE
from accelerate.state import AcceleratorState
from hub_server import Commit, Repo
from safetensors.torch import load_file, save_file
from tiny import make_recipe, run

import fmd_timm
from fmd_timm.hub import save_for_hub
from fmd_timm.model_card import make_card

pytestmark = pytest.mark.usefixtures('fresh_accelerator')


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A folder with a dynamic network of the ten digits, whose temperature is not 1 and whose licence is not ours."""
    folder = tmp_path_factory.mktemp('checkpoint')
    torch.manual_seed(0)
    model = timm.create_model(tiny.NAME)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)  # also of those that start a residual branch at zero
    fmd_timm.set_temperature(model, kernel=3.0)
    model.pretrained_cfg = dict(model.pretrained_cfg, license='mit', label_descriptions={'0': 'zero'})
    save_for_hub(model, folder, dict(label_names=[str(i) for i in range(10)]), data_config=dict(input_size=(3, 8, 8)))
    return folder


@pytest.fixture(scope='module')
def static(tmp_path_factory):
    """A folder with a static network of the ten digits, whose preprocessing and licence are not the dynamic one's."""
    folder = tmp_path_factory.mktemp('static')
    torch.manual_seed(0)
    model = timm.create_model(tiny.STATIC, zero_init_last=False)
    model.pretrained_cfg = dict(model.pretrained_cfg, license='mit')
    data_config = dict(input_size=(3, 8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation='bicubic')
    save_for_hub(model, folder, dict(label_names=[str(i) for i in range(10)]), data_config=data_config)
    return folder


@pytest.fixture(scope='module')
def letters_folder(tmp_path_factory):
    """The pictures of the digits 0, 1 and 2 under other names: 24, 12 and 4 to train, the same to validate."""
    folder = tmp_path_factory.mktemp('letters')
    rows = _dataset.load_digits()['train']
    labels = rows['label'][:]
    of_digit = [[i for i, label in enumerate(labels) if label == digit] for digit in range(3)]
    chosen = [*of_digit[0][:24], *of_digit[1][:12], *of_digit[2][:4]]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b', 'c']))
    columns = {'image': [rows[i]['image'] for i in chosen], 'label': [rows[i]['label'] for i in chosen]}
    for split in 'train', 'test':
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f'{split}.parquet')
    return folder


def make_finetune(folder, checkpoint, **changes):
    base = dict(dataset=str(folder), init=str(checkpoint), epochs=1, batch_size=8, num_workers=0, tracker='none',
                warmup_epochs=0, crop='pad', hflip=0.0)
    return dataclasses.replace(PRESETS['finetune'], **dict(base, **changes))


def weights_of(folder):
    return load_file(Path(folder) / 'model.safetensors')


def test_other_classes_get_a_new_classifier_and_everything_says_what_was_started_from(
        letters_folder, checkpoint, tmp_path):
    record = run(make_finetune(letters_folder, checkpoint), tmp_path)
    digest = hashlib.sha256((checkpoint / 'model.safetensors').read_bytes()).hexdigest()
    assert record['init'] == dict(
        weights=checkpoint.name, architecture=tiny.NAME, inflated=False, repo=None, revision=f'sha256 {digest}',
        license='mit', classifier='new',
    )
    assert record['model'] == tiny.NAME and record['input_size'] == (3, 8, 8)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['label_names'] == ['a', 'b', 'c'] and config['num_classes'] == 3
    assert config['pretrained_cfg']['license'] == 'mit' and 'label_descriptions' not in str(config)
    card = make_card(record, 'acme/letters')
    assert digest in card.text and card.data.license == 'mit'
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.num_classes == 3 and loaded.pretrained_cfg['label_names'] == ['a', 'b', 'c']


def test_the_classifier_of_the_same_classes_is_kept(digits_folder, checkpoint, tmp_path):
    record = run(make_finetune(digits_folder, checkpoint, lr=1e-12, weight_decay=0.0), tmp_path)
    assert record['init']['classifier'] == 'kept'
    expected, found = weights_of(checkpoint), weights_of(tmp_path)
    for key, _ in timm.create_model(tiny.NAME).named_parameters():
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-8)


def test_classes_of_other_names_get_a_new_classifier_and_those_of_other_order_are_matched():
    network = timm.create_model(tiny.NAME, num_classes=2)
    network.pretrained_cfg = dict(network.pretrained_cfg, label_names=['cat', 'dog'])
    fc = network.fc
    assert _start.fit_classifier(network, ['dog', 'cat']) == ('kept', ['cat', 'dog']) and network.fc is fc
    assert 'label_names' not in network.pretrained_cfg
    assert _start.fit_classifier(network, ['dog', 'cat']) == ('kept', ['dog', 'cat'])  # whose names nobody knows
    network.pretrained_cfg = dict(network.pretrained_cfg, label_names=['cat', 'dog'])
    assert _start.fit_classifier(network, ['dog', 'cow']) == ('new', ['dog', 'cow']) and network.fc is not fc


@pytest.mark.slow
def test_a_kept_classifier_gives_its_numbers_to_the_images(digits_folder, checkpoint, tmp_path):
    """The same digits in folders, whose names come in the order of text, and the checkpoint's in another one."""
    names = [str(i) for i in (3, 1, 4, 0, 5, 9, 2, 6, 8, 7)]
    rows = datasets.load_dataset(str(digits_folder))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    for split in 'train', 'test':
        columns = dict(image=rows[split]['image'], label=[names.index(str(label)) for label in rows[split]['label']])
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / 'set' / f'{split}.parquet')
    options = dict(lr=1e-12, weight_decay=0.0)
    found = run(make_finetune(tmp_path / 'set', checkpoint, **options), tmp_path / 'found')
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = run(make_finetune(digits_folder, checkpoint, **options), tmp_path / 'expected')
    assert found['init']['classifier'] == 'kept' and found['label_names'] == expected['label_names']
    assert found['loss'] == pytest.approx(expected['loss'])


@pytest.mark.parametrize('temperature, expected', [(None, 3.0), (30.0, 1.0)])
def test_the_temperature_of_a_checkpoint_stays_unless_one_is_asked_for(
        temperature, expected, letters_folder, checkpoint, tmp_path):
    record = run(make_finetune(letters_folder, checkpoint, temperature=temperature, ema_decay=0.9), tmp_path)
    assert record['temperature'] == temperature
    saved = {tensor.item() for key, tensor in weights_of(tmp_path).items() if key.endswith('kernel_temperature')}
    assert saved == {expected}


def test_a_run_from_random_weights_starts_at_30(digits_folder, tmp_path):
    record = run(make_recipe(digits_folder, epochs=1), tmp_path)
    assert record['init'] is None and record['temperature'] == 30.0


@pytest.mark.slow
def test_a_resumed_fine_tune_ends_with_the_same_weights(letters_folder, checkpoint, tmp_path, monkeypatch):
    recipe = make_finetune(
        letters_folder, checkpoint, epochs=2, freeze='backbone', class_weights=True, ema_decay=0.9, mixup=0.2,
        checkpoint_every='1epoch')
    uninterrupted = run(recipe, tmp_path / 'uninterrupted')
    save = _checkpoints.save

    def save_and_stop(accelerator, folder, progress, ema):
        save(accelerator, folder, progress, ema)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoints, 'save', save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(recipe, tmp_path / 'resumed')
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(1234)
    resumed = run(recipe, tmp_path / 'resumed', resume='auto')
    expected = weights_of(tmp_path / 'uninterrupted')
    for key, tensor in weights_of(tmp_path / 'resumed').items():
        assert torch.equal(tensor, expected[key]), key
    assert resumed['loss'] == uninterrupted['loss']


def test_a_run_is_not_resumed_from_other_weights_under_the_same_name(letters_folder, tmp_path):
    for seed in 0, 1:
        torch.manual_seed(seed)
        save_for_hub(timm.create_model(tiny.NAME), tmp_path / 'start')
        recipe = make_finetune(letters_folder, tmp_path / 'start', image_size=8)
        if seed == 0:
            run(recipe, tmp_path / 'run')
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="is of a run with init 'sha256 .*, this one has 'sha256"):
        run(recipe, tmp_path / 'run', resume='auto')


# Inflated


@pytest.mark.parametrize('model', [tiny.NAME, tiny.COND])
def test_an_inflated_network_starts_as_the_static_one(model, static, letters_folder):
    recipe = make_finetune(letters_folder, f'inflated:{static}', model=model)
    network, origin = _start.first_network(recipe)
    expected = timm.create_model(f'local-dir:{static}', pretrained=True).eval()
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), expected(images), rtol=1e-4, atol=1e-5)
    assert origin['inflated'] and origin['architecture'] == tiny.STATIC and origin['weights'] == static.name
    kernels = next(m.weight for m in network.modules() if isinstance(m, fmd_timm.DynamicConv2d)).chunk(4)
    assert not torch.equal(kernels[0], kernels[1])


def test_an_inflated_run_keeps_the_preprocessing_and_the_licence_of_its_source(static, letters_folder, tmp_path):
    record = run(make_finetune(letters_folder, f'inflated:{static}', model=tiny.NAME), tmp_path)
    assert record['model'] == tiny.NAME and record['init']['classifier'] == 'new' and record['temperature'] is None
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    cfg = loaded.pretrained_cfg
    assert (cfg['architecture'], cfg['license'], cfg['interpolation']) == (tiny.NAME, 'mit', 'bicubic')
    assert (tuple(cfg['mean']), tuple(cfg['input_size'])) == ((0.5,) * 3, (3, 8, 8))
    assert cfg['label_names'] == ['a', 'b', 'c']
    assert f'`{static.name}` (a static `tiny_static`, inflated), sha256 `' in make_card(record, 'acme/letters').text


@pytest.mark.parametrize('changes, method, num_kernels', [
    (dict(model=None), 'FMDConv', 4),
    pytest.param(
        dict(model='dynamic_cnn', model_kwargs=["dynamic=[{'method': 'od', 'num_kernels': 2}]"]), 'ODConv', 2,
        marks=pytest.mark.slow),
])
def test_any_network_can_be_inflated_trained_and_loaded_again(
        changes, method, num_kernels, letters_folder, tmp_path):
    torch.manual_seed(0)
    save_for_hub(timm.create_model('test_efficientnet', num_classes=4, act_layer='silu'), tmp_path / 'static')
    recipe = make_finetune(letters_folder, f'inflated:{tmp_path / "static"}', image_size=32, drop_path=0.1, **changes)
    record = run(recipe, tmp_path / 'run')
    assert (record['model'], record['method'], record['init']['architecture']) == (
        'dynamic_cnn', method, 'test_efficientnet')
    assert record['model_args']['static'] == 'test_efficientnet' and record['model_args']['act_layer'] == 'silu'
    loaded = timm.create_model(f'local-dir:{tmp_path / "run"}', pretrained=True)
    layer = next(module for module in loaded.modules() if isinstance(module, fmd_timm.DynamicConv2d))
    assert (layer.method, layer.num_kernels) == (method, num_kernels)
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['architecture'] == 'dynamic_cnn'
    go_on = make_finetune(letters_folder, tmp_path / 'run', model='dynamic_cnn', image_size=32, epochs=1)
    assert run(go_on, tmp_path / 'again')['init']['classifier'] == 'kept'


@pytest.mark.parametrize('kwargs, message', [
    (['dynamic=se'], "can not be made dynamic: method must be one of cond, dy, od, fmd, got 'se'"),
    (["dynamic=[{'method': 'od', 'kernels': 2}]"], "can not be made dynamic: .*unexpected keyword argument 'kernels'"),
    (['num_kernels=2'], r"--model-kwargs must be dynamic=\.\.\. alone for an inflated dynamic_cnn, got num_kernels=2"),
])
def test_how_a_network_cannot_be_made_dynamic_is_named(kwargs, message, static, letters_folder, tmp_path):
    recipe = make_finetune(letters_folder, f'inflated:{static}', model='dynamic_cnn', model_kwargs=kwargs)
    with pytest.raises(SystemExit, match=message):
        run(recipe, tmp_path)


@pytest.mark.parametrize('model, source, message', [
    ('resnet18_fmd_cifar', 'static', 'a tiny_static does not become a resnet18_fmd_cifar: layer1.0.conv1.weight is'),
    (tiny.STATIC, 'static', "--model must be a dynamic network for --init .*, got 'tiny_static'"),
    (tiny.NAME, 'checkpoint', "a tiny_dynamic is dynamic already, leave out 'inflated:'"),
])
def test_what_cannot_be_inflated_is_named(model, source, message, letters_folder, tmp_path, request):
    recipe = make_finetune(letters_folder, f'inflated:{request.getfixturevalue(source)}', model=model)
    with pytest.raises(SystemExit, match=message):
        run(recipe, tmp_path)


# From the Hub


def test_weights_of_the_hub_are_pinned_to_the_commit_that_is_recorded(hub, letters_folder, checkpoint, tmp_path):
    files = {name: (checkpoint / name).read_bytes() for name in ('model.safetensors', 'config.json')}
    commits = hub.repos.setdefault('acme/digits', Repo()).commits
    commits.append(Commit(files, 'first'))
    first = commits[-1].id
    theirs = {key: tensor + 1 for key, tensor in weights_of(checkpoint).items()}
    save_file(theirs, tmp_path / 'later.safetensors')
    commits.append(Commit(files | {'model.safetensors': (tmp_path / 'later.safetensors').read_bytes()}, 'later'))
    for name, init, commit, stem in (
            ('latest', 'hf-hub:acme/digits', commits[-1].id, theirs['conv1.weight']),
            ('pinned', f'acme/digits@{first}', first, weights_of(checkpoint)['conv1.weight'])):
        record = run(make_finetune(letters_folder, init, freeze='backbone'), tmp_path / name)
        assert (record['init']['repo'], record['init']['revision']) == ('acme/digits', f'commit {commit}')
        assert torch.equal(weights_of(tmp_path / name)['conv1.weight'], stem)
        assert make_card(record, 'acme/letters').data.base_model == 'acme/digits'
        AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=re.escape(
            "--init 'hf-hub:acme/nothing': config.json of the Hub repository acme/nothing could not be f")):
        run(make_finetune(letters_folder, 'hf-hub:acme/nothing'), tmp_path / 'missing')


def test_a_registered_tag_is_loaded_at_the_commit_that_was_found(monkeypatch, tmp_path):
    """timm's own tags name a repository without a revision."""
    commit = '0123456789abcdef0123456789abcdef01234567'
    asked = []

    def download(repo, name, revision):
        asked.append((repo, name, revision))
        return str(tmp_path / 'snapshots' / commit / name)

    monkeypatch.setattr(_sources, 'hf_hub_download', download)
    source = _sources.find_source('resnet18.a1_in1k', '--init')
    assert asked == [('timm/resnet18.a1_in1k', 'model.safetensors', None)]
    assert (source.name, source.repo, source.revision) == (
        'resnet18.a1_in1k', 'timm/resnet18.a1_in1k', f'commit {commit}')
    assert source.cfg_overlay == dict(
        hf_hub_id=f'timm/resnet18.a1_in1k@{commit}', hf_hub_filename='model.safetensors')


# What learns, and how fast


@pytest.mark.parametrize('part', FREEZABLE)
def test_only_what_is_not_frozen_changes(part, letters_folder, checkpoint, tmp_path):
    run(make_finetune(letters_folder, checkpoint, freeze=part, weight_decay=0.1), tmp_path)
    before = weights_of(checkpoint)
    for key, tensor in weights_of(tmp_path).items():
        learns = key.startswith('fc.') or ('.attention.' in key) == (part == 'backbone')
        if key.startswith('fc.') or key.endswith('_temperature'):
            continue
        # Weights, and the statistics of the BatchNorms
        assert torch.equal(tensor, before[key]) == (not learns), key


def test_a_network_whose_attention_is_frozen_cannot_be_a_static_one(static, letters_folder, tmp_path):
    with pytest.raises(SystemExit, match='--freeze attention: tiny_static has no dynamic convolution'):
        run(make_finetune(letters_folder, static, freeze='attention'), tmp_path)


@pytest.mark.parametrize('name', [tiny.NAME, 'resnet10t', 'mobilenetv3_small_050', 'test_vit'])
def test_the_learning_rate_falls_from_layer_to_layer_and_the_classifier_has_its_own(name):
    model = timm.create_model(name, num_classes=3)
    groups = _optim.parameter_groups(model, weight_decay=0.1, layer_decay=0.5, head_lr_scale=8.0)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    scales = {names[id(parameter)]: group['lr_scale'] for group in groups for parameter in group['params']}
    assert sorted(scales) == sorted(names.values())
    layers = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    last = max(layers.values())
    for key, scale in scales.items():
        in_head = key.startswith(model.pretrained_cfg['classifier'] + '.')
        assert scale == 0.5 ** (last - layers[key]) * (8.0 if in_head else 1.0), key
    for group in groups:
        for parameter in group['params']:
            exempt = parameter.ndim <= 1 or names[id(parameter)] in getattr(model, 'no_weight_decay', set)()
            assert group['weight_decay'] == (0 if exempt else 0.1)


def test_without_decay_and_scale_the_groups_are_timms():
    model = timm.create_model(tiny.NAME)
    groups = _optim.parameter_groups(model, weight_decay=0.1, layer_decay=1.0, head_lr_scale=1.0)
    assert {group['lr_scale'] for group in groups} == {1.0}
    for decay, group in zip((0.0, 0.1), timm.optim.param_groups_weight_decay(model, weight_decay=0.1)):
        ours = {id(parameter) for g in groups if g['weight_decay'] == decay for parameter in g['params']}
        assert ours == {id(parameter) for parameter in group['params']}


def test_the_schedule_scales_every_layer_from_the_first_step_on(letters_folder, checkpoint, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.SGD.step

    def recorded(self, *args, **kwargs):
        rates.append({group['lr'] / group['lr_scale'] for group in self.param_groups})
        rates[-1] = {round(rate, 12) for rate in rates[-1]}
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, 'step', recorded)
    run(make_finetune(letters_folder, checkpoint, layer_decay=0.5, head_lr_scale=8.0, opt='sgd', lr=0.125), tmp_path)
    assert rates[0] == {0.125} and all(len(rate) == 1 for rate in rates) and max(rates[-1]) < 0.125


# Class weights


def test_balanced_weights_give_every_class_the_same_share():
    labels = [0] * 24 + [1] * 12 + [3] * 4
    weights = _optim.balanced_class_weights(labels, 4)
    assert weights[2] == 0  # without images
    per_image = weights[torch.tensor(labels)]
    assert per_image.double().mean().item() == pytest.approx(1)
    shares = torch.bincount(torch.tensor(labels), per_image.double())[[0, 1, 3]]
    torch.testing.assert_close(shares, shares[:1].expand(3))


def test_the_loss_weighs_each_image_by_its_class(letters_folder, checkpoint, tmp_path, monkeypatch):
    """The first batch's loss, against its definition in float64."""
    seen = []

    class Recorder(torch.nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            losses = super().forward(logits, labels)
            seen.append((logits.detach().double(), labels, losses.detach().double()))
            return losses

    monkeypatch.setattr(_training.nn, 'CrossEntropyLoss', Recorder)
    run(make_finetune(letters_folder, checkpoint, class_weights=True, smoothing=0.3), tmp_path)
    weights = 40 / (3 * torch.tensor([24.0, 12.0, 4.0], dtype=torch.float64))
    for logits, labels, losses in seen:
        targets = 0.7 * F.one_hot(labels, 3) + 0.1
        expected = -(targets * weights * logits.log_softmax(1)).sum(1)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)  # float32


# Refusals


@pytest.mark.parametrize('change, message', [
    (dict(init=None), '--init must be the weights to start from, or --model a network for random ones, got None'),
    (dict(init='resnet18.a9'), r"--init must be a folder, hf-hub:owner/name or a model.tag.*'resnet18.a9'.*tag \(a9\)"),
    (dict(init='resnet81'), "got 'resnet81', which is not registered in timm"),
    (dict(init=tiny.NAME), f"got '{tiny.NAME}', which has no weights on the Hub"),
    (dict(init='s3:bucket'), "got 's3:bucket': "),
    (dict(model='resnet18_fmd'), "--init .* is a tiny_dynamic, but --model is 'resnet18_fmd'"),
    (dict(freeze='head'), "--freeze must be one of backbone, attention, got 'head'"),
    (dict(init=None, model='resnet18', freeze='backbone'), '--freeze must be left out without --init'),
    (dict(layer_decay=0.0), '--layer-decay must be above 0 and at most 1, got 0.0'),
    (dict(head_lr_scale=-1.0), '--head-lr-scale must be positive and finite in float32, got -1.0'),
])
def test_bad_values_are_named(change, message, letters_folder, checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(make_finetune(letters_folder, checkpoint, **change), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_folders_that_are_no_checkpoint_are_named(letters_folder, checkpoint, tmp_path):
    for i, (files, message) in enumerate([
        ({}, "has no config.json and no model.safetensors"),
        ({'config.json': b'{}', 'pytorch_model.bin': b''}, 'has no model.safetensors'),
        ({'config.json': b'{}', 'model.safetensors': b'12345678'}, r'could not be loaded: \w+: '),
        ({'config.json': (checkpoint / 'config.json').read_bytes(), 'model.safetensors': b'12345678'},
         'could not be loaded.*: SafetensorError: '),
    ]):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(SystemExit, match=message):
            run(make_finetune(letters_folder, folder), tmp_path / 'run')


def test_networks_for_gray_images_are_refused(letters_folder, tmp_path):
    save_for_hub(timm.create_model(tiny.NAME, in_chans=1), tmp_path / 'gray')
    with pytest.raises(SystemExit, match='--init must be a network for images of 3 channels, .*gray has 1'):
        run(make_finetune(letters_folder, tmp_path / 'gray'), tmp_path / 'run')


@pytest.mark.parametrize('column', [None, 'labels'])
def test_images_with_several_labels_are_refused(column, checkpoint, tmp_path):
    features = datasets.Features(
        image=datasets.Image(), labels=datasets.List(datasets.ClassLabel(names=['a', 'b'])), id=datasets.Value('int64'))
    if column is None:
        del features['id']
    image = _dataset.load_digits()['train'][0]['image']
    columns = {'image': [image] * 2, 'labels': [[0, 1], [1]], 'id': [0, 1]}
    rows = datasets.Dataset.from_dict({name: columns[name] for name in features}, features=features)
    for split in 'train', 'test':
        rows.to_parquet(tmp_path / 'set' / f'{split}.parquet')
    with pytest.raises(SystemExit, match="column 'labels' has several labels for an image, expected one"):
        run(make_finetune(tmp_path / 'set', checkpoint, label_column=column), tmp_path / 'run')
