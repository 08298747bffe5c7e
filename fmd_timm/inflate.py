"""A dynamic network grown out of a static one, which computes the same until it is trained.

The attention starts constant (`DynamicAttention.make_constant`). Each of the K kernels is the static kernel plus a
perturbation, divided by what the constant attention multiplies it with. The perturbations sum to zero over the K
kernels. The attention's last linear maps start at zero. Their gradient is not zero, so the layers before them get one
from the second training step on.

Fine-tune at temperature 1, which an inflated network has. A high temperature makes a random attention uniform, so that
all kernels learn. This attention is uniform already, and a temperature T would divide the gradients of its last layers
by T. A trained dynamic checkpoint has learned at the temperature that is saved with it: keep that one.

Give the kernels a learning rate of their own. In FMDConv with K = 4, both gates are 1/2 and kernel_attn is 1/4: each
kernel gets 1/16 of the static kernel's gradient, and the gates multiply its change by 1/4. With the learning rate of
the static network, SGD would move the mixed kernel 1/64 as far. AdamW, whose step does not depend on the size of the
gradient, would move it 1/4 as far. `shares_of_kernels` says by how much; recipes/train.py does it.
"""
import copy
import logging

import torch
import torch.nn as nn
from torch import Tensor

from .layers import DynamicConv2d, FMDConv2d, make_dynamic

__all__ = ['checkpoint_filter_fn', 'inflate', 'inflate_state_dict', 'shares_of_kernels']

_logger = logging.getLogger(__name__)


def inflate(
        static_model: nn.Module,
        conv_layer: type[DynamicConv2d] = FMDConv2d,
        num_kernels: int = 4,
        noise: float = 0.1,
        seed: int = 0,
        **dynamic_args,
) -> nn.Module:
    """A dynamic copy of a static network that computes the same: in eval mode, at any temperature, up to rounding.

    Args:
        static_model: A CNN, for instance a trained one of timm. It stays as it is.
        conv_layer: `CondConv2d`, `DyConv2d`, `ODConv2d` or `FMDConv2d`.
        num_kernels: K.
        noise: Largest perturbation of a kernel's weight, relative to the weight. 0 gives K equal kernels, which a
            softmax attention can't tell apart: they would stay equal.
        seed: Of the perturbations and of the attention's first layers.
        **dynamic_args: Arguments of `make_dynamic`, such as `filter_fn`, and of `conv_layer.like`.

    Returns:
        The copy, on the same device, in the same dtype and mode.

    Raises:
        ValueError: `noise` is not in [0, 1), or `make_dynamic` refuses the network.
    """
    _check_noise(noise)
    model = copy.deepcopy(static_model)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        make_dynamic(model, conv_layer, num_kernels=num_kernels, **dynamic_args)
    model.load_state_dict(inflate_state_dict(static_model.state_dict(), model, noise, seed))
    return model


def inflate_state_dict(
        state_dict: dict[str, Tensor],
        model: nn.Module,
        noise: float = 0.1,
        seed: int = 0,
) -> dict[str, Tensor]:
    """The state_dict of a static network as one for its dynamic twin, see `inflate`.

    Args:
        state_dict: Of the static network. What belongs to no dynamic convolution is passed on as it is.
        model: The dynamic network the result is for; it stays as it is. The attention's first layers are taken from it.
        noise: See `inflate`.
        seed: Of the perturbations.

    Raises:
        ValueError: `noise` is not in [0, 1), or a kernel is missing or has another shape than `model` needs.
    """
    _check_noise(noise)
    generator = torch.Generator().manual_seed(seed)
    inflated = dict(state_dict)
    for name, conv in _dynamic_convs(model).items():
        attention = copy.deepcopy(conv.attention)
        attention.make_constant()
        inflated.update({f'{name}.attention.{key}': tensor for key, tensor in attention.state_dict().items()})

        key = f'{name}.weight'
        static = state_dict.get(key)
        expected = (conv.out_channels, *conv.weight.shape[1:])
        if static is None or static.shape != expected:
            found = 'is missing' if static is None else f'is {tuple(static.shape)}'
            raise ValueError(f'{key} {found} in the static state_dict, expected {expected}')
        # a constant attention multiplies a static kernel that stands K times in the bank, and such a bias, by this
        weight_factor, bias_factor = (shares.sum().item() for shares in _constant_shares(conv))
        inflated[key] = _grow(static / weight_factor, conv.num_kernels, noise, generator)
        if conv.bias is not None:
            bias = state_dict.get(f'{name}.bias', static.new_zeros(conv.out_channels))
            inflated[f'{name}.bias'] = _grow(bias / bias_factor, conv.num_kernels, noise, generator)
    return inflated


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For timm's loader: the checkpoint of a static network is inflated, that of a dynamic one is passed on."""
    if not is_static(state_dict, model):
        return state_dict
    cfg = model.pretrained_cfg
    source = 'a state_dict' if cfg.get('state_dict') else cfg.get('file') or cfg.get('hf_hub_id')
    # a warning, as transformers gives for weights that are newly initialised
    _logger.warning(
        f'{cfg["architecture"]}: inflated from {source}, a static network. The attention is untrained and constant: '
        f'the network computes what the static one does until it is fine-tuned.'
    )
    return inflate_state_dict(state_dict, model)


