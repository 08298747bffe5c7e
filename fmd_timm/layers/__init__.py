from .attention import FMDAttention, set_temperature
from .dynamic_conv import FMDConv2d

__all__ = ['FMDAttention', 'FMDConv2d', 'set_temperature']
