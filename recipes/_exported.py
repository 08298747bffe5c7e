"""Networks in files for other runtimes: writing them, and running them with nothing but the file.

A file says beside the network how images are prepared for it and what its classes are called (`Metadata`). Images go in
as float32 (B, C, H, W), normalised, and logits (B, classes) come out.
"""
import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _classes import shown_names
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fmd_timm import decompositions

PREPROCESSING = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'
MOST_BATCH = 8  # of ExecuTorch; PyTorch's convolutions tell 16 images from fewer, and a program can't hold for both
PRODUCTS = 'aten::convolution', 'aten::bmm', 'aten::linear', 'aten::mm', 'aten::addmm'
METADATA_FILE = 'metadata.json'  # within a file of torch.export
Run = Callable[[Tensor], Tensor]


class Metadata(NamedTuple):
    """What a user of a file must know."""
    data_config: dict[str, Any]  # arguments of timm's create_transform
    label_names: list[str]

    @classmethod
    def of(cls, network: nn.Module, what: str) -> 'Metadata':
        """What a user of this network must know.

        Args:
            network: A classifier of timm.
            what: Its name in errors.

        Raises:
            SystemExit: It has no classifier, or names for its classes that are none.
        """
        if not network.num_classes:
            raise SystemExit(f'{what} has no classifier')
        config = resolve_model_data_config(network)
        return cls({name: config[name] for name in PREPROCESSING}, shown_names(network, what))

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> 'Metadata':
        values = {name: json.loads(texts[name]) for name in (*PREPROCESSING, 'label_names')}
        return cls(values, values.pop('label_names'))

    def texts(self) -> dict[str, str]:
        """As formats keep it: JSON under a name."""
        return {name: json.dumps(value) for name, value in dict(
            self.data_config, label_names=self.label_names).items()}


def export_program(
        network: nn.Module, input_size: tuple[int, int, int], batch: str, largest_batch: int | None = None,
) -> ExportedProgram:
    """The network for one image at a time (`batch` '1') or any number ('dynamic').

    A batch that is known to be 1 becomes convolutions whose kernel is mixed before, any other one products of matrices
    (`fmd_timm.decompositions`). Any number is up to `largest_batch` where there is one.
    """
    is_dynamic = batch == 'dynamic'
    images = torch.zeros(2 if is_dynamic else 1, *input_size)
    shapes = {0: Dim('batch', max=largest_batch)} if is_dynamic else None
    return torch.export.export(network, (images,), dynamic_shapes=(shapes,))


