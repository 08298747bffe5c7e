"""Triton compiles every rule of the launchers for Ampere and Hopper within their registers and shared memory.

It needs no GPU. What would be launched is recorded on the meta device, so it is what a GPU would be given.
"""
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip('triton')
if triton.knobs.runtime.interpret:
    pytest.skip('the interpreter compiles nothing', allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fmd_timm.ops import triton_conv, triton_mix  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes for one program
SPILL = 16  # bytes per thread: a few registers once per program, not an inner loop that lives in memory
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
# Channels, pixels a side, stride: both ways, all tiles.
LAYERS = [(512, 7, 1), (256, 14, 1), (128, 28, 1), (128, 14, 2)]


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))


def record_launches(monkeypatch, capability, dtype, K):
    """Launches of a training step of one layer after the other, each configuration once."""
    launches = []
    kernels = (triton_conv, '_conv_kernel'), (triton_conv, '_weight_grad_kernel'), (triton_mix, '_mix_kernel')
    for module, name in kernels:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    monkeypatch.setattr(triton_conv, '_capability', lambda x: capability // 10)
    for channels, size, stride in LAYERS:
        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device='meta')

        x = empty(128, channels, size, size, dtype=dtype)
        weight = empty(K * channels, channels, 3, 3)
        attns = empty(128, K), empty(128, channels), empty(128, channels), empty(128, 9), empty(128, channels)
        conv_args = (stride, stride), (1, 1), (1, 1)
        y = triton_conv.dynamic_conv2d_triton(x, weight, *attns, *conv_args)
        triton_conv.dynamic_conv2d_triton_backward(y, x, weight, *attns, *conv_args, needs=(True,) * 7)
    configurations = {}
    for kernel, args, options in launches:
        constants = tuple(arg == 1 for arg in args if isinstance(arg, int))  # 1 is compiled as a constant
        configurations[(kernel, constants, *options.items())] = kernel, args, options
    return configurations.values()


def compile_kernel(kernel, args, options, capability):
    """As Triton does at a launch: 1 becomes a constant, multiples of 16 are known as such."""
    of_compiler = {name: value for name, value in options.items() if name not in kernel.arg_names}
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = options[parameter.name] if parameter.is_constexpr else args[i]
        if parameter.is_constexpr or value is None or isinstance(value, int) and value == 1:
            signature[parameter.name], constants[parameter.name] = 'constexpr', value
            continue
        is_pointer = isinstance(value, torch.Tensor)
        signature[parameter.name] = TYPES[value.dtype] if is_pointer else 'i32'
        if is_pointer or value % 16 == 0:
            divisible[i,] = [['tt.divisibility', 16]]
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=of_compiler)


def stack_bytes(compiled, tmp_path):
    cubin = tmp_path / 'kernel.cubin'
    cubin.write_bytes(compiled.asm['cubin'])
    try:
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '-res-usage', cubin], capture_output=True, text=True, check=True)
    except (RuntimeError, OSError) as error:  # not every build of Triton brings it
        pytest.skip(f'no cuobjdump: {error}')
    return int(re.search(r'STACK:(\d+)', usage.stdout).group(1))


@pytest.mark.parametrize('dtype, K', [(torch.bfloat16, 4), (torch.bfloat16, 8), *(
    pytest.param(dtype, K, marks=pytest.mark.slow)
    for dtype in (torch.bfloat16, torch.float16, torch.float32) for K in range(1, 9)
    if dtype != torch.bfloat16 or K not in (4, 8)
)], ids=str)
@pytest.mark.parametrize('capability', SHARED_MEMORY)
def test_every_rule_compiles_without_spilling(capability, dtype, K, monkeypatch, tmp_path):
    launches = record_launches(monkeypatch, capability, dtype, K)
    assert {kernel.__name__ for kernel, _, _ in launches} == {'_conv_kernel', '_weight_grad_kernel', '_mix_kernel'}
    for kernel, args, options in launches:
        compiled = compile_kernel(kernel, args, options, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], (kernel.__name__, options)
        assert stack_bytes(compiled, tmp_path) <= SPILL, (kernel.__name__, options)
        if capability == 90 and dtype != torch.float32 and options.get('SAMPLES', 1) > 1 and 'BACKWARD' in options:
            # Mixed kernels go from registers to the tensor cores: the first operand is a list of registers, too.
            assert re.search(r'wgmma\.mma_async\S+\s*\{[^}]*\},\s*\{', compiled.asm['ptx']), options
