import json
import re
from pathlib import Path

import processes
import pytest
import timm
import torch
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, parse_eval_result_entries
from inputs import make_record

from fmd_timm.hub import save_for_hub
from fmd_timm.model_card import MAY_BE_NONE, REQUIRED, make_card, make_eval_results

HUB_CARDS = Path(__file__).parents[1] / 'hub_cards'
REPO = 'acme/resnet18_fmd_cifar.digits'


def test_metadata_survives_a_round_trip():
    card = make_card(make_record(dataset='acme/digits'), REPO)
    again = ModelCard(str(card))
    assert str(again) == str(card)
    assert again.data.to_dict() == ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    assert (again.data.library_name, again.data.license) == ('timm', 'apache-2.0')
    assert again.data.pipeline_tag == 'image-classification'
    assert {'image-classification', 'timm', 'transformers', 'fmd_timm', 'dynamic-convolution'} <= set(again.data.tags)
    assert again.data.model_name == 'resnet18_fmd_cifar.digits'
    accuracies = {result.metric_name: result for result in again.data.eval_results}
    assert accuracies.keys() == {'top-1', 'top-5'}
    assert accuracies['top-1'].metric_value == 0.972222
    assert accuracies['top-5'].metric_value == 0.997222
    for result in accuracies.values():
        assert (result.metric_type, result.task_type) == ('accuracy', 'image-classification')
        assert (result.dataset_type, result.dataset_split) == ('acme/digits', 'test')


def test_only_hub_ids_are_listed_as_datasets():
    card = make_card(make_record(dataset='acme/digits'), REPO)
    assert card.data.datasets == ['acme/digits']
    assert make_card(make_record(dataset='digits'), REPO).data.datasets is None


def test_a_folder_is_an_imagefolder_by_its_name():
    card = make_card(make_record(dataset='фото (2024)', dataset_type='imagefolder'), REPO)
    for result in ModelCard(str(card)).data.eval_results:
        assert (result.dataset_type, result.dataset_name) == ('imagefolder', 'фото (2024)')
    assert card.data.datasets is None and 'trained on `фото (2024)`' in card.text


def test_a_run_on_several_kinds_of_hardware_says_so():
    legs = make_record()['legs']
    assert 'other hardware' not in make_card(make_record(legs=2 * legs), REPO).text
    legs += [dict(legs[0], device_count=1, epoch_seconds=[1.0, 1.0])]
    line = (
        '- The run was continued on other hardware: 3 epochs on 2 x NVIDIA H200 (bf16), 2 epochs on 1 x NVIDIA H200 '
        '(bf16). Times and scores of training are of the epochs on the hardware of the table.')
    assert line in make_card(make_record(legs=legs), REPO).text.splitlines()
    untimed = dict.fromkeys(('median_epoch_seconds', 'ies', 'rcs', 'train_images_per_second'))
    assert 'are missing: no epoch was' in make_card(make_record(legs=legs, **untimed), REPO).text


def test_the_sections_are_those_of_timms_cards_in_their_order():
    def sections(card):
        return re.findall('^#+ (.*)$', re.sub('```.*?```', '', card.text, flags=re.DOTALL), re.MULTILINE)

    usage = [
        'Model Usage', 'Image Classification', 'Feature Map Extraction', 'Image Embeddings',
        'Image Classification with transformers']
    first, rest = [f'Model card for {REPO.partition("/")[2]}', 'Model Details', *usage], [
        'Training', 'Differences from the paper', 'Limits', 'Licence', 'Citation']
    assert sections(make_card(make_record(), REPO)) == first + rest
    assert sections(make_card(make_record(twin=make_record(method=None)), REPO)) == [*first, 'Model Comparison', *rest]


