"""recipes/_recipe.py and _presets.py: which values are refused, and which have no effect."""
import dataclasses
import json
import re
import shlex
from pathlib import Path

import _arguments
import _arguments_checkpoint
import _arms
import _federation
import _scratch_arms
import pytest
from _arguments import parse_train
from _presets import PRESETS
from _recipe import Recipe
from _recipe_checks import check_recipe

CHECKOUT = Path(__file__).parents[2]
PAGES = [CHECKOUT / 'README.md', *sorted(CHECKOUT.glob('fmd_timm/**/*.md')), *sorted(CHECKOUT.glob('recipes/**/*.md'))]


@pytest.mark.parametrize('options, message', [
    (['--crop', 'rrc', '--scale', '0.5'],
     '--scale must be a smallest and a largest value above 0 and at most 1, got 0.5'),
    (['--crop', 'rrc', '--scale', '0.5', '0.2'], '--scale must be .* got 0.5 0.2'),
    (['--crop', 'rrc', '--ratio', '0', '2'], '--ratio must be a smallest and a largest value above 0, got 0.0 2.0'),
    (['--drop-path', '1'], '--drop-path must be at least 0 and below 1, got 1.0'),
    (['--crop-pct', '1.5'], '--crop-pct must be above 0 and at most 1, got 1.5'),
    (['--interpolation', 'nearest'], "--interpolation must be one of bilinear, bicubic, random, got 'nearest'"),
    (['--sched', 'plateau'], "--sched must be one of cosine, step, .* got 'plateau'"),
    (['--sched', 'multistep'], '--decay-milestones must be epochs for --sched multistep, such as 30 60 90, got None'),
    (['--sched', 'multistep', '--decay-milestones', '5', '17'], '--decay-milestones must be ascending epochs between 0 '
     'and --epochs 16, got 5 17'),
    (['--sched', 'wsd', '--decay-epochs', '16'],
     '--epochs must be at least the 17 of warm-up, decay and cooldown, got 16'),
    (['--min-lr', '1'], '--min-lr must be at most --lr 0.1, got 1.0'),
    (['--image-sizes', '8'], '--image-sizes must be SIZE:EPOCH ..., the sizes at most 4096, the epochs ascending from '
     '0 and below --epochs 16, got 8'),
    (['--image-sizes', '8:0', '4097:1'], '--image-sizes must be .* got 8:0 4097:1'),
    (['--image-sizes', '8:0', '12:x'], '--image-sizes must be .* got 8:0 12:x'),
    (['--image-sizes', '8:4', '12:4'], '--image-sizes must be .* got 8:4 12:4'),
    (['--image-sizes', '8:0', '12:16'], '--image-sizes must be .* got 8:0 12:16'),
    (['--opt-betas', '0.9', '1.0'], '--opt-betas must be at least 0 and below 1, got 0.9 1.0'),
    (['--seed', '-1'], '--seed must be at least 0 and at most 4294967295, got -1'),
    (['--seed', '4294967296'], '--seed must be at least 0 and at most 4294967295, got 4294967296'),
    (['--image-size', '100000000'], '--image-size must be at least 1 and at most 4096, got 100000000'),
    (['--temperature', '1e300'], r'--temperature must be positive and finite in float32, got 1e\+300'),
    (['--weight-decay', '1e308'], r'--weight-decay must be between 0 and 1, got 1e\+308'),
    (['--dataset', ''], "--dataset must be 'digits', a folder or a dataset id on the Hub, got ''"),
    (['--attention-lr-scale', '0'], '--attention-lr-scale must be positive and finite in float32, got 0.0'),
    (['--model-kwargs', 'num_kernels'], '--model-kwargs must be NAME=VALUE ..., got num_kernels'),
    (['--model-kwargs', 'num_kernels=2', 'num_classes=3'], '--model-kwargs must be without num_classes, which the '
     'dataset says, got num_kernels=2 num_classes=3'),
    (['--comm-hook', 'int8'], "--comm-hook must be one of bf16, fp16, got 'int8'"),
])
def test_values_that_cannot_work_are_refused(options, message):
    with pytest.raises(SystemExit, match=f'^{message}$'):
        parse_train(['digits', *options])


@pytest.mark.parametrize('options, needed', [
    (['--scale', '0.5', '1'], '--crop rrc'),
    (['--crop', 'rrc', '--aa', 'rand-m5', '--color-jitter', '0.4'], 'no --aa but 3a'),
    (['--bce-target-thresh', '0.2'], '--bce-loss'),
    (['--bce-loss', '--bce-target-thresh', '0.2', '--smoothing', '0.1'], 'no --bce-target-thresh'),
    (['--task-loss-weight', '0.5'], '--kd-model-name'),
    (['--warmup-epochs', '0', '--warmup-lr', '0.01'], '--warmup-epochs'),
    (['--decay-milestones', '2', '4'], '--sched multistep'),
    (['--decay-rate', '0.5'], '--sched step, multistep or poly'),
    (['--decay-epochs', '2'], '--sched step, wsd or rsqrt'),
    (['--sched', 'step', '--min-lr', '0.01'], '--sched cosine, poly, wsd, rsqrt or tanh'),
    (['--init', 'resnet18.a1_in1k', '--model-kwargs', 'num_kernels=2'], '--model without --init'),
    (['--init', 'resnet18.a1_in1k', '--annealed-by', '0.2'], '--temperature'),
])
def test_options_without_effect_are_refused_where_they_are_given(options, needed):
    name = [option for option in options if option.startswith('--')][-1]
    with pytest.raises(SystemExit, match=f'^{name} has no effect: it needs {needed}'):
        parse_train(['digits', *options])


