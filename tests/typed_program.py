"""What users write, for mypy: the types that they get, the mistakes that it finds. tests/test_typing.py runs both."""
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fmd_timm
from fmd_timm import CondConv2d, DyConv2d, DynamicConv2d, FMDConv2d, ODConv2d
from fmd_timm.hub import save_for_hub
from fmd_timm.layers import METHODS, annealed_temperature
from fmd_timm.scores import ies, rcs


class Network(nn.Module):
    def __init__(self, layer: type[DynamicConv2d]):
        super().__init__()
        self.conv = layer(3, 8, kernel_size=3, stride=(2, 1), padding=1, bias=False, num_kernels=2)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.conv(images)
        return features.mean((2, 3))


def main(folder: Path) -> None:
    images = torch.randn(2, 3, 16, 16)
    for layer in CondConv2d, DyConv2d, ODConv2d, FMDConv2d:
        network = Network(layer)
        network(images)
        assert_type(network.conv.weight, nn.Parameter)
        assert_type(network.conv.bias, nn.Parameter | None)
        assert_type(layer.method, str)
    assert_type(METHODS, dict[str, type[DynamicConv2d]])

    weight, kernel_attn = torch.randn(4 * 8, 3, 3, 3), torch.full((2, 4), 0.25)
    assert_type(fmd_timm.dynamic_conv2d(images, weight, kernel_attn, stride=2, padding=(1, 1)), Tensor)

    static: nn.Module = timm.create_model('resnet10t', num_classes=5)
    model = fmd_timm.inflate(static, ODConv2d, num_kernels=2, noise=0.1)
    assert_type(model, nn.Module)
    assert_type(fmd_timm.inflate_state_dict(static.state_dict(), model), dict[str, Tensor])
    names = fmd_timm.make_dynamic(
        static, filter_fn=lambda name, conv: 'layer4' in name and conv.kernel_size == (3, 3), num_kernels=2)
    assert_type(names, list[str])
    fmd_timm.set_temperature(static, kernel=annealed_temperature(0.05))

    config: dict[str, Any] = dict(label_names=['a', 'b', 'c', 'd', 'e'])
    save_for_hub(static, folder, config, data_config=dict(input_size=(3, 16, 16)))
    prepared = fmd_timm.prepare_for_inference(static, example_input=images, kernel_dtype=torch.int8)
    assert_type(prepared, nn.Module)
    program = torch.export.export(model.eval(), (images,))
    program.run_decompositions(fmd_timm.decompositions())

    assert_type(ies(12.5, 0.9), float | None)
    assert_type(rcs(12.5, 0.9), float | None)
    assert_type(fmd_timm.__version__, str)


def mistakes(model: nn.Module, images: Tensor) -> None:
    """Never called. A comment that is not needed is an error for mypy, too."""
    FMDConv2d(3, 8, kernel_size='3')  # type: ignore[arg-type]
    fmd_timm.dynamic_conv2d(images, images)  # type: ignore[call-arg]
    fmd_timm.make_dynamic(model, nn.Conv2d)  # type: ignore[arg-type]
    fmd_timm.set_temperature(model, kernel='high')  # type: ignore[arg-type]
    fmd_timm.prepare_for_inference(model, True, images, 'int8')  # type: ignore[arg-type]
    save_for_hub(model, None)  # type: ignore[arg-type]
    fmd_timm.load_authors_state_dict(model)  # type: ignore[call-arg]
