"""A recipe: every value of a training run. `_presets.py` has those that are known, `_recipe_checks.py` what can work.

It imports the standard library alone, so that bad values are refused before torch is imported, which takes seconds.
Options that timm's train.py has too are named as there.
"""
import ast
import dataclasses
from dataclasses import dataclass
from typing import Any

INFLATED = 'inflated:'  # prefix of --init
VALIDATION_SPLITS = ('validation', 'valid', 'val', 'test')  # in this order: ImageNet's test split has no labels
FREEZABLE = ('backbone', 'attention')
CHOICES = dict(
    on_bad_image=('stop', 'skip'),
    crop=('rrc', 'pad'), interpolation=(None, 'bilinear', 'bicubic', 'random'), freeze=(None, *FREEZABLE),
    sched=('cosine', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'tanh', 'constant'), comm_hook=(None, 'bf16', 'fp16'),
    precision=('auto', 'bf16', 'fp16', 'fp32'))
# Options that change how a run is executed and not what it computes: a run may be resumed with other ones.
EXECUTION = ('num_workers', 'tracker', 'checkpoint_every')


def option(default, help: str, group: str | None = None):
    """`group` is the heading of the help under which this option and those after it stand."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group))


@dataclass(frozen=True)
class Recipe:
    model: str | None = option(
        'resnet18_fmd', 'model registered in timm; may be left out with --init', group='network')
    init: str | None = option(
        None, 'weights to start from: a folder, hf-hub:owner/name or model.tag; inflated:<one of these> makes a static '
        'network dynamic, by FMDConv or as --model')
    model_kwargs: list[str] | None = option(
        None, 'arguments of the model as NAME=VALUE, such as num_kernels=2; of dynamic_cnn, static=resnet34 dynamic=od')
    drop: float = option(0.0, 'dropout in front of the classifier')
    drop_path: float = option(0.0, 'rate at which residual branches are dropped, in the last block (stochastic depth)')
    freeze: str | None = option(
        None, "what does not learn: 'backbone' (all but attention and classifier) or 'attention'")

    dataset: str = option(
        'digits', "'digits', a dataset id on the Hub, or a folder of parquet files or images", group='images')
    dataset_config: str | None = option(None, 'configuration of a dataset that has several')
    image_column: str | None = option(None, 'column of images; found from the features')
    label_column: str | None = option(None, 'column of labels; found from the features and names')
    streaming: bool = option(
        False, "read the images of the Hub's parquet files while training, without a copy of them on the disk")
    train_split: str = option('train', "split to train on, or a part of it such as 'train[:90%]'")
    validation_split: str | None = option(
        None, f'split to validate on, or a part of it; the first of {", ".join(VALIDATION_SPLITS)}')
    validation_share: float | None = option(
        None, 'share of each class in --train-split to hold out and validate on, chosen by the seed')
    on_bad_image: str = option(
        'stop', "what an image that can't be decoded does: 'stop' ends the run, 'skip' leaves it out, for which all "
        'are decoded once before training')

    image_size: int | None = option(
        224, "pixels of the square images; None is the network's own size", group='size and augmentation')
    image_sizes: list[str] | None = option(
        None, 'sizes to train with and the first epoch of each, as SIZE:EPOCH: 128:0 192:30 trains with 128 pixels and '
        'from epoch 30 on with 192; --image-size before the first')
    test_size: int | None = option(None, 'pixels of the square images to validate and publish with; --image-size')
    crop_pct: float | None = option(None, "share of an image's side that is validated; the network's own")
    interpolation: str | None = option(
        None, "of the resizing: bilinear, bicubic, or 'random' (one of them for each image in training, bicubic in "
        "validation); the network's own")
    crop: str = option('rrc', "training crop: 'rrc' (random resized crop) or 'pad' (pad by an eighth, crop back)")
    scale: list[float] | None = option(None, "smallest and largest area of the random resized crop; timm's 0.08 1.0")
    ratio: list[float] | None = option(None, "its smallest and largest width over height; timm's 0.75 1.33")
    hflip: float = option(0.5, 'probability of a horizontal flip')
    color_jitter: float | None = option(None, 'how much brightness, contrast and saturation vary, such as 0.4')
    aa: str | None = option(
        None, "timm's policy of automatic augmentation: RandAugment, such as rand-m9-mstd0.5-inc1, or 3a")
    aug_repeats: int = option(1, 'how often an image comes in an epoch, which sees as many images as without')
    reprob: float = option(0.0, 'probability of erasing a random part of an image')
    mixup: float = option(0.0, 'alpha of mixup; 0 is off')
    cutmix: float = option(0.0, 'alpha of CutMix; 0 is off; with both, each batch gets one of them')

    smoothing: float = option(0.1, 'label smoothing', group='loss')
    bce_loss: bool = option(False, 'binary cross-entropy of each class in place of the cross-entropy')
    bce_sum: bool = option(False, 'its sum over the classes in place of the mean')
    bce_target_thresh: float | None = option(None, 'targets above it are 1 and others 0; left as they are')
    class_weights: bool = option(False, 'weigh each class in the loss by the inverse of its number of training images')
    kd_model_name: str | None = option(
        None, 'teacher whose outputs are learned too: weights as for --init, of the same classes')
    kd_temperature: float = option(4.0, "softmax temperature of both networks' outputs")
    task_loss_weight: float = option(1.0, 'weight of the loss of the labels')
    distill_loss_weight: float = option(1.0, "weight of the loss of the teacher's outputs")

    epochs: int = option(100, 'passes over the training images', group='optimization')
    batch_size: int = option(256, 'images per optimizer step, over all processes')
    accumulate: int = option(1, 'backward passes per optimizer step')
    opt: str = option('sgd', "timm's name of the optimizer (sgd is with Nesterov momentum)")
    opt_eps: float | None = option(None, "epsilon of the optimizer; its own")
    opt_betas: list[float] | None = option(None, 'betas of the optimizer; its own')
    momentum: float = option(0.9, 'of the optimizer')
    weight_decay: float = option(1e-4, 'not for biases and norms')
    clip_grad: float | None = option(None, 'largest norm of the gradients')
    layer_decay: float = option(1.0, 'learning rate of each layer over that of the next one; 1 is the same for all')
    head_lr_scale: float = option(1.0, "learning rate of the classifier over that of its layer")
    attention_lr_scale: float = option(1.0, 'learning rate of the attention over that of its layer')
    ema_decay: float = option(0.0, 'decay of the averaged weights that are evaluated and saved; 0 is off')

    lr: float = option(0.1, 'peak learning rate', group='schedule')
    sched: str = option(
        'cosine', f"timm's name of the schedule: {', '.join(CHOICES['sched'])}; poly is linear with --decay-rate 1")
    warmup_epochs: int = option(5, 'epochs of linear warm-up, the first of the schedule')
    warmup_lr: float = option(0.0, 'learning rate that the warm-up starts from')
    min_lr: float = option(0.0, 'learning rate that the schedule ends at')
    cooldown_epochs: int = option(0, 'epochs at --min-lr, the last ones')
    decay_epochs: float | None = option(
        None, "epochs from one step to the next, or of the decay that ends wsd and rsqrt (below 1: the share); timm's")
    decay_milestones: list[int] | None = option(None, 'epochs at which multistep lowers the learning rate')
    decay_rate: float = option(0.1, 'what a step multiplies the learning rate with; the power of poly')
    temperature: float | None = option(
        None, 'softmax temperature of the kernel attention at the start; it ends at 1. None is 30, or with --init that '
        'of the checkpoint, which then stays')
    annealed_by: float = option(0.1, 'share of training after which it is 1')

    precision: str = option(
        'auto', "'bf16', 'fp16', 'fp32', or 'auto': bf16 on GPUs that have it, else fp32", group='machine')
    channels_last: bool = option(True, 'memory format of images and weights, in which convolutions are faster')
    compile: bool = option(False, 'torch.compile the model')
    sync_bn: bool = option(False, 'BatchNorm over the images of all GPUs')
    comm_hook: str | None = option(None, "send gradients between GPUs in 'bf16' or 'fp16', half of the bytes")
    num_workers: int = option(4, 'data loading processes per training process, at most one per core')
    checkpoint_every: str = option('10min', "time between checkpoints, or epochs as in '5epochs'; the end has one too")
    tracker: str = option('tensorboard', "tracker known to accelerate, or 'none'")
    seed: int = option(0, 'of weights, shuffling and augmentation')

    @property
    def mixes(self) -> bool:
        """Whether images and their labels are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def train_size(self, epoch: int) -> int | None:
        """Pixels of the square training images in an epoch, the first of which is 0."""
        started = [size for size, first in self.sizes_by_epoch() if first <= epoch]
        return started[-1] if started else self.image_size

    def train_sizes(self) -> set[int]:
        """All of them."""
        return {self.train_size(epoch) for epoch in range(self.epochs)}

    def sizes_by_epoch(self) -> list[tuple[int, int]]:
        """`image_sizes` as (pixels, first epoch)."""
        return [tuple(map(int, item.split(':'))) for item in self.image_sizes or ()]

    def model_arguments(self) -> dict[str, Any]:
        """`model_kwargs` as timm reads them: values are Python's literals, or text."""
        arguments = {}
        for item in self.model_kwargs or ():
            name, _, value = item.partition('=')
            try:
                arguments[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                arguments[name] = value
        return arguments


def refuse(recipe: Recipe, name: str, expected: str) -> None:
    value = getattr(recipe, name)
    got = ' '.join(map(str, value)) if isinstance(value, list) else repr(value)
    raise SystemExit(f'--{name.replace("_", "-")} must be {expected}, got {got}')
