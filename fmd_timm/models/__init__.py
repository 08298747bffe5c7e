from .dynamic_resnet import *
