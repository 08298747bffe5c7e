"""The processes of a run and their devices: what they agree on, and what they exchange."""
import datetime
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _recipe import Recipe
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    ProjectConfiguration,
    broadcast,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from safetensors import SafetensorError
from torch import Tensor, nn

# How long the processes may wait for one another. The first one downloads and converts the images for all, which
# takes hours for ImageNet; NCCL would end the others after 10 minutes.
PROCESS_GROUP = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=12))

# Of Python, safetensors and torch, which also has its own for states that don't fit.
FILE_ERRORS = OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError


def runs_on_cuda() -> bool:
    """Whether accelerate chooses CUDA."""
    return torch.cuda.is_available() and not parse_flag_from_env('ACCELERATE_USE_CPU')


def auto_precision() -> str:
    """'bf16' on GPUs that compute in it, else 'fp32'. Older GPUs only emulate it, many times slower than float32."""
    in_hardware = runs_on_cuda() and torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bf16' if in_hardware else 'fp32'


def make_accelerator(recipe: Recipe, output: Path) -> Accelerator:
    """The accelerator of a run.

    Raises:
        SystemExit: Its processes can't share out the recipe's batches, or can't do what an option asks for.
    """
    precision = auto_precision() if recipe.precision == 'auto' else recipe.precision
    accelerator = Accelerator(
        mixed_precision='no' if precision == 'fp32' else precision,
        gradient_accumulation_steps=recipe.accumulate,
        # batch_size is over all processes, so that a recipe means the same on any number of them
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, use_seedable_sampler=True, data_seed=recipe.seed, non_blocking=True),
        kwargs_handlers=[
            PROCESS_GROUP,
            # The buffers are sent before an evaluation, by broadcast_buffers below, and not before every step.
            DistributedDataParallelKwargs(
                broadcast_buffers=False, gradient_as_bucket_view=True,
                comm_hook=DDPCommunicationHookType(recipe.comm_hook or 'no')),
        ],
        log_with=None if recipe.tracker == 'none' else recipe.tracker,
        project_config=ProjectConfiguration(output, logging_dir=output / 'logs'),
    )
    use_all_cores(accelerator)
    parts = accelerator.num_processes * recipe.accumulate * (2 if recipe.mixes else 1)
    if recipe.batch_size % parts:
        raise SystemExit(
            f'--batch-size must be a multiple of {parts} (processes, accumulation steps, pairs of mixup and CutMix), '
            f'got {recipe.batch_size}'
        )
    for asked, of_gpus in (recipe.sync_bn and '--sync-bn', True), (
            recipe.comm_hook and f'--comm-hook {recipe.comm_hook}', recipe.comm_hook == 'bf16'):
        if asked and accelerator.num_processes == 1:
            accelerator.print(f'{asked} has no effect: there is one process')
        elif asked and of_gpus and accelerator.device.type != 'cuda':
            raise SystemExit(f'{asked} needs CUDA devices, these processes have {accelerator.device.type}')
    return accelerator


def images_per_pass(accelerator: Accelerator, recipe: Recipe) -> int:
    """Those that a process has at a time, and memory for."""
    return recipe.batch_size // (accelerator.num_processes * recipe.accumulate)


def broadcast_buffers(*modules: nn.Module) -> None:
    """Give all processes the buffers of the first one.

    In training each process takes BatchNorm's statistics of its own images, so without this they would evaluate
    different networks.
    """
    broadcast([buffer for module in modules for buffer in module.buffers()])


def on_main(accelerator: Accelerator, decide: Callable[[], Any]) -> Any:
    """What `decide` returns on the main process, on all of them; where it refuses, all end and it alone says why."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except SystemExit as refusal:
            outcome[1] = refusal.code
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SystemExit(outcome[1] if accelerator.is_main_process else 1)
    return outcome[0]


def on_all(accelerator: Accelerator, failed: str, act: Callable[[], None], main_only: bool = False) -> None:
    """Read or write files on all processes or on the main one, and end all where one of them could not.

    Raises:
        SystemExit: It failed on one; the main process says `failed` and why.
    """
    problem = None
    try:
        if accelerator.is_main_process or not main_only:
            act()
    except FILE_ERRORS as error:
        problem = str(error) or type(error).__name__
    problem = next(filter(None, gather_object([problem])), None)
    if problem:
        raise SystemExit(f'{failed}: {problem}' if accelerator.is_main_process else 1)


def tracked(act: Callable[..., None], *args, **kwargs) -> None:
    """Do something with the trackers of a run. They only describe it: it goes on where one fails."""
    try:
        act(*args, **kwargs)
    except Exception as error:  # each tracker has its own
        print(f'warning: the tracker failed: {type(error).__name__}: {error}', flush=True)


def exchange(accelerator: Accelerator, loss: Tensor, *wishes: float) -> Callable[[], list[float]]:
    """Start to average a loss () and other numbers over the processes, and to copy them to the host.

    The function that comes back waits for no more than that copy.
    """
    if accelerator.num_processes == 1:
        read = start_reading(loss)
        return lambda: [read(), *wishes]
    # Filled on the device: to copy numbers from the host would wait for the device.
    values = torch.stack([loss, *(torch.full_like(loss, wish) for wish in wishes)])
    return start_reading(accelerator.reduce(values, 'mean'))


def start_reading(values: Tensor) -> Callable[[], Any]:
    """Start to copy numbers to the host. The function that comes back waits for no more than that copy."""
    if values.device.type != 'cuda':
        return values.tolist
    copied = values.to('cpu', non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> Any:
        arrived.synchronize()
        return copied.tolist()

    return read


def usable_cores() -> int:
    """The cores that this process may use, which Linux alone tells apart from those that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def use_all_cores(state: Accelerator | PartialState) -> None:
    """Share out the cores where `accelerate launch` was not told how: it gives each process one thread."""
    if state.device.type == 'cpu' and torch.get_num_threads() == 1:
        torch.set_num_threads(max(usable_cores() // state.num_processes, 1))