@pytest.mark.parametrize('model, method, papers', [
    ('resnet18_fmd_cifar', 'FMDConv', ['FMDConv: Fast Multi-Attention .*2503.17530', 'Deep Residual .*1512.03385']),
    ('mobilenetv3_small_100_dy', 'DyConv', ['Dynamic Convolution: .*1912.03458', 'Searching for .*1905.02244']),
    ('dynamic_cnn', 'ODConv', ['Omni-Dimensional Dynamic Convolution: .*2209.07947']),
    ('mobilenetv2_100', None, ['MobileNetV2: .*1801.04381']),
])
def test_model_details_are_those_of_timms_cards(model, method, papers):
    lines = make_card(make_record(model=model, method=method), REPO).text.splitlines()
    first = lines.index('## Model Details') + 1
    assert lines[first:first + 7] == [
        '- **Model Type:** Image classification / feature backbone', '- **Model Stats:**', '  - Params (M): 44.7',
        '  - GMACs: 0.568', '  - Activations (M): 1.23', '  - Image size: 32 x 32', '- **Papers:**']
    named = lines[first + 7:lines.index('- **Dataset:** digits')]
    assert len(named) == len(papers)
    for line, paper in zip(named, papers):
        assert re.fullmatch(f'  - {paper}', line) and ': https://arxiv.org/abs/' in line


def test_a_network_is_compared_with_its_static_twin():
    twin = make_record(
        model='resnet18_cifar', method=None, top1=96.5, parameters=11_173_962, gmacs=0.555, macts=1.1,
        infer_images_per_second=2588.04, median_epoch_seconds=None)
    lines = make_card(make_record(twin=twin), REPO).text.splitlines()
    first = lines.index('|model|top1|top5|img_size|param_count|gmacs|macts|samples_per_sec|batch_size|epoch|')
    assert lines[first + 2:first + 4] == [
        '|resnet18_cifar|96.50|99.72|32|11.17|0.555|1.1|2588.0|256|-|',
        '|resnet18_fmd_cifar|97.22|99.72|32|44.71|0.568|1.23|81155.7|256|1.250|']


def test_the_hub_gets_the_accuracy_on_a_dataset_of_its_own():
    text = make_eval_results(make_record(dataset='acme/digits', dataset_config='small'), REPO)
    assert parse_eval_result_entries(yaml.safe_load(text)) == [EvalResultEntry(
        dataset_id='acme/digits', task_id='small', value=97.2222, date='2026-11-20T12:00:00',
        source_url=f'https://huggingface.co/{REPO}/blob/main/result.json', source_name='Run record',
        notes='top-1 accuracy in percent, split test')]
    assert 'task_id: default' in make_eval_results(make_record(dataset='acme/digits'), REPO)
    assert make_eval_results(make_record(dataset='digits'), REPO) is None
    assert make_eval_results(make_record(dataset='acme', dataset_type='imagefolder'), REPO) is None


def test_the_command_can_be_repeated_from_what_the_package_index_has():
    record = make_record(versions={'fmd-timm': '0.1.0', 'torch': '2.15.0'})
    training = make_card(record, REPO).text.partition('## Training')[2]
    lines = training.partition('```bash\n')[2].partition('```')[0].splitlines()
    assert "'fmd-timm==0.1.0'" in lines[0] and lines[1:] == ["pip install '.[recipes]'", record['command']]


def test_a_dataset_may_have_any_name():
    card = make_card(make_record(dataset='a: [b', dataset_type='imagefolder'), REPO)
    assert '- **Dataset:** a: [b' in card.text.splitlines() and card.text.startswith('# Model card for ')


def test_the_card_says_how_to_install_the_package_and_where_the_paper_is():
    text = make_card(make_record(), REPO).text
    assert text.index('pip install fmd-timm\n') < text.index('import fmd_timm')
    assert 'https://pypi.org/project/fmd-timm/' in text and 'https://arxiv.org/abs/2503.17530' in text


