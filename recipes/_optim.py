"""What learns, how fast and by which loss: timm's optimizer, schedule and losses with the values of a recipe."""
from functools import partial
from typing import Any

import torch
from _recipe import Recipe, refuse
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from fmd_timm import DynamicConv2d
from fmd_timm.inflate import shares_of_kernels


def check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that timm doesn't have or that can't work here, and options that it doesn't take.

    Raises:
        SystemExit: Names the option, what it must be and what it is.
    """
    name = recipe.opt.lower().removeprefix('lookahead_')
    if name not in list_optimizers():
        refuse(recipe, 'opt', 'one of timm.optim.list_optimizers(), such as sgd, adamw, lamb, lion, muon')
    info = get_optimizer_info(name)
    if info.second_order:
        refuse(recipe, 'opt', 'an optimizer that gradients are enough for')
    if recipe.opt_eps is not None and not info.has_eps:
        refuse(recipe, 'opt_eps', f'left out: {recipe.opt} has none')
    if recipe.opt_betas is not None and len(recipe.opt_betas) != info.has_betas * info.num_betas:
        expected = f'{info.num_betas} values' if info.has_betas else f'left out: {recipe.opt} has none'
        refuse(recipe, 'opt_betas', expected)
    try:
        create_optimizer_v2([nn.Parameter(torch.zeros(2, 2))], **optimizer_arguments(recipe))
    except Exception as error:  # of the packages that some need
        refuse(recipe, 'opt', f'an optimizer that can be made here ({type(error).__name__}: {error})')


def optimizer_arguments(recipe: Recipe) -> dict[str, Any]:
    own = dict(eps=recipe.opt_eps, betas=recipe.opt_betas and tuple(recipe.opt_betas))
    return dict(
        opt=recipe.opt, lr=recipe.lr, momentum=recipe.momentum,
        **{name: value for name, value in own.items() if value is not None})


def make_optimizer(recipe: Recipe, network: nn.Module) -> torch.optim.Optimizer:
    groups = partial(
        parameter_groups, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
        head_lr_scale=recipe.head_lr_scale, attention_lr_scale=recipe.attention_lr_scale, opt=recipe.opt)
    return create_optimizer_v2(network, param_group_fn=groups, **optimizer_arguments(recipe))


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule of the learning rate, which changes with every step and has `recipe.epochs` in all."""
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=recipe.sched, num_epochs=recipe.epochs - recipe.cooldown_epochs,
            decay_epochs=recipe.decay_epochs, decay_milestones=recipe.decay_milestones or (),
            decay_rate=recipe.decay_rate, min_lr=recipe.min_lr, warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr, step_on_epochs=False, updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:
        refuse(recipe, 'sched', f'one whose phases have a step each, of {steps_per_epoch} in an epoch ({error})')
    return scheduler


def make_criterion(recipe: Recipe, labels: list[int] | None, num_classes: int) -> nn.Module:
    """The loss of (B, num_classes) logits for labels (B,), or targets (B, num_classes) where images are mixed.

    It is the mean, or (B,) losses to take the mean of.

    Args:
        recipe: Of the run.
        labels: Of the training images, where classes are weighed.
        num_classes: How many there are.
    """
    weights = balanced_class_weights(labels, num_classes) if recipe.class_weights else None
    if recipe.bce_loss:
        return create_classification_loss(
            'bce', smoothing=recipe.smoothing, soft_targets=recipe.mixes, class_weight=weights,
            bce_target_thresh=recipe.bce_target_thresh, bce_sum=recipe.bce_sum)
    # timm's cross-entropy has no weights. PyTorch's mean with weights divides by those of the batch, of which each
    # process has a part.
    return nn.CrossEntropyLoss(weights, reduction='none', label_smoothing=0.0 if recipe.mixes else recipe.smoothing)


def is_classifier(model: nn.Module, name: str) -> bool:
    """Whether the parameter of that name belongs to the classifier (the classifiers, in distilled networks)."""
    classifiers = model.pretrained_cfg['classifier']
    return name.startswith(tuple(f'{c}.' for c in ([classifiers] if isinstance(classifiers, str) else classifiers)))


