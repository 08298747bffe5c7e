"""Triton compiles what the rules choose for Ampere and Hopper within their registers and shared memory.

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

from fmd_timm.ops import cuda, triton_conv, triton_mix, triton_weight_grad  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes for one program
STACK = 16  # bytes per thread: some registers once per program, before or after all loops
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16'}
KERNELS = (triton_conv, '_conv_kernel'), (triton_weight_grad, '_weight_grad_kernel'), (triton_mix, '_mix_kernel')
# Input and output channels, kernel, pixels a side, stride, tap_attn: every algorithm and tile.
LAYERS = [
    (128, 128, 3, 28, 1, False), (256, 256, 3, 28, 2, False), (512, 512, 3, 7, 1, True), (120, 40, 1, 14, 1, False),
]
MORE_LAYERS = [(*layer, taps) for taps in (False, True) for layer in (  # of ResNets at 224 pixels and of MobileNets
    (64, 64, 3, 56, 1), (128, 128, 3, 56, 2), (128, 128, 3, 28, 1), (256, 256, 3, 28, 2), (256, 256, 3, 14, 1),
    (512, 512, 3, 14, 2), (512, 512, 3, 7, 1), (256, 64, 1, 56, 1), (512, 1024, 1, 28, 2), (1024, 256, 1, 14, 1),
    (512, 2048, 1, 7, 1), (40, 24, 3, 28, 1), (120, 40, 1, 14, 1),
)]


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


@pytest.fixture(autouse=True)
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))


def record_launches(monkeypatch, capability, dtype, K, layers):
    """What Triton would be given in training steps of the layers, each configuration once."""
    launches, configurations = [], {}
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    multiplier = 'fma' if dtype == torch.float32 else 'wgmma' if capability == 90 else 'mma'
    for module in triton_conv, triton_weight_grad:
        monkeypatch.setattr(module, 'multiplier', lambda x: multiplier)
    for I, O, kernel, size, stride, taps in layers:
        for B in 128, 1:
            def empty(*shape, dtype=torch.float32):
                return torch.empty(shape, dtype=dtype, device='meta')

            tensors = (
                empty(B, I, size, size, dtype=dtype), empty(K * O, I, kernel, kernel), empty(B, K), empty(B, I),
                empty(B, O), empty(B, kernel**2) if taps else None, empty(K * O))
            conv_args = (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1
            with torch.backends.cudnn.flags(allow_tf32=False):
                y = cuda.forward(*tensors, *conv_args)
                cuda.backward(y, *tensors, *conv_args)
    assert not cuda._triton_failed
    for kernel, args, options in launches:
        key = kernel, tuple(specialized(kernel, args)), *options.items()
        configurations[key] = kernel, args, options
    return configurations.values()


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


@pytest.mark.parametrize('dtype, K, layers', [
    pytest.param(torch.bfloat16, 4, LAYERS, id='bfloat16-4'),
    pytest.param(torch.bfloat16, 4, MORE_LAYERS, id='bfloat16-4-more', marks=pytest.mark.slow),
    *(
        pytest.param(dtype, K, LAYERS, id=f'{dtype}-{K}', marks=pytest.mark.slow)
        for dtype in (torch.bfloat16, torch.float16, torch.float32) for K in (8, 4, 2, 1, 3, 5, 6, 7)
        if dtype != torch.bfloat16 or K != 4
    ),
])
@pytest.mark.parametrize('capability', SHARED_MEMORY)
def test_every_rule_compiles_without_spilling(capability, dtype, K, layers, monkeypatch, tmp_path):
    launches = record_launches(monkeypatch, capability, dtype, K, layers)
    assert launches and {kernel.__name__ for kernel, _, _ in launches} == {name for _, name in KERNELS}
    cubin = tmp_path / 'kernel.cubin'
    for kernel, args, options in launches:
        compiled = compile_kernel(kernel, args, options, capability)
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], (kernel.__name__, options)
        cubin.write_bytes(compiled.asm['cubin'])
        usage = disassemble('cuobjdump', cubin, '-res-usage')
        assert int(re.search(r'STACK:(\d+)', usage)[1]) <= STACK, (kernel.__name__, options)
        assert not [*spills_in_loops(disassemble('nvdisasm', cubin, '-c'))], (kernel.__name__, options)
        if capability == 90 and dtype != torch.float32 and options.get('SAMPLES', 1) > 1 and 'BACKWARD' in options:
            # Mixed kernels go from registers to the tensor cores: the first operand is a list of registers, too.
            assert re.search(r'wgmma\.mma_async\S+\s*\{[^}]*\},\s*\{', compiled.asm['ptx']), options
