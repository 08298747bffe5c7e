"""Networks in files for other runtimes: writing them, and running them with nothing but the file.

A file says beside the network how images are prepared for it and what its classes are called (`Metadata`). Images go in
as float32 (B, C, H, W), normalised, and logits (B, classes) come out.
"""
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _classes import shown_names
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fmd_timm import decompositions

PREPROCESSING = 'input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode'
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


def export_program(network: nn.Module, input_size: tuple[int, int, int], batch: str) -> ExportedProgram:
    """The network for one image at a time (`batch` '1') or any number ('dynamic').

    A batch that is known to be 1 becomes convolutions whose kernel is mixed before, any other one products of matrices
    (`fmd_timm.decompositions`).
    """
    is_dynamic = batch == 'dynamic'
    images = torch.zeros(2 if is_dynamic else 1, *input_size)
    return torch.export.export(network, (images,), dynamic_shapes=({0: Dim('batch')} if is_dynamic else None,))


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


class Format(NamedTuple):
    packages: tuple[str, ...]  # that write and run it
    save: Callable[[ExportedProgram, Metadata, Path], None]
    open: Callable[[Path], tuple[Run, Metadata]]
    quantize: Callable[[Path, Iterable[Tensor]], None] | None = None  # the file in place, calibrated on images

    def check_installed(self) -> None:
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise SystemExit(f"this format needs {', '.join(missing)}: pip install -e '.[export]'")

    def versions(self) -> dict[str, str]:
        return {package: version(package) for package in self.packages}


FORMATS = {
    'onnx': Format(('onnx', 'onnxscript', 'onnxruntime'), save_onnx, open_onnx, quantize_onnx),
    'openvino': Format(('openvino',), save_openvino, open_openvino),
    'torch-export': Format((), save_torch_export, open_torch_export),
}
