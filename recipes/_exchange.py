"""What a federated run sends of a network, in which precision, and what is wrong with what came back."""
import hashlib

import numpy as np
import torch
from _optim import keeps_statistics
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fmd_timm import DynamicConv2d

BATCH_NORM = nn.modules.batchnorm._BatchNorm  # that of the attention, and those of timm, are some too
STATISTICS = 'running_mean', 'running_var'


def norm_state(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of every BatchNorm, those of the attention too, by their names; not copied."""
    return {
        f'{prefix}.{name}': value for prefix, module in network.named_modules() if isinstance(module, BATCH_NORM)
        for name, value in module.state_dict().items()}


def statistics(network: nn.Module) -> dict[str, Tensor]:
    """What the BatchNorms that follow the images have of them; not copied."""
    return {
        f'{prefix}.{name}': getattr(module, name) for prefix, module in network.named_modules()
        if isinstance(module, BATCH_NORM) and not keeps_statistics(module) and module.track_running_stats
        for name in STATISTICS}


def shared_state(network: nn.Module, fedbn: bool) -> dict[str, Tensor]:
    """What server and clients exchange: all that training changes, but for temperatures, which follow the round.

    So with a frozen backbone it is attention and classifier. Counters of batches are no numbers to average.

    Args:
        network: Frozen as its recipe says.
        fedbn: Leave all BatchNorms out.
    """
    learned = {name: parameter.data for name, parameter in network.named_parameters() if parameter.requires_grad}
    local = norm_state(network) if fedbn else {}
    return {name: value for name, value in {**learned, **statistics(network)}.items() if name not in local}


def kernel_names(network: nn.Module) -> set[str]:
    """The kernels of all convolutions, static and dynamic; not of the attention."""
    return {
        f'{prefix}.weight' for prefix, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, DynamicConv2d)) and '.attention.' not in f'.{prefix}.'}


def digest(network: nn.Module, fedbn: bool) -> str:
    """By which server and clients know that the network is the same, and what they don't exchange of it, too."""
    exchanged = {*shared_state(network, fedbn), *(norm_state(network) if fedbn else ())}
    frozen = {name for name, _ in network.named_parameters()} - exchanged
    sha256 = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        sha256.update(f'{name} {tuple(value.shape)}'.encode())
        if name in frozen or name.endswith(STATISTICS) and name not in exchanged:
            sha256.update(value.cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def pack(values: dict[str, Tensor], in_half: set[str] = frozenset()) -> ArrayRecord:
    """For a message; the named ones as float16."""
    return ArrayRecord({name: value.half() if name in in_half else value for name, value in values.items()})


def unpack(arrays: ArrayRecord, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What came in a message, in the order, shapes and dtypes of `like`.

    Raises:
        ValueError: It is something else, or not finite.
    """
    if missing := like.keys() - arrays.keys():
        raise ValueError(f'{len(missing)} of {len(like)} tensors are missing, {min(missing)} for instance')
    if unknown := arrays.keys() - like.keys():
        raise ValueError(f'it has {len(unknown)} tensors that nobody asked for, {min(unknown)} for instance')
    values = {}
    for name, expected in like.items():
        try:
            array = arrays[name].numpy()
        except Exception as error:  # of the bytes of somebody else
            raise ValueError(f'{name} cannot be read: {error}') from error
        if array.shape != tuple(expected.shape) or not np.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f'{name} is {array.dtype} {array.shape}, expected floating-point numbers {tuple(expected.shape)}')
        values[name] = torch.from_numpy(array.copy()).to(expected.dtype)
        if not values[name].isfinite().all():
            raise ValueError(f'{name} is not finite')
    return values


@torch.no_grad()
def load(network: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into a network by their names; all else in it stays."""
    state = network.state_dict()
    for name, value in values.items():
        state[name].copy_(value)
