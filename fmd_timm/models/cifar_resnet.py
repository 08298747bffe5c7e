"""timm's ResNet for images of 32x32 pixels, the static twins of the dynamic `_cifar` models.

The stem is that of He et al. (arXiv 1512.03385, section 4.2): a 3x3 convolution with stride 1 and no max-pool.
"""
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ._pretrained import build_model, with_published_tags

__all__ = ['CifarResNet']  # register_model adds each entrypoint


class CifarResNet(ResNet):
    """timm's ResNet for 32x32 images: the stem keeps the resolution, and every stride is a quarter of ImageNet's.

    Args:
        *args: Arguments of timm's ResNet.
        output_stride: Stride of the last stage: 8, or less for dilated stages (4, 2).
        **kwargs: Arguments of timm's ResNet.
    """

    def __init__(self, *args, output_stride: int = 8, **kwargs):
        if output_stride not in (8, 4, 2):
            raise ValueError(f'output_stride must be 8, 4 or 2, got {output_stride}')
        for name in 'stem_type', 'replace_stem_pool':
            if kwargs.get(name):
                raise ValueError(f'{name} must be left out: the stem is one 3x3 convolution, got {kwargs[name]!r}')
        super().__init__(*args, output_stride=output_stride * 4, **kwargs)
        stem = self.conv1
        self.conv1 = nn.Conv2d(
            stem.in_channels, stem.out_channels, kernel_size=3, padding=1, bias=False,
            device=stem.weight.device, dtype=stem.weight.dtype,
        )
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info['reduction'] = max(info['reduction'] // 4, 1)


CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the 50,000 training images
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar_cfg(**kwargs) -> dict:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (4, 4),
        'crop_pct': 1.0, 'interpolation': 'bilinear', 'mean': CIFAR10_MEAN, 'std': CIFAR10_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:1512.03385',
        **kwargs
    }


default_cfgs = generate_default_cfgs(with_published_tags({
    'resnet18_cifar': cifar_cfg(),
    'resnet50_cifar': cifar_cfg(),
}))


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-18 for 32x32 images."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return build_model(CifarResNet, 'resnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-50 for 32x32 images."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build_model(CifarResNet, 'resnet50_cifar', pretrained, **dict(model_args, **kwargs))
