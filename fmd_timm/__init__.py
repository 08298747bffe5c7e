"""FMDConv (arXiv 2503.17530) and other dynamic convolutions for timm.

Importing this package registers its models with `timm.create_model`.
"""
from . import flops, models  # registers the models
from .authors import load_authors_state_dict
from .inference import prepare_for_inference
from .inflate import inflate, inflate_state_dict
from .layers import (
    CondConv2d,
    DyConv2d,
    DynamicConv2d,
    FMDConv2d,
    ODConv2d,
    accelerate_condconv,
    make_dynamic,
    set_temperature,
)
from .ops import decompositions, dynamic_conv2d

__version__ = '0.1.0'
__all__ = [
    'CondConv2d', 'DyConv2d', 'DynamicConv2d', 'FMDConv2d', 'ODConv2d', 'accelerate_condconv', 'decompositions',
    'dynamic_conv2d', 'flops', 'inflate', 'inflate_state_dict', 'load_authors_state_dict', 'make_dynamic', 'models',
    'prepare_for_inference', 'set_temperature',
]