def shares_of_kernels(conv: DynamicConv2d) -> tuple[Tensor, Tensor] | None:
    """(K,) and (K,): what the attention of an inflated layer multiplies each kernel and each bias with, in float64.

    Their sum is how far the mixed kernel moves where all K kernels move by 1, the sum of their squares how far it moves
    where each moves by its gradient. None where the attention has been trained: it depends on the image.
    """
    layers = [getattr(conv.attention, name) for name in conv.attention.last_layers]
    is_constant = not any(parameter.any() for layer in layers for parameter in layer.parameters())
    return _constant_shares(conv) if is_constant else None


def is_static(state_dict: dict[str, Tensor], model: nn.Module, prefix: str = '') -> bool:
    """Whether the weights have none of the attention of a dynamic network, whose keys in them begin with `prefix`."""
    convs = [f'{prefix}{name}.' for name in _dynamic_convs(model)]
    has_kernels = any(f'{conv}weight' in state_dict for conv in convs)
    return has_kernels and not any(key.startswith(f'{conv}attention.') for conv in convs for key in state_dict)


def _check_noise(noise: float) -> None:
    if not 0 <= noise < 1:
        raise ValueError(f'noise must be at least 0 and below 1, got {noise}')


def _dynamic_convs(model: nn.Module) -> dict[str, DynamicConv2d]:
    modules = model.named_modules(remove_duplicate=False)  # as the state_dict has them
    return {name: module for name, module in modules if isinstance(module, DynamicConv2d)}


@torch.no_grad()
def _constant_shares(conv: DynamicConv2d) -> tuple[Tensor, Tensor]:
    """`shares_of_kernels` once the attention is constant."""
    attention = copy.deepcopy(conv.attention).double().eval()
    attention.make_constant()
    any_image = torch.zeros(1, conv.in_channels, 1, 1, dtype=torch.float64, device=conv.weight.device)
    kernel_attn, in_attn, out_attn, tap_attn = (
        None if attn is None else attn[0].cpu() for attn in attention(any_image))
    bias = torch.ones(conv.num_kernels, dtype=torch.float64) if kernel_attn is None else kernel_attn
    if out_attn is not None:
        bias = bias * out_attn[0]
    weight = bias
    for attn in in_attn, tap_attn:
        if attn is not None:
            weight = weight * attn[0]
    return weight, bias


def _grow(static: Tensor, num_kernels: int, noise: float, generator: torch.Generator) -> Tensor:
    """K kernels, one after the other, whose mean is exactly the static one.

    In pairs W + P, W - P. The larger, L, is rounded first; 2 W - L is then exact in floating point (Sterbenz), because
    W <= L <= 2 W. Which of a pair has the larger weight is drawn for each weight, so that neither is larger as a whole.
    """
    kernels = []
    for _ in range(num_kernels // 2):
        amount, swap = torch.rand(2, *static.shape, generator=generator).to(static.device)
        larger = static * (1 + noise * amount).to(static.dtype)
        smaller = 2 * static - larger
        kernels += [torch.where(swap < 0.5, larger, smaller), torch.where(swap < 0.5, smaller, larger)]
    if num_kernels % 2:
        kernels.append(static)
    return torch.cat(kernels)
