"""The convolution in Triton where it was found right on this GPU, PyTorch elsewhere.

Nobody can try every GPU, driver and version of Triton beforehand. So before a layer is first convolved in Triton, two
images of random numbers are, forward and backward, and compared with the reference.
"""
import logging
import subprocess
import warnings
from dataclasses import dataclass
from functools import cache, partialmethod
from types import ModuleType

import torch
from torch import Tensor

from . import per_image, reference
from .case import Attention, Case, Gradients

_logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative, of a whole tensor
# What Triton raises as RuntimeError when a pass or a compiler fails. A GPU's errors are RuntimeErrors, too.
MESSAGES = 'PassManager::run failed', 'Failed to find C compiler', 'Cannot find ptxas'

_right: dict[tuple[int, Case], bool] = {}


@dataclass(frozen=True)
class TritonConv:
    """An algorithm like the modules: `triton_conv.py` with one of its tiles."""
    channels: int  # of the result that a program computes
    fallback: ModuleType  # the algorithm for what Triton can't do here

    @property
    def __name__(self) -> str:
        return f'triton_{self.channels}'

    def supports(self, case: Case) -> bool:
        largest = max(case.num_kernels * case.kernel_numel, case.image_numel, case.out_channels * case.out_pixels)
        return (
            case.dtype in TOLERANCES and case.weight_dtype in TOLERANCES and case.groups == 1 and case.num_kernels <= 8
            and case.in_channels % 8 == case.out_channels % 8 == 0  # else the compiler spills registers
            and largest < 2**30  # offsets have 32 bits
        )

    def _run(self, direction: str, *arguments) -> Tensor | Gradients:
        if not self.is_right(arguments[-1]):
            return getattr(self.fallback, direction)(*arguments)
        from . import triton_conv  # here, so that all else works without Triton
        return getattr(triton_conv, direction)(*arguments, self.channels)

    forward, backward = partialmethod(_run, 'forward'), partialmethod(_run, 'backward')

    def is_right(self, case: Case) -> bool:
        """Whether Triton gives the right numbers here; it is tried once, and a warning says if it doesn't.

        While a CUDA graph is captured nothing can be tried.
        """
        key = self.channels, case._replace(batch=2, channels_last=True, weight_channels_last=True)
        if key not in _right:
            if case.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
                return False
            reason = _reason_against(*key)
            _right[key] = reason is None
            if reason is not None:
                warnings.warn(
                    f'dynamic_conv2d: {self.__name__} is not used, PyTorch is: {reason}, for {key[1]}', stacklevel=2)
        return _right[key]


@cache
def _announce() -> None:
    # A warning, so that it shows: a first step that takes a minute looks like one that hangs.
    _logger.warning('dynamic_conv2d: compiling Triton kernels, a few seconds for each kind of layer')


def _reason_against(channels: int, case: Case) -> str | None:
    """Why a case of two images is not to run in Triton; None if it may."""
    _announce()
    grad_y, *inputs = _random_inputs(channels, case)
    try:
        from triton.errors import TritonError

        from . import triton_conv
    except ImportError as error:
        return f'Triton is missing ({error})'
    try:
        y = triton_conv.forward(*inputs, case, channels)
        grad_x, grad_in_attn = triton_conv.image_gradient(grad_y, *inputs, case, channels)
    except (TritonError, subprocess.CalledProcessError, FileNotFoundError) as error:
        return f'Triton fails ({type(error).__name__}: {error})'
    except RuntimeError as error:
        if not any(message in str(error) for message in MESSAGES):
            raise
        return f'Triton fails ({error})'
    return _difference(dict(result=y, x=grad_x, in_attn=grad_in_attn), grad_y, *inputs, case)


def _random_inputs(channels: int, case: Case) -> tuple[Tensor, Tensor, Tensor, Attention]:
    """grad_y, x, weight and attention of the case."""
    # Of its own, so that nobody's random numbers change; another for each tile, whose results must not come from
    # memory that the last one filled.
    generator = torch.Generator(case.device).manual_seed(channels)

    def normal(*shape: int, dtype: torch.dtype = case.weight_dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    B, O, I, K, (kh, kw) = case.batch, case.out_channels, case.in_channels, case.num_kernels, case.kernel_size
    attention = Attention(
        normal(B, K).softmax(1),
        normal(B, I).sigmoid() if case.has_in_attn else None,
        normal(B, O).sigmoid() if case.has_out_attn else None,
        normal(B, kh * kw).sigmoid() if case.has_tap_attn else None,
    )
    images = normal(B, O, *case.output_size, dtype=case.dtype), normal(B, I, *case.image_size, dtype=case.dtype)
    grad_y, x, weight = (
        t.contiguous(memory_format=torch.channels_last) for t in (*images, normal(K * O, I, kh, kw)))
    return grad_y, x, weight, attention


def _difference(
        found: dict[str, Tensor | None], grad_y: Tensor, x: Tensor, weight: Tensor, attention: Attention, case: Case,
) -> str | None:
    """What is wrong with the result and the gradients of x and in_attn; None if nothing is."""
    # In float64, which no GPU shortens to TF32.
    exact = x.double(), weight.double(), Attention(*(t if t is None else t.double() for t in attention))
    grad_x, _, gradients = per_image.backward(grad_y.double(), *exact, case)
    expected = dict(result=reference.forward(*exact, case), x=grad_x, in_attn=gradients.in_attn)
    for name, value in expected.items():
        if value is None:
            continue
        error, size = (found[name].double() - value).norm(), value.norm()
        if not error <= TOLERANCES[case.dtype] * size:  # NaN, too
            what = name if name == 'result' else f'gradient of {name}'
            return f'in Triton the {what} is off by {(error / size).item():.1e}'
    return None