def freeze(model: nn.Module, part: str) -> None:
    """Take the gradients from a part of a network, in place.

    Args:
        model: A network that `timm.create_model` made.
        part: 'backbone', all but the classifier and the attention of dynamic convolutions, or 'attention'.
    """
    attentions = [module.attention for module in model.modules() if isinstance(module, DynamicConv2d)]
    attention = {id(parameter) for module in attentions for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if part == 'attention':
            frozen = id(parameter) in attention
        else:
            frozen = id(parameter) not in attention and not is_classifier(model, name)
        if frozen:
            parameter.requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """`model.train()`, but a BatchNorm without any parameter that learns keeps its statistics.

    Frozen features are to stay what they were. All others follow the new images: a fine-tune's images differ from
    those that the statistics were taken of, in scale and contrast at least.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and keeps_statistics(module):
            module.eval()


def keeps_statistics(norm: nn.Module) -> bool:
    """Whether all parameters of a BatchNorm that has some are frozen."""
    parameters = list(norm.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def parameter_groups(
        model: nn.Module,
        weight_decay: float,
        layer_decay: float = 1.0,
        head_lr_scale: float = 1.0,
        attention_lr_scale: float = 1.0,
        opt: str = 'adamw',
) -> list[dict]:
    """timm's groups for layer-wise learning-rate decay, some of them scaled besides.

    The layers are those of the network's `group_matcher`; the scale of a group is its 'lr_scale', which timm's
    schedulers multiply with the learning rate. The kernels of an inflated network have the learning rate with which
    the mixed kernel moves as the static one would, and are decayed as much as it.

    Args:
        model: A network that `timm.create_model` made; frozen parameters are left out.
        weight_decay: Not for biases, norms and what the network exempts.
        layer_decay: Learning rate of a layer over that of the next one; 1 is the same for all.
        head_lr_scale: Learning rate of the classifier over that of the layer which it is in.
        attention_lr_scale: That of the attention of dynamic convolutions.
        opt: timm's name of the optimizer that they are for.
    """
    exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    scales = {
        id(parameter): head_lr_scale for name, parameter in model.named_parameters() if is_classifier(model, name)}
    of_kernels = {}
    for module in model.modules():
        if isinstance(module, DynamicConv2d):
            scales |= {id(parameter): attention_lr_scale for parameter in module.attention.parameters()}
            for parameter, shares in zip((module.weight, module.bias), shares_of_kernels(module) or ()):
                of_kernels[id(parameter)] = kernel_scales(shares, opt)
    groups = []
    for group in param_groups_layer_decay(
            model, weight_decay=weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay):
        parts = {}
        for parameter in group['params']:
            key = scales.get(id(parameter), 1.0), *of_kernels.get(id(parameter), (1.0, 1.0))
            parts.setdefault(key, []).append(parameter)
        for (scale, kernel_scale, decay_scale), parameters in parts.items():
            groups.append(dict(
                group, params=parameters, lr_scale=group['lr_scale'] * scale * kernel_scale,
                weight_decay=group['weight_decay'] * decay_scale))
    return groups


def kernel_scales(shares: Tensor, opt: str) -> tuple[float, float]:
    """What scales learning rate and weight decay of K kernels, so that their mixture moves as a single kernel would.

    The mixture moves by the sum of what its kernels move by, each multiplied by its share. Where the step follows the
    gradient, as in SGD, that has the share too. Most optimizers take steps of one size, whatever the gradient's size.
    LAMB and LARS take steps as large as the weights, which are larger in an inflated network.

    Args:
        shares: (K,), of each kernel in the mixture, see `fmd_timm.inflate.shares_of_kernels`.
        opt: timm's name of the optimizer.
    """
    follows_gradient = any(name in opt for name in ('sgd', 'nesterov', 'momentum', 'lars', 'larc'))
    follows_weights = any(name in opt for name in ('lamb', 'lars', 'larc'))
    total = (shares.square() if follows_gradient else shares).sum().item()
    return 1.0 if follows_weights else 1 / total, total


def balanced_class_weights(labels: list[int], num_classes: int) -> Tensor:
    """(num_classes,): inverse to the number of images of the class, 1 on average over the images; 0 without images.

    timm's `compute_class_weights` has 1 on average over the classes: images of frequent ones would weigh next to
    nothing, and the learning rate would mean something else.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes).double()
    weights = len(labels) / (counts.count_nonzero() * counts)
    return torch.where(counts > 0, weights, 0.0).float()
