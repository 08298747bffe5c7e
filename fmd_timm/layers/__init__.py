from .attention import (
    CondConvAttention,
    DyConvAttention,
    DynamicAttention,
    FMDAttention,
    ODConvAttention,
    set_temperature,
)
from .convert import make_dynamic
from .dynamic_conv import CondConv2d, DyConv2d, DynamicConv2d, FMDConv2d, ODConv2d

__all__ = [
    'CondConv2d', 'CondConvAttention', 'DyConv2d', 'DyConvAttention', 'DynamicAttention', 'DynamicConv2d',
    'FMDAttention', 'FMDConv2d', 'ODConv2d', 'ODConvAttention', 'make_dynamic', 'set_temperature',
]
