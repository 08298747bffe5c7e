"""Networks of 0.1 to 0.3 M parameters for tests of the recipes; as a script it is recipes/train.py that knows them."""
import dataclasses
import json
import sys

import train
from _interruptions import end_with_launcher
from _presets import PRESETS
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

from fmd_timm import CondConv2d
from fmd_timm.models import CifarDynamicResNet, CifarResNet, cifar_resnet, dynamic_resnet

NAME, STATIC, COND = 'tiny_dynamic', 'tiny_static', 'tiny_conditional'  # not found by list_models('*_fmd*')
default_cfgs = generate_default_cfgs({name: cifar_resnet.cifar_cfg() for name in (NAME, STATIC, COND)})
SIZES = dict(layers=(1, 1, 1, 1), channels=(8, 16, 32, 64))


@register_model
def tiny_dynamic(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    model_args = dict(block=dynamic_resnet.DynamicBasicBlock, **SIZES)
    return dynamic_resnet.build_model(CifarDynamicResNet, NAME, pretrained, **dict(model_args, **kwargs))


@register_model
def tiny_conditional(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """CondConv, which has no temperature."""
    model_args = dict(block=dynamic_resnet.DynamicBasicBlock, conv_layer=CondConv2d, **SIZES)
    return dynamic_resnet.build_model(CifarDynamicResNet, COND, pretrained, **dict(model_args, **kwargs))


@register_model
def tiny_static(pretrained: bool = False, **kwargs) -> CifarResNet:
    model_args = dict(block=BasicBlock, **SIZES)
    return dynamic_resnet.build_model(CifarResNet, STATIC, pretrained, **dict(model_args, **kwargs))


def make_recipe(folder, **changes):
    """Two epochs of the dynamic network on the images in `folder`, by the preset of the digits."""
    base = dict(model=NAME, dataset=str(folder), epochs=2, batch_size=16, lr=0.05, warmup_epochs=0, tracker='none')
    return dataclasses.replace(PRESETS['digits'], **dict(base, **changes))


def run(recipe, output, resume=None):
    """Train, and return the run record."""
    record = train.main('digits', recipe, output, resume)
    assert json.loads((output / 'result.json').read_text()) == json.loads(json.dumps(record))
    return record


if __name__ == '__main__':
    end_with_launcher()
    train.main(**vars(train.parse_train(sys.argv[1:])))
