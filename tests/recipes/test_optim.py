"""recipes/_optim.py, _mixup.py and _distillation.py: timm's parts do what a recipe says."""
import _distillation
import _optim
import pytest
import timm
import tiny
import torch
from _mixup import BatchMixup
from _recipe import Recipe
from _training import learning_rate
from timm.loss import BinaryCrossEntropy
from torch.nn import functional as F

from fmd_timm import DynamicConv2d, inflate
from fmd_timm.layers import METHODS


def rates(recipe, steps_per_epoch=2):
    """The learning rate of each step."""
    network = timm.create_model(tiny.STATIC)
    optimizer = _optim.make_optimizer(recipe, network)
    scheduler = _optim.make_scheduler(recipe, optimizer, steps_per_epoch)
    seen = []
    for step in range(recipe.epochs * steps_per_epoch):
        seen.append(learning_rate(optimizer))
        scheduler.step_update(step + 1)
    return seen


@pytest.mark.parametrize('options, expected', [
    (dict(sched='multistep', decay_milestones=[1, 3], epochs=4), [1] + 4 * [.1] + 3 * [.01]),  # a step early
    (dict(sched='step', decay_epochs=2.0, decay_rate=0.5, epochs=4), [1, 1, 1, 1, .5, .5, .5, .5]),
    (dict(sched='poly', decay_rate=1.0, epochs=2), [1, .75, .5, .25]),
    (dict(sched='wsd', decay_epochs=1.0, epochs=2), [1, 1, 1, 1 - 2 ** -0.5]),
    (dict(sched='constant', warmup_epochs=1, warmup_lr=0.5, epochs=2), [.5, .75, 1, 1]),
    (dict(sched='cosine', min_lr=0.1, cooldown_epochs=1, epochs=2), [1, .55, .1, .1]),
])
def test_a_schedule_is_timms_of_that_name_in_as_many_epochs(options, expected):
    assert rates(Recipe(lr=1.0, **dict(dict(warmup_epochs=0), **options))) == pytest.approx(expected)


@pytest.mark.parametrize('options, message', [
    (dict(opt='sdg'), "--opt must be one of timm.optim.list_optimizers.*, got 'sdg'"),
    (dict(opt='lbfgs'), "--opt must be one of .* got 'lbfgs'"),
    (dict(opt='adahessian'), "--opt must be an optimizer that gradients are enough for, got 'adahessian'"),
    (dict(opt='bnbadam'), "--opt must be an optimizer that can be made here .*, got 'bnbadam'"),
    (dict(opt_eps=1e-8), '--opt-eps must be left out: sgd has none, got 1e-08'),
    (dict(opt_betas=[0.9, 0.99]), '--opt-betas must be left out: sgd has none, got 0.9 0.99'),
    (dict(opt='adamw', opt_betas=[0.9]), '--opt-betas must be 2 values, got 0.9'),
])
def test_optimizers_that_cannot_work_are_refused(options, message):
    with pytest.raises(SystemExit, match=message):
        _optim.check_optimizer(Recipe(**options))


@pytest.mark.parametrize('name', ['lamb', 'adamw', 'lion', 'lookahead_adamw', 'muon', 'adan', 'lars'])
def test_other_optimizers_of_timm_take_a_step(name):
    recipe = Recipe(opt=name, lr=1e-3)
    _optim.check_optimizer(recipe)
    network = timm.create_model(tiny.NAME)
    optimizer = _optim.make_optimizer(recipe, network)
    before = network.fc.weight.clone()
    network(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(network.fc.weight, before)


def test_epsilon_and_betas_reach_the_optimizer():
    group = _optim.make_optimizer(
        Recipe(opt='lamb', opt_eps=1e-4, opt_betas=[0.8, 0.9]), timm.create_model(tiny.NAME)).param_groups[0]
    assert group['eps'] == 1e-4 and tuple(group['betas']) == (0.8, 0.9)


def test_the_loss_is_that_of_the_recipe():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    targets = F.one_hot(labels, 3) * 0.7 + 0.1
    weights = torch.tensor([2 / 3, 1, 2])
    plain = _optim.make_criterion(Recipe(), None, 3)(logits, labels).mean()
    torch.testing.assert_close(plain, F.cross_entropy(logits, labels, label_smoothing=0.1))
    weighed = _optim.make_criterion(Recipe(class_weights=True, smoothing=0.0), labels.tolist(), 3)(logits, labels)
    torch.testing.assert_close(weighed, weights[labels] * F.cross_entropy(logits, labels, reduction='none'))
    bce = dict(bce_loss=True, smoothing=0.2)
    torch.testing.assert_close(
        _optim.make_criterion(Recipe(**bce), None, 3)(logits, labels),
        BinaryCrossEntropy(smoothing=0.2)(logits, labels))
    torch.testing.assert_close(  # smoothed already
        _optim.make_criterion(Recipe(**bce, mixup=0.1), None, 3)(logits, targets),
        F.binary_cross_entropy_with_logits(logits, targets))
    torch.testing.assert_close(
        _optim.make_criterion(Recipe(**bce, bce_target_thresh=0.2, bce_sum=True), None, 3)(logits, targets),
        3 * F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float()))
    torch.testing.assert_close(
        _optim.make_criterion(Recipe(**bce, class_weights=True), labels.tolist(), 3)(logits, targets),
        F.binary_cross_entropy_with_logits(logits, targets, weight=weights))