@pytest.mark.parametrize('row', [
    '| Top-1 accuracy | 97.22 % |',
    '| Top-5 accuracy | 99.72 % |',
    '| Cross-entropy | 0.1235 |',
    '| Validation images | 360 |',
    '| Training epoch, median | 1.250 s |',
    '| Share of it that the device waited for images, at most | 5.0 % |',
    '| IES, training: epoch time / top-1 as a fraction | 1.286 s |',
    '| RCS, training: top-1 as a fraction / epoch time | 0.7778 1/s |',
    '| IES, inference: time per correct image | 0.01234 ms |',
    '| RCS, inference: correct images per second | 78,901 1/s |',
    '| Throughput, training | 1,126 images/s |',
    '| Throughput, inference, batch 256 | 81,156 images/s |',
    '| Peak memory | 1,235 MiB |',
    '| Parameters | 44,712,345 |',
    '| Entropy of the kernel attention: 1 where all kernels count equally, 0 where one does | 0.876 |',
    '| Standard deviation of a gate over the images | 0.043 |',
    '| Distance of a kernel from the mean of the kernels, relative to its norm | 0.500 |',
    '| GMACs | 0.5679 |',
    '| Hardware | 2 x NVIDIA H200 |',
    '| Precision | bf16 |',
    '| Input (channels, height, width) | 3 x 32 x 32 |',
    '| Global batch | 128 |',
    'python recipes/train.py --preset digits --seed 7',
    '| Architecture | `resnet18_fmd_cifar`, `{"num_kernels": 2}` |',
    '| Started from | random weights |',
    '| Teacher | - |',
    '| Images that could not be read and were left out | 0 of train, - of validation |',
    '| Dataset | `digits`, 10 classes |',
    '| Training split | `train`, 1,437 images |',
    '| Validation split | `test`, 360 images |',
    '| Preset | digits |',
    '| Epochs | 3 |',
    '| Seed | 7 |',
    '| Versions | torch 2.15.0, timm 1.0.31 |',
    '| Code | commit `0123456789abcdef` |',
    '| Finished | 2026-11-20T12:00:00 |',
])
def test_body_states_what_the_record_says(row):
    record = make_record(model_args={'num_kernels': 2}, unread_images=dict(train=0, validation=None))
    assert row in make_card(record, REPO).text.splitlines()


@pytest.mark.parametrize('name', make_record())
def test_a_missing_field_is_named_if_the_card_needs_it(name):
    record = make_record()
    del record[name]
    if name in REQUIRED + MAY_BE_NONE:
        with pytest.raises(ValueError, match=f'the run record has no {name}$'):
            make_card(record, REPO)
    else:
        assert str(make_card(record, REPO)) == str(make_card(make_record(), REPO))


@pytest.mark.parametrize('name', REQUIRED)
def test_a_field_without_value_is_named(name):
    with pytest.raises(ValueError, match=fr'has no {name}$'):
        make_card(make_record(**{name: None}), REPO)


def test_what_was_not_measured_is_a_dash():
    text = make_card(make_record(**dict.fromkeys(MAY_BE_NONE)), REPO).text
    assert '| Peak memory | - |' in text
    assert 'None' not in text


def usage(card, folder):
    """The Python of the card, with the Hub's repository replaced by a local folder."""
    code = '\n'.join(re.findall(r'^```python\n(.*?)^```$', card.text, flags=re.DOTALL | re.MULTILINE))
    assert (code.count(f"'hf-hub:{REPO}'"), code.count(f"from_pretrained('{REPO}')")) == (3, 1)
    return code.replace(f'hf-hub:{REPO}', f'local-dir:{folder}').replace(f"'{REPO}'", repr(str(folder)))


