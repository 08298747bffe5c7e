from .cifar_resnet import *
from .dynamic_cifar_resnet import *
from .dynamic_cnn import *
from .dynamic_mobilenetv2 import *
from .dynamic_mobilenetv3 import *
from .dynamic_resnet import *