@pytest.mark.parametrize('alphas', [(0.5, 0.0), (0.0, 1.0), (0.5, 1.0)], ids=['mixup', 'cutmix', 'both'])
def test_images_are_mixed_alike_in_one_batch_and_in_parts_of_it(alphas):
    torch.manual_seed(0)
    images, labels = torch.rand(12, 3, 8, 8).to(memory_format=torch.channels_last), torch.arange(12)
    for step in range(4):
        mixup = BatchMixup(*alphas, num_classes=12, seed=3)
        whole, targets = mixup(images, labels, step)
        assert whole.is_contiguous(memory_format=torch.channels_last) and not torch.equal(whole, images)
        parts = [mixup(images[i:i + 4], labels[i:i + 4], step) for i in (0, 4, 8)]
        for one, of_parts in (whole, torch.cat([p[0] for p in parts])), (targets, torch.cat([p[1] for p in parts])):
            first, second = ({tuple(row.flatten().tolist()) for row in rows} for rows in (one, of_parts))
            assert first == second and len(first) == 12
    draws = [mixup(images, labels, step)[1].max().item() for step in range(8)]
    assert len(set(draws)) > 4


def test_a_teacher_sees_images_as_it_was_trained_and_is_learned_from():
    torch.manual_seed(0)
    network = timm.create_model(tiny.STATIC, num_classes=4).eval()
    teacher = _distillation.make_teacher(network, ['a', 'b', 'c', 'd'], {8}, print)
    mean, std = torch.full((1, 3, 1, 1), 0.2), torch.full((1, 3, 1, 1), 0.7)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(
        teacher.normalize_input((images - mean) / std, mean, std), (images - teacher.mean_kd) / teacher.std_kd)


@pytest.mark.parametrize('name, label_names, classes, outputs', [
    (tiny.STATIC, ['dog', 'cat'], ['cat', 'dog'], [1, 0]),
    (tiny.STATIC, ['dog', 'cow', 'cat'], ['cat', 'dog'], [2, 0]),
    ('test_resnet', None, ['n01443537', 'n01440764', 'n02123045'], [1, 0, 281]),  # ImageNet's, without names of its own
])
def test_the_classes_of_a_teacher_are_found_by_name(name, label_names, classes, outputs):
    torch.manual_seed(0)
    network = timm.create_model(name, **dict(num_classes=len(label_names)) if label_names else {})
    network.pretrained_cfg = dict(network.pretrained_cfg, label_names=label_names)
    teacher = _distillation.make_teacher(network, classes, {32}, pytest.fail)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(teacher(images), network(images)[:, outputs])


def test_a_teacher_of_other_classes_or_other_sizes_is_refused(capsys):
    network = timm.create_model(tiny.STATIC, num_classes=2)
    teacher = _distillation.make_teacher(network, ['cat', 'dog'], {8, 16}, print)
    assert teacher.outputs.tolist() == [0, 1] and 'matched by their numbers' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="which are 'cat', 'cow', 'dog', got one of 2 without names"):
        _distillation.make_teacher(network, ['cat', 'cow', 'dog'], {8}, pytest.fail)
    network.pretrained_cfg = dict(network.pretrained_cfg, label_names=['dog', 'cat'])
    with pytest.raises(SystemExit, match="which are 'cat', 'cow', got one of 'dog', 'cat'"):
        _distillation.make_teacher(network, ['cat', 'cow'], {8}, pytest.fail)
    vit = timm.create_model('test_vit', num_classes=2)  # for 160 pixels
    with pytest.raises(SystemExit, match='must be a network for images of 8 pixels'):
        _distillation.make_teacher(vit, ['cat', 'dog'], {8}, print)


@pytest.mark.parametrize('method', METHODS.values())
@pytest.mark.parametrize('opt, options', [
    ('sgd', {}), ('adamw', dict(opt_eps=1e-15)), ('lion', {}), ('lamb', dict(opt_eps=1e-15)),
    ('lars', dict(opt_eps=1e-15))])
def test_the_mixed_kernel_of_an_inflated_network_moves_as_the_static_one(method, opt, options):
    """In the first step of an optimizer, with weight decay."""
    torch.manual_seed(0)
    static = timm.create_model(tiny.STATIC, zero_init_last=False).double()  # whose branches learn
    inflated = inflate(static, method, noise=0.0)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    recipe = Recipe(opt=opt, lr=0.01, weight_decay=0.1, sched='constant', warmup_epochs=0, **options)
    kernels = {}
    for network in static, inflated:
        conv = network.layer1[0].conv1
        kernels[network] = mixed_kernel(conv)
        optimizer = _optim.make_optimizer(recipe, network)
        _optim.make_scheduler(recipe, optimizer, 1)  # which scales the learning rate of each group
        network(images).square().mean().backward()
        assert conv.weight.grad.abs().max() > 0
        shares = _optim.shares_of_kernels(conv) if network is inflated else None
        optimizer.step()
        kernels[network] -= mixed_kernel(conv, shares)
    torch.testing.assert_close(kernels[inflated], kernels[static], rtol=1e-6, atol=1e-15)


def test_the_attention_has_a_learning_rate_of_its_own():
    network = timm.create_model(tiny.NAME)
    groups = _optim.make_optimizer(Recipe(attention_lr_scale=0.1, head_lr_scale=3.0), network).param_groups
    scales = {id(parameter): group['lr_scale'] for group in groups for parameter in group['params']}
    for name, parameter in network.named_parameters():
        assert scales[id(parameter)] == (0.1 if '.attention.' in name else 3.0 if name.startswith('fc') else 1.0)


def mixed_kernel(conv, shares=None):
    """As the attention of an inflated network mixes it at the start."""
    if not isinstance(conv, DynamicConv2d):
        return conv.weight.detach().clone()
    shares = shares or _optim.shares_of_kernels(conv)
    return torch.einsum('k,koihw->oihw', shares[0], conv.weight.detach().unflatten(0, (conv.num_kernels, -1)))
