from .attention import DynamicAttention
from .cond_conv import CondConv2d, CondConvAttention
from .convert import make_dynamic
from .dy_conv import DyConv2d, DyConvAttention
from .dynamic_conv import DynamicConv2d
from .fmd_conv import FMDAttention, FMDConv2d
from .od_conv import ODConv2d, ODConvAttention
from .temperature import annealed_temperature, set_temperature
from .timm_cond_conv import accelerate_condconv

METHODS: dict[str, type[DynamicConv2d]] = {
    layer.suffix: layer for layer in (CondConv2d, DyConv2d, ODConv2d, FMDConv2d)}

__all__ = [
    'METHODS', 'CondConv2d', 'CondConvAttention', 'DyConv2d', 'DyConvAttention', 'DynamicAttention', 'DynamicConv2d',
    'FMDAttention', 'FMDConv2d', 'ODConv2d', 'ODConvAttention', 'accelerate_condconv', 'annealed_temperature',
    'make_dynamic', 'set_temperature',
]
