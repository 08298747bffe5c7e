"""A dynamic network of 0.2 M parameters for tests of the recipes; as a script it is recipes/train.py that knows it."""
import sys

from timm.models import generate_default_cfgs, register_model

from fmd_timm.models import CifarDynamicResNet, dynamic_resnet

NAME = 'tiny_dynamic'  # not found by list_models('*_fmd*')
default_cfgs = generate_default_cfgs({NAME: dynamic_resnet.default_cfgs['resnet18_fmd_cifar'].default.to_dict()})


@register_model
def tiny_dynamic(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    model_args = dict(block=dynamic_resnet.DynamicBasicBlock, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))
    return dynamic_resnet.build_model(CifarDynamicResNet, NAME, pretrained, **dict(model_args, **kwargs))


if __name__ == '__main__':
    import train

    train.main(**vars(train.parse_arguments(sys.argv[1:])))