@pytest.mark.parametrize('in_chans,num_classes', [(3, 10), (1, 4)])
def test_usage_runs_as_pasted(in_chans, num_classes, tmp_path):
    model = timm.create_model(
        'resnet18_fmd_cifar', in_chans=in_chans, num_classes=num_classes, channels=(8, 16, 32, 64)).eval()
    save_for_hub(model, tmp_path, model_config=dict(label_names=[f'digit {i}' for i in range(num_classes)]))
    card = make_card(make_record(input_size=[in_chans, 32, 32], num_classes=num_classes), REPO)
    code = usage(card, tmp_path)
    code += "torch.save([image.mode, transform(image), logits, feature_maps, embedding], 'seen.pt')\n"
    done = processes.run('-c', code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    mode, image, seen, feature_maps, embedding = torch.load(tmp_path / 'seen.pt')
    assert mode == ('L' if in_chans == 1 else 'RGB')
    with torch.no_grad():
        logits, features = model(image.unsqueeze(0)), model.forward_features(image.unsqueeze(0))
        expected = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(seen, logits)
    torch.testing.assert_close(feature_maps[-1], features)
    torch.testing.assert_close(embedding, expected)
    probabilities, indices = logits.softmax(dim=-1)[0].topk(min(5, num_classes))
    lines = [f'digit {index}: {probability:.1%}' for probability, index in zip(probabilities, indices)]
    assert done.stdout.splitlines() == lines + [str(feature_map.shape) for feature_map in feature_maps]


def test_a_fine_tune_says_what_it_started_from_and_keeps_its_licence():
    commit = '0123456789abcdef0123456789abcdef01234567'
    init = dict(
        weights='resnet18.a1_in1k', architecture='resnet18', inflated=True, repo='timm/resnet18.a1_in1k',
        revision=f'commit {commit}', license='cc-by-nc-4.0', classifier='new',
    )
    card = make_card(make_record(init=init), REPO)
    row = f'| Started from | `resnet18.a1_in1k` (a static `resnet18`, inflated), commit `{commit}`, new classifier |'
    assert row in card.text.splitlines()
    assert (card.data.license, card.data.base_model) == ('cc-by-nc-4.0', 'timm/resnet18.a1_in1k')
    assert 'The weights started from `resnet18.a1_in1k`, whose licence is `cc-by-nc-4.0`.' in card.text

    init |= dict(weights='run', inflated=False, repo=None, revision='sha256 abc', license=None, classifier='kept')
    card = make_card(make_record(init=init), REPO)
    assert '| Started from | `run` (`resnet18`), sha256 `abc`, kept classifier |' in card.text.splitlines()
    assert (card.data.license, card.data.base_model) == ('unknown', None)


def test_a_teacher_is_named_with_its_licence():
    commit = '0123456789abcdef0123456789abcdef01234567'
    teacher = dict(
        weights='resnet50.a1_in1k', architecture='resnet50', repo='timm/resnet50.a1_in1k', revision=f'commit {commit}',
        license='apache-2.0')
    row = f'| Teacher | `resnet50.a1_in1k` (`resnet50`), commit `{commit}`, licence `apache-2.0` |'
    assert row in make_card(make_record(teacher=teacher), REPO).text.splitlines()


@pytest.mark.parametrize('method, temperature, says, says_not', [
    ('FMDConv', 30.0, ['[FMDConv](', 'annealed from 30 to 1, as the paper says', 'one image', '@article{zhang'], []),
    ('FMDConv', None, ['was not annealed'], ['as the paper says']),
    ('ODConv', 34.0, ['[ODConv](', 'annealed from 34 to 1.', 'one image'], ['FMDConv]', '@article', 'conv_bias']),
    ('DyConv', 30.0, ['[DyConv](', 'annealed from 30 to 1.'], ['one image']),
    ('CondConv', None, ['[CondConv](', '8 kernels'], ['annealed']),
    (None, None, ['with static convolutions'], ['annealed', 'Differences', 'dynamic']),
])
def test_the_card_is_of_the_method_and_of_what_was_done(method, temperature, says, says_not):
    card = make_card(make_record(model='resnet18_cifar', method=method, temperature=temperature), REPO)
    text = str(card).replace('`fmd_timm`', '')
    assert all(words in text for words in says) and not any(words in text for words in says_not)
    assert ('dynamic-convolution' in card.data.tags) == (method is not None)


def check_committed_card(path):
    record = json.loads(path.read_text(encoding='utf-8'))
    assert path.with_suffix('.md').read_text(encoding='utf-8') == str(make_card(record, record['hub']['repo']))


def test_committed_cards_are_what_their_records_say():
    for path in HUB_CARDS.glob('*.json'):
        check_committed_card(path)


def test_a_card_that_was_edited_is_noticed(tmp_path):
    path = tmp_path / 'resnet18_fmd_cifar.digits.json'
    path.write_text(json.dumps(make_record(hub=dict(repo=REPO))))
    card = str(make_card(make_record(), REPO))
    path.with_suffix('.md').write_text(card)
    check_committed_card(path)
    path.with_suffix('.md').write_text(card.replace('97.22', '98.22'))
    with pytest.raises(AssertionError):
        check_committed_card(path)