def test_values_of_a_preset_without_effect_are_not_the_users_fault():
    recipe = parse_train(['imagenet', '--sched', 'cosine', '--epochs', '20']).recipe
    assert recipe == dataclasses.replace(PRESETS['imagenet'], sched='cosine', epochs=20)
    parse_train(['digits', '--bce-loss', '--bce-target-thresh', '0.2', '--smoothing', '0'])


def test_sizes_change_at_their_epochs():
    recipe = Recipe(image_size=224, image_sizes=['128:2', '192:5'], epochs=8)
    assert [recipe.train_size(epoch) for epoch in range(8)] == [224, 224, 128, 128, 128, 192, 192, 192]
    assert recipe.train_sizes() == {224, 128, 192}
    assert Recipe().train_sizes() == {224}


def test_the_published_recipes():
    """FMDConv and ODConv; KernelWarehouse; A2 of "ResNet strikes back"."""
    for preset, values in dict(
        imagenet=dict(
            epochs=100, batch_size=256, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4, sched='multistep',
            decay_milestones=[30, 60, 90], decay_rate=0.1, warmup_epochs=0, smoothing=0.0, image_size=224),
        imagenet_kw=dict(
            model='resnet18_fmd', epochs=300, batch_size=4096, opt='adamw', lr=4e-3, min_lr=1e-6, weight_decay=0.05,
            warmup_epochs=20, smoothing=0.1, mixup=0.8, cutmix=1.0, reprob=0.25, drop_path=0.1,
            aa='rand-m9-mstd0.5-inc1'),
        imagenet_a2=dict(
            model='resnet50_fmd', epochs=300, batch_size=2048, opt='lamb', lr=5e-3, weight_decay=0.02, warmup_epochs=5,
            smoothing=0.0, mixup=0.1, cutmix=1.0, drop_path=0.05, aug_repeats=3, bce_loss=True, bce_target_thresh=0.2,
            aa='rand-m7-mstd0.5-inc1', crop_pct=0.95, image_size=224),
    ).items():
        recipe = PRESETS[preset]
        check_recipe(recipe)
        assert {name: getattr(recipe, name) for name in values} == values and recipe.dataset == 'ILSVRC/imagenet-1k'


def test_a_recipe_is_the_same_after_json():
    for recipe in PRESETS.values():
        assert Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe)))) == recipe


def test_other_recipes_of_the_field_can_be_said():
    """A3 of "ResNet strikes back", three-augment of DeiT III, growing images and a linear schedule as in FFCV."""
    parse_train((
        'imagenet_a2 --epochs 100 --lr 8e-3 --image-size 160 --test-size 224 --drop-path 0 --aug-repeats 1 '
        '--aa rand-m6-mstd0.5-inc1').split())
    parse_train('imagenet_a2 --aa 3a --color-jitter 0.3 --scale 0.08 1 --opt-eps 1e-8'.split())
    parse_train((
        'imagenet --epochs 16 --image-sizes 160:0 176:8 192:12 --test-size 256 --sched poly --decay-rate 1 '
        '--warmup-epochs 2 --batch-size 1024 --lr 1.7 --weight-decay 5e-5 --smoothing 0.1 --comm-hook bf16').split())


def test_the_commands_of_the_pages_are_understood():
    text = ''.join(page.read_text(encoding='utf-8') for page in PAGES).replace('\\\n', ' ')
    parsers = {
        **vars(_arguments), **vars(_arguments_checkpoint), **vars(_arms), **vars(_federation), **vars(_scratch_arms)}
    commands = re.findall(r'(?:python|launch.*?) recipes/(\w+)\.py\b([^#`"\n]*)', text)
    for script, arguments in commands:
        if '--help' not in arguments:
            parsers[f'parse_{script}'](shlex.split(arguments))
    assert {'train', 'evaluate', 'predict', 'publish', 'compare', 'bench'} <= {script for script, _ in commands}


def test_the_preset_may_stand_behind_the_options():
    run = parse_train(['--lr', '0.2', '--dataset', 'digits', 'cifar10'])
    assert run.preset == 'cifar10' and run.recipe == dataclasses.replace(PRESETS['cifar10'], lr=0.2, dataset='digits')
