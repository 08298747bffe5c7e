"""The networks of `dynamic_resnet.py` for images of 32x32 pixels; their static twins are in `cifar_resnet.py`."""
from timm.models import generate_default_cfgs, register_model

from ..layers import METHODS, CondConv2d, DyConv2d, FMDConv2d, ODConv2d
from ._pretrained import with_published_tags
from .cifar_resnet import CifarResNet, PaddedBlock, build_resnet20, cifar_cfg
from .dynamic_resnet import DynamicBasicBlock, DynamicResNet, build_resnet

__all__ = ['CifarDynamicResNet']  # register_model adds each entrypoint


class CifarDynamicResNet(CifarResNet, DynamicResNet):
    """`DynamicResNet` with the stem and the arguments of `CifarResNet`."""


class DynamicPaddedBlock(DynamicBasicBlock, PaddedBlock):
    """`DynamicBasicBlock` with the shortcut of `PaddedBlock`."""


_cfgs = {}
for _method in METHODS.values():
    _args = dict(paper_ids=f'arXiv:{_method.arxiv}')
    for _depth in 'resnet18', 'resnet50':
        _cfgs[f'{_depth}_{_method.suffix}_cifar'] = cifar_cfg(**_args)
    _cfgs[f'resnet20_{_method.suffix}_cifar'] = cifar_cfg(pool_size=(8, 8), **_args)
default_cfgs = generate_default_cfgs(with_published_tags(_cfgs))


def _resnet20(variant: str, pretrained: bool, **kwargs) -> CifarDynamicResNet:
    return build_resnet20(CifarDynamicResNet, variant, pretrained, **dict(dict(block=DynamicPaddedBlock), **kwargs))


@register_model
def resnet18_cond_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-18 with CondConv for 32x32 images."""
    return build_resnet('resnet18_cond_cifar', pretrained, CifarDynamicResNet, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet20_cond_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-20 of He et al. with CondConv for 32x32 images."""
    return _resnet20('resnet20_cond_cifar', pretrained, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet50_cond_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-50 with CondConv for 32x32 images."""
    return build_resnet('resnet50_cond_cifar', pretrained, CifarDynamicResNet, conv_layer=CondConv2d, **kwargs)


@register_model
def resnet18_dy_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-18 with DyConv for 32x32 images."""
    return build_resnet('resnet18_dy_cifar', pretrained, CifarDynamicResNet, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet20_dy_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-20 of He et al. with DyConv for 32x32 images."""
    return _resnet20('resnet20_dy_cifar', pretrained, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet50_dy_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-50 with DyConv for 32x32 images."""
    return build_resnet('resnet50_dy_cifar', pretrained, CifarDynamicResNet, conv_layer=DyConv2d, **kwargs)


@register_model
def resnet18_od_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-18 with ODConv for 32x32 images."""
    return build_resnet('resnet18_od_cifar', pretrained, CifarDynamicResNet, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet20_od_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-20 of He et al. with ODConv for 32x32 images."""
    return _resnet20('resnet20_od_cifar', pretrained, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet50_od_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-50 with ODConv for 32x32 images."""
    return build_resnet('resnet50_od_cifar', pretrained, CifarDynamicResNet, conv_layer=ODConv2d, **kwargs)


@register_model
def resnet18_fmd_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-18 with FMDConv for 32x32 images."""
    return build_resnet('resnet18_fmd_cifar', pretrained, CifarDynamicResNet, conv_layer=FMDConv2d, **kwargs)


@register_model
def resnet20_fmd_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-20 of He et al. with FMDConv for 32x32 images."""
    return _resnet20('resnet20_fmd_cifar', pretrained, conv_layer=FMDConv2d, **kwargs)


@register_model
def resnet50_fmd_cifar(pretrained: bool = False, **kwargs) -> CifarDynamicResNet:
    """ResNet-50 with FMDConv for 32x32 images."""
    return build_resnet('resnet50_fmd_cifar', pretrained, CifarDynamicResNet, conv_layer=FMDConv2d, **kwargs)
