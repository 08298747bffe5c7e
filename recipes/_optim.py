"""What fine-tuning changes about training: which parameters learn and how fast, and how much each class weighs."""
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from fmd_timm import DynamicConv2d


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
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


def parameter_groups(
        model: nn.Module, weight_decay: float, layer_decay: float, head_lr_scale: float) -> list[dict]:
    """timm's groups for layer-wise learning-rate decay, those of the classifier scaled besides.

    The layers are those of the network's `group_matcher`; the scale of a group is its 'lr_scale', which timm's
    schedulers multiply with the learning rate.

    Args:
        model: A network that `timm.create_model` made; frozen parameters are left out.
        weight_decay: Not for biases, norms and what the network exempts.
        layer_decay: Learning rate of a layer over that of the next one; 1 is the same for all.
        head_lr_scale: Learning rate of the classifier over that of the layer which it is in.
    """
    exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    head = {id(parameter) for name, parameter in model.named_parameters() if is_classifier(model, name)}
    groups = []
    for group in param_groups_layer_decay(
            model, weight_decay=weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay):
        for in_head, scale in (False, 1.0), (True, head_lr_scale):
            parameters = [parameter for parameter in group['params'] if (id(parameter) in head) == in_head]
            if parameters:
                groups.append(dict(group, params=parameters, lr_scale=group['lr_scale'] * scale))
    return groups


def balanced_class_weights(labels: list[int], num_classes: int) -> Tensor:
    """(num_classes,): inverse to the number of images of the class, 1 on average over the images; 0 without images."""
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes).double()
    weights = len(labels) / (counts.count_nonzero() * counts)
    return torch.where(counts > 0, weights, 0.0).float()