def save_onnx(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    onnx = torch.onnx.export(program, (), input_names=['pixel_values'], output_names=['logits'], verbose=False)
    onnx.model.metadata_props.update(metadata.texts())
    onnx.save(path, external_data=False)


def quantize_onnx(path: Path, images: Iterable[Tensor]) -> None:
    """The file in place: onnxruntime's static quantization of all that it can compute in int8.

    Args:
        path: Of the file.
        images: Each (1, C, H, W), by which it knows how large activations are.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):
        left = iter(images)

        def get_next(self):
            image = next(self.left, None)
            return None if image is None else {'pixel_values': image.numpy()}

    # As its documentation advises for convolutions, and for processors whose sums of products of 8 bits may overflow.
    quantize_static(
        path, path, Images(), per_channel=True, reduce_range=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8)


def open_onnx(path: Path) -> tuple[Run, Metadata]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    first = session.get_inputs()[0].name
    return (
        lambda images: torch.from_numpy(session.run(None, {first: images.numpy()})[0]),
        Metadata.read(session.get_modelmeta().custom_metadata_map))


def save_openvino(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """As .xml, with the weights in a .bin of the same name beside it."""
    import openvino

    program = program.run_decompositions(decompositions())
    images = program.graph.find_nodes(op='placeholder')[-1].meta['val']
    model = openvino.convert_model(program)
    # with sizes that it does not know it refuses convolutions whose kernel is computed
    model.reshape([size if isinstance(size, int) else -1 for size in images.shape])
    for name, text in metadata.texts().items():
        model.set_rt_info(text, ['model_info', name])
    openvino.save_model(model, path, compress_to_fp16=False)


def open_openvino(path: Path) -> tuple[Run, Metadata]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(
        model, 'CPU', dict(INFERENCE_NUM_THREADS=torch.get_num_threads(), INFERENCE_PRECISION_HINT='f32'))
    texts = {name: model.get_rt_info(['model_info', name]).astype(str) for name in (*PREPROCESSING, 'label_names')}
    return lambda images: torch.from_numpy(compiled(images.numpy())[0]), Metadata.read(texts)


def save_torch_export(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata.texts())})


def open_torch_export(path: Path) -> tuple[Run, Metadata]:
    extra = {METADATA_FILE: ''}
    network = torch.export.load(path, extra_files=extra).module()
    return network, Metadata.read(json.loads(extra[METADATA_FILE]))


def save_executorch(program: ExportedProgram, metadata: Metadata, path: Path) -> dict[str, Any]:
    """For XNNPACK, with what else a file says in methods that return it.

    Returns:
        For the record: how many products and convolutions XNNPACK computes, and what ExecuTorch itself is left with.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    operator = torch.ops.fmd_timm.dynamic_conv2d.default
    make_contiguous(program)
    # The other operators are left to ExecuTorch, which knows what XNNPACK computes as a whole.
    program = program.run_decompositions({
        operator: decompositions(computed_kernels=False)[operator],
        torch.ops.aten.split_with_sizes.default: split_by_slices})
    # XNNPACK multiplies by constants, and not by what would be computed of them each time.
    lowered = to_edge_transform_and_lower(
        constant_prop_pass(program), partitioner=[XnnpackPartitioner()], constant_methods=metadata.texts())
    graph = lowered.exported_program().graph_module
    delegated = sum((count_calls(part.original_module.graph_module) for _, part in graph.named_children()), Counter())
    left = count_calls(graph)
    path.write_bytes(lowered.to_executorch().buffer)
    return dict(delegated={name: delegated[name] for name in PRODUCTS}, not_delegated=dict(left))


def split_by_slices(x: Tensor, sizes: list[int], dim: int = 0) -> list[Tensor]:
    """As slices, which XNNPACK takes. ExecuTorch 1.5 takes len() of what is split, which ties it to one batch."""
    return [x.narrow(dim, end - size, size) for size, end in zip(sizes, accumulate(sizes))]


def make_contiguous(program: ExportedProgram) -> None:
    """The weights of a program, in place: ExecuTorch computes no constants of others.

    Those of 1x1 convolutions, too, whose strides may say channels_last though `is_contiguous()` is true. What they
    compute would have such strides, of which ExecuTorch 1.5 makes another shape where there is a single pixel.
    """
    names = program.graph_signature.inputs_to_parameters
    for node in program.graph.find_nodes(op='placeholder'):
        if node.name in names:
            weight = program.state_dict[names[node.name]].clone(memory_format=torch.contiguous_format)
            program.state_dict[names[node.name]] = nn.Parameter(weight, requires_grad=False)
            node.meta['val'] = node.meta['val'].clone(memory_format=torch.contiguous_format)


def count_calls(graph: torch.fx.GraphModule) -> Counter[str]:
    """How often each operator is called."""
    operators = [node.target for node in graph.graph.nodes if node.op == 'call_function']
    return Counter(operator._name for operator in operators if hasattr(operator, '_name'))


def open_executorch(path: Path) -> tuple[Run, Metadata]:
    from executorch.extension.pybindings.portable_lib import _threadpool_get_thread_count, _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    # The process has one pool. Programs that are open keep the one that they were opened with, which a reset frees.
    if _threadpool_get_thread_count() != torch.get_num_threads():
        _unsafe_reset_threadpool(torch.get_num_threads())
    program = Runtime.get().load_program(path)
    texts = {name: program.load_method(name).execute([])[0] for name in (*PREPROCESSING, 'label_names')}
    return (
        lambda images: program.load_method('forward').execute([images.contiguous()])[0],  # which is loaded once
        Metadata.read(texts))


class Format(NamedTuple):
    packages: tuple[str, ...]  # that write and run it
    save: Callable[[ExportedProgram, Metadata, Path], dict[str, Any] | None]  # returns what a record is to say of it
    open: Callable[[Path], tuple[Run, Metadata]]
    quantize: Callable[[Path, Iterable[Tensor]], None] | None = None  # the file in place, calibrated on images
    largest_batch: int | None = None  # of a dynamic one, where memory is planned for it

    def check_installed(self) -> None:
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise SystemExit(f"this format needs {', '.join(missing)}: pip install -e '.[export]'")

    def versions(self) -> dict[str, str]:
        return {package: version(package) for package in self.packages}


FORMATS = {
    'onnx': Format(('onnx', 'onnxscript', 'onnxruntime'), save_onnx, open_onnx, quantize_onnx),
    'openvino': Format(('openvino',), save_openvino, open_openvino),
    'executorch': Format(('executorch',), save_executorch, open_executorch, largest_batch=MOST_BATCH),
    'torch-export': Format((), save_torch_export, open_torch_export),
}
