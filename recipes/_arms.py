"""The arms of recipes/laboratory.py: what a small fine-tune may do otherwise. It imports the standard library alone."""
import argparse
from dataclasses import dataclass
from pathlib import Path

from _arguments import make_parser, name, path


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune the last stage of a network, static or inflated. All else is the preset `finetune`."""
    about: str  # for the table
    lr: float = 2e-2  # near the best of the static network
    method: str | None = 'fmd'  # None: the static network
    num_kernels: int = 4
    layers: str = ''  # the convolutions that become dynamic: all of the stage, or those whose name has this in it
    noise: float = 0.1  # of `fmd_timm.inflate`
    kernels: str | None = None  # how the K kernels differ, a name in _starts.KERNELS; None: as inflate has them
    router: str | None = None  # where kernel_attn starts, a name in _starts.ROUTERS; None: the same for every image
    router_entropy: float = 0.5  # at which it starts, see _dynamics.entropy
    router_learns: bool = True
    kernel_lr: float = 1.0  # relative to the preset's
    attention_lr: float = 1.0  # relative to that of its layer; the preset has 0.1
    temperature: float = 1.0
    freeze: str | None = None  # 'backbone': attention and classifier alone learn; 'kernels': the BatchNorms, too
    normalized: bool = False  # the pooled features of each image have mean 0 and variance 1 in front of the attention
    usage_weight: float = 0.0  # in the loss, of 1 - entropy of the mean kernel_attn of a batch (load balancing)
    entropy_weight: float = 0.0  # in the loss, of 1 - mean entropy of kernel_attn


def at_rates(name: str, rates: str, about: str, **values) -> dict[str, Arm]:
    """The same arm at several learning rates, by names such as 'static_3e-3'."""
    return {f'{name}_{lr}': Arm(about, float(lr), **values) for lr in rates.split()}


ARMS = {
    **at_rates('static', '1e-3 3e-3 1e-2 2e-2 3e-2 5e-2 1e-1', 'static', method=None),

    **at_rates('fmd', '3e-3 1e-2 2e-2 3e-2 5e-2', 'FMDConv'),
    'kernels_0.25': Arm('kernels learn at a quarter of the rate', kernel_lr=0.25),
    'attention_0.1_3e-3': Arm('attention learns at a tenth of the rate', 3e-3, attention_lr=0.1),
    'attention_0.1_1e-2': Arm('attention learns at a tenth of the rate', 1e-2, attention_lr=0.1),
    'attention_0.1': Arm('attention learns at a tenth of the rate', attention_lr=0.1),
    'attention_0.01': Arm('attention learns at a hundredth of the rate', attention_lr=0.01),

    'k1': Arm('K = 1: the gates alone', num_kernels=1),
    'k2': Arm('K = 2', num_kernels=2),
    'k8': Arm('K = 8', num_kernels=8),
    'cond': Arm('CondConv', method='cond'),
    'dy': Arm('DyConv', method='dy'),
    'od': Arm('ODConv', method='od'),

    'temperature_30': Arm('temperature 30', temperature=30.0),
    'normalized': Arm('pooled features normalised', normalized=True),
    'normalized_0.1': Arm('pooled features normalised, attention at a tenth', normalized=True, attention_lr=0.1),

    'noise_0.5': Arm('kernels differ by up to half', noise=0.5),
    'gaussian': Arm('kernels differ by Gaussian noise as large as the weights', kernels='gaussian'),
    'orthogonal': Arm('kernels differ by directions at equal angles, as large as the weights', kernels='orthogonal'),
    'svd': Arm('kernels of disjoint singular values', kernels='svd'),
    'svd_normalized_0.1': Arm(
        'kernels of disjoint singular values, pooled features normalised, attention at a tenth', kernels='svd',
        normalized=True, attention_lr=0.1),

    'usage': Arm('load balancing, weight 0.1', usage_weight=0.1),
    'entropy': Arm('entropy kept up, weight 0.1', entropy_weight=0.1),
    'usage_entropy': Arm('both, weights 0.1', usage_weight=0.1, entropy_weight=0.1),

    'clusters': Arm(
        'router by clusters, equal kernels, attention at a tenth', noise=0.0, router='clusters', attention_lr=0.1),
    'clusters_fixed': Arm(
        'router by clusters and fixed, equal kernels, attention at a tenth', noise=0.0, router='clusters',
        router_learns=False, attention_lr=0.1),
    'random': Arm('random router, equal kernels, attention at a tenth', noise=0.0, router='random', attention_lr=0.1),

    'pointwise': Arm('1x1 convolutions alone', layers='conv_pw'),
    'depthwise': Arm('the depthwise convolution alone', layers='conv_dw'),
    'head': Arm('the last convolution, too', layers='conv'),

    **at_rates(
        'static_frozen', '3e-4 1e-3 2e-3 3e-3 1e-2 2e-2 5e-2', 'static, classifier alone', method=None,
        freeze='backbone'),
    **at_rates('frozen', '1e-3 2e-3 3e-3 5e-3 1e-2 2e-2', 'attention and classifier alone', freeze='backbone'),
    'frozen_k1': Arm('attention and classifier alone, K = 1', num_kernels=1, freeze='backbone'),
    'frozen_k1_3e-3': Arm('attention and classifier alone, K = 1', 3e-3, num_kernels=1, freeze='backbone'),
    'frozen_gaussian': Arm(
        'attention and classifier alone, kernels differ by Gaussian noise', kernels='gaussian', freeze='backbone'),
    'frozen_gaussian_3e-3': Arm(
        'attention and classifier alone, kernels differ by Gaussian noise', 3e-3, kernels='gaussian',
        freeze='backbone'),
    'frozen_gaussian_5e-3': Arm(
        'attention and classifier alone, kernels differ by Gaussian noise', 5e-3, kernels='gaussian',
        freeze='backbone'),
    'frozen_temperature_10': Arm(
        'attention and classifier alone, temperature 10', 3e-3, temperature=10.0, freeze='backbone'),
    'frozen_gaussian_10': Arm(
        'attention and classifier alone, kernels differ by Gaussian noise, temperature 10', 3e-3, kernels='gaussian',
        temperature=10.0, freeze='backbone'),

    **at_rates(
        'static_norms', '1e-3 3e-3 1e-2 2e-2 5e-2', 'static, BatchNorms and classifier alone', method=None,
        freeze='kernels'),
    **at_rates('norms', '1e-3 3e-3 1e-2 2e-2', 'attention, BatchNorms and classifier alone', freeze='kernels'),
}


def parse_laboratory(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument(
        '--init', type=name, default='tf_efficientnet_lite0.in1k', help='a trained EfficientNet: folder, '
        'hf-hub:owner/name or model.tag (tf_efficientnet_lite0.in1k)')
    parser.add_argument(
        '--dataset', type=name, default='uoft-cs/cifar10', help="'digits', a dataset id on the Hub, or a folder "
        '(uoft-cs/cifar10)')
    parser.add_argument(
        '--mixed', action='store_true', help='a quarter of the images each as they are, upside down, in negative, and '
        'with red and blue exchanged: more kinds of images than classes say')
    parser.add_argument(
        '--whole', action='store_true', help='train the whole network and not its last stage alone: slower by far')
    parser.add_argument('--image-size', type=int, default=96, help='pixels (96)')
    parser.add_argument('--images', type=int, default=2000, help='to train on, other ones for each seed (2000)')
    parser.add_argument('--validation-images', type=int, default=5000, help='at most, the same for all runs (5000)')
    parser.add_argument('--epochs', type=int, default=5, help='of a run (5)')
    parser.add_argument(
        '--arms', nargs='+', choices=ARMS, metavar='ARM', default=list(ARMS), help='all unless said: ' + ' '.join(ARMS))
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='runs of each, with seeds 0 to N - 1 (3)')
    parser.add_argument(
        '--output', type=path, default=Path('runs/laboratory'), help='folder of features and runs (runs/laboratory)')
    args = parser.parse_args(argv)
    for option in 'images', 'validation_images', 'epochs', 'seeds':
        if getattr(args, option) < 1:
            raise SystemExit(f'--{option.replace("_", "-")} must be at least 1, got {getattr(args, option)}')
    if all(ARMS[arm].method for arm in args.arms):
        raise SystemExit(
            f'--arms must have a static one, which the others are compared with, got {" ".join(args.arms)}')
    return args
