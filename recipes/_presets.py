"""The recipes that are known by name; an option on the command line changes one value of them.

`imagenet` is the recipe of FMDConv and ODConv. The two long ones are those of other papers, for the networks which
they were published for: nobody has trained FMDConv with them yet.
"""
from dataclasses import replace

from _recipe import Recipe

CIFAR = Recipe(
    model='resnet18_fmd_cifar', image_size=32, crop='pad', epochs=200, batch_size=128, weight_decay=5e-4,
    smoothing=0.0, annealed_by=0.05,
)
IMAGENET = Recipe(dataset='ILSVRC/imagenet-1k', num_workers=8, smoothing=0.0)
LONG = replace(IMAGENET, epochs=300, min_lr=1e-6, interpolation='bicubic', cutmix=1.0)
PRESETS = {
    'digits': Recipe(
        model='resnet20_fmd_cifar', dataset='digits', image_size=8, crop='pad', hflip=0.0, epochs=16, batch_size=64,
        lr=0.1, weight_decay=5e-4, warmup_epochs=1, clip_grad=5.0, num_workers=0,
    ),
    'cifar10': replace(CIFAR, dataset='uoft-cs/cifar10'),
    'cifar100': replace(CIFAR, dataset='uoft-cs/cifar100', label_column='fine_label'),
    # A start for images that nobody has tuned it to, no published run; needs --init. The attention's rate is that with
    # which inflated networks lost least in recipes/results/README.md.
    'finetune': Recipe(
        model=None, image_size=None, epochs=20, batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05,
        layer_decay=0.9, head_lr_scale=3.0, attention_lr_scale=0.1, warmup_epochs=1, clip_grad=5.0,
    ),
    # 100 epochs of SGD as in FMDConv (arXiv 2503.17530) and ODConv (ICLR 2022), whose code decays biases and norms too.
    'imagenet': replace(IMAGENET, sched='multistep', decay_milestones=[30, 60, 90], warmup_epochs=0),
    # ResNet-18: KernelWarehouse (arXiv 2406.07879), 4 times the kernels, 76.05 % with their method, 70.44 % static.
    'imagenet_kw': replace(
        LONG, batch_size=4096, opt='adamw', lr=4e-3, weight_decay=0.05, warmup_epochs=20, drop_path=0.1,
        aa='rand-m9-mstd0.5-inc1', reprob=0.25, mixup=0.8, smoothing=0.1, annealed_by=20 / 300,
    ),
    # ResNet-50: A2 of "ResNet strikes back" (arXiv 2110.00476), 79.8 % static.
    'imagenet_a2': replace(
        LONG, model='resnet50_fmd', batch_size=2048, opt='lamb', lr=5e-3, weight_decay=0.02, warmup_lr=1e-4,
        drop_path=0.05, aa='rand-m7-mstd0.5-inc1', crop_pct=0.95, aug_repeats=3, mixup=0.1, bce_loss=True,
        bce_target_thresh=0.2,
    ),
}
