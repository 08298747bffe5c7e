"""What the recipes report: accuracy over exactly the validation images, inference time, size and memory."""
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _accelerator import exchange
from _interruptions import Interruptions
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm


@torch.inference_mode()
def score(
        accelerator: Accelerator,
        model: nn.Module,
        loader: DataLoader,
        normalize: nn.Module,
        num_images: int,
        interruptions: Interruptions | None = None,
) -> dict[str, float] | None:
    """Top-1 and top-5 in percent and the mean cross-entropy, each image counted once on any number of processes.

    Args:
        loader: Prepared by the accelerator, which fills up the last batch with images that are not counted.
        num_images: How many images there must be.
        interruptions: Of the training that this is part of, if it is.

    Returns:
        None if it was stopped.

    Raises:
        RuntimeError: Another number of images came back.
    """
    model.eval()
    hits, losses, pending = [], [], None
    bar = tqdm(loader, 'evaluating', leave=False, mininterval=1, disable=not accelerator.is_main_process)
    for images, labels in bar:
        with accelerator.autocast():
            logits = model(normalize(images))
        logits = logits.float()
        # A stable order: a network that gives all classes the same logit must not be right every time.
        best = logits.topk(min(5, logits.shape[1])).indices
        hits.append(accelerator.gather_for_metrics(best == labels[:, None]))
        losses.append(accelerator.gather_for_metrics(F.cross_entropy(logits, labels, reduction='none')))
        if interruptions:
            if pending:
                interruptions.hear(*pending()[1:])
            if interruptions.signal:
                return None
            pending = exchange(accelerator, losses[-1].mean(), *interruptions.wishes())
    hits, losses = torch.cat(hits), torch.cat(losses)
    if len(hits) != num_images or len(losses) != num_images:
        raise RuntimeError(f'expected results of {num_images} validation images, got {len(hits)}')
    return dict(
        top1=100 * hits[:, 0].double().mean().item(),
        top5=100 * hits.any(1).double().mean().item(),
        loss=losses.double().mean().item(),
    )


@torch.inference_mode()
def time_inference(
        accelerator: Accelerator,
        model: nn.Module,
        input_size: tuple[int, int, int],
        batch: int,
        channels_last: bool = False,
        repeats: int = 10,
) -> dict[str, float]:
    """Latency of one image in milliseconds and throughput of a batch in images/s: medians, after 3 warm-up runs."""
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def seconds_of(size: int) -> float:
        images = torch.randn(size, *input_size, device=accelerator.device).contiguous(memory_format=memory_format)

        def infer() -> None:
            with accelerator.autocast():
                model(images)

        return median_seconds(infer, accelerator.device, repeats)

    return dict(
        infer_ms_per_image=1000 * seconds_of(1), infer_images_per_second=batch / seconds_of(batch), infer_batch=batch)


def median_seconds(act: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Of so many times that the device does it, after 3 that warm up."""
    seconds = []
    for _ in range(3 + repeats):
        synchronize(device)
        start = time.perf_counter()
        act()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def count_gmacs(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Multiply-accumulates of one image in billions: convolutions, matrix products, attention and mixing of kernels."""
    return _count(model, input_size) / 2 / 1e9


def count_macts(model: nn.Module, input_size: tuple[int, int, int]) -> float:
    """Activations of one image in millions, as timm counts them: what the same convolutions and products put out."""
    return _count(model, input_size, dict.fromkeys(flop_registry, _numbers_out)) / 1e6


def _count(model: nn.Module, input_size: tuple[int, int, int], formulas: dict | None = None) -> int:
    model = copy.deepcopy(model).eval()  # the copy is not compiled
    # In memory: on the meta device PyTorch computes the size of every BatchNorm in Python, which takes longer.
    images = torch.zeros(1, *input_size, device=next(model.parameters()).device)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(images)
    return counter.get_total_flops()


def _numbers_out(*args, out_shape: torch.Size | tuple, **kwargs) -> int:
    first = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]  # of attention, beside what backward needs
    return math.prod(first)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Peak of this process: allocated on the GPU, or resident on the CPU (with Python and its libraries)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == 'win32':
        import psutil  # accelerate needs it too

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # which Windows doesn't have

    unit = 1 if sys.platform == 'darwin' else 2**10  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
