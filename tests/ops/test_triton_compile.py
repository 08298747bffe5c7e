"""Triton compiles every tile for every generation of GPUs within their registers and shared memory.

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

from fmd_timm.ops import triton_conv  # noqa: E402
from fmd_timm.ops.case import Attention, case_of  # noqa: E402

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB for one program, by compute capability
STACK = 16  # bytes per thread: some registers once per program, before or after all loops
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
KERNELS = '_conv_kernel', '_mix_kernel'
LAYERS = [(128, 128, 3, 28, 1, False)]  # input and output channels, kernel, pixels a side, stride, tap_attn
MORE_LAYERS = [(*layer, taps) for taps in (False, True) for layer in (  # of ResNets at 224 pixels and of MobileNets
    (64, 64, 3, 56, 1), (128, 128, 3, 56, 2), (128, 128, 3, 28, 1), (256, 256, 3, 28, 2), (256, 256, 3, 14, 1),
    (512, 512, 3, 7, 1), (512, 1024, 1, 28, 2), (40, 24, 3, 28, 1), (72, 72, 5, 28, 1),
)]
HALVES = torch.bfloat16, torch.float16


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))


def record_launches(monkeypatch, dtype, weight_dtype, K, layers):
    """What Triton would be given in training steps of the layers, each configuration once."""
    launches, configurations = [], {}
    for name in KERNELS:
        monkeypatch.setattr(triton_conv, name, Recorder(getattr(triton_conv, name), launches))
    for I, O, kernel, size, stride, taps in layers:
        for channels, itemsize in triton_conv.TILES:
            if itemsize == dtype.itemsize:
                launch(channels, dtype, weight_dtype, K, I, O, kernel, size, stride, taps)
    for kernel, args, options in launches:
        key = kernel, tuple(specialized(kernel, args)), *options.items()
        configurations[key] = kernel, args, options
    return configurations.values()


def launch(channels, dtype, weight_dtype, K, I, O, kernel, size, stride, taps):
    for B in 128, 1:
        def empty(*shape, dtype=weight_dtype):
            return torch.empty(shape, dtype=dtype, device='meta')

        x, weight = empty(B, I, size, size, dtype=dtype), empty(K * O, I, kernel, kernel)
        attention = Attention(empty(B, K), empty(B, I), empty(B, O), empty(B, kernel**2) if taps else None)
        case = case_of(x, weight, attention, (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
        y = triton_conv.forward(x, weight, attention, case, channels)
        triton_conv.image_gradient(y, x, weight, attention, case, channels)


def specialized(kernel, args):
    """What Triton knows of each argument at compile time: 1 and None, and whether it is a multiple of 16."""
    for parameter, value in zip(kernel.params, args):
        if value is None or isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            yield value
        elif isinstance(value, torch.Tensor):
            yield value.dtype
        else:
            yield value % 16 == 0 and not parameter.do_not_specialize


def compile_kernel(kernel, args, options, capability):
    of_compiler = {name: value for name, value in options.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    signature, divisible = dict.fromkeys(constants, 'constexpr'), {}
    for i, (known, value) in enumerate(zip(specialized(kernel, args), args)):
        name = kernel.params[i].name
        if known is None or known is not True and known == 1:
            signature[name], constants[name] = 'constexpr', value
            continue
        signature[name] = TYPES[known] if isinstance(known, torch.dtype) else 'i32'
        if known:
            divisible[i,] = [['tt.divisibility', 16]]
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=of_compiler)


def disassemble(tool, cubin, *options):
    try:
        path = getattr(triton.knobs.nvidia, tool).path
        return subprocess.run([path, *options, cubin], capture_output=True, text=True, check=True).stdout
    except (RuntimeError, OSError) as error:  # not every build of Triton brings it
        pytest.skip(f'no {tool}: {error}')


def spills_in_loops(assembly):
    """Loads from and stores to a thread's stack between a label and a jump back to it."""
    lines, labels = assembly.splitlines(), {}
    for end, line in enumerate(lines):
        if label := re.match(r'\s*(\.L\w+):', line):
            labels[label[1]] = end
        elif (jump := re.search(r'BRA.*`\((\.L\w+)\)', line)) and jump[1] in labels:
            yield from (inside for inside in lines[labels[jump[1]]:end] if re.search(r'\b(LDL|STL)\b', inside))


def configurations():
    yield pytest.param(90, torch.bfloat16, torch.float32, 4, LAYERS, id='sm_90-bfloat16-4', marks=pytest.mark.slow)
    for capability in SHARED_MEMORY:
        yield pytest.param(
            capability, torch.bfloat16, torch.float32, 4, MORE_LAYERS, id=f'sm_{capability}-more',
            marks=pytest.mark.slow)
        for dtype in *HALVES, torch.float32:
            for weight_dtype in dict.fromkeys((dtype, torch.float32)):
                for K in (8, 1) if weight_dtype == dtype else (4,):
                    yield pytest.param(
                        capability, dtype, weight_dtype, K, LAYERS, id=f'sm_{capability}-{dtype}-{weight_dtype}-{K}',
                        marks=pytest.mark.slow)


@pytest.mark.parametrize('capability, dtype, weight_dtype, K, layers', list(configurations()))
def test_every_tile_compiles_without_spilling(capability, dtype, weight_dtype, K, layers, monkeypatch, tmp_path):
    launches = record_launches(monkeypatch, dtype, weight_dtype, K, layers)
    assert {kernel.__name__ for kernel, _, _ in launches} == {*KERNELS}
    cubin = tmp_path / 'kernel.cubin'
    for kernel, args, options in launches:
        compiled = compile_kernel(kernel, args, options, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024, (kernel.__name__, options)
        cubin.write_bytes(compiled.asm['cubin'])
        usage = disassemble('cuobjdump', cubin, '-res-usage')
        assert int(re.search(r'STACK:(\d+)', usage)[1]) <= STACK, (kernel.__name__, options)
        assert not [*spills_in_loops(disassemble('nvdisasm', cubin, '-c'))], (kernel.__name__, options)
