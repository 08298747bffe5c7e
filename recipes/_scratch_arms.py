"""The arms of recipes/scratch.py. It imports the standard library alone."""
import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _arguments import make_parser, parse_recipe, path


@dataclass(frozen=True)
class Arm:
    about: str  # for the table
    method: str | None = 'fmd'  # None: the static network
    changes: dict[str, Any] = field(default_factory=dict)  # of the recipe
    as_long_as: str | None = None  # the arm whose time it takes, in more epochs
    hot: bool = False  # the temperature is 34 from the first step to the last
    open: tuple[str, ...] = ()  # 'input', 'output': the gates that are 1 for every image, from the first to the last

    def model(self, network: str) -> str:
        """'resnet20_cifar' -> 'resnet20_fmd_cifar'."""
        return network.replace('_cifar', f'_{self.method}_cifar') if self.method else network


    def same_network(self) -> str:
        """The first arm with the same network, whose time is that of all of them."""
        def network(arm: Arm) -> tuple[str | None, list[str] | None]:
            return arm.method, arm.changes.get('model_kwargs')

        return next(name for name, arm in ARMS.items() if network(arm) == network(self))


ANNEALED = dict(temperature=30.0)  # the recipe's own, which has to be said where training starts from a checkpoint
ARMS = {
    'static': Arm('the static network', None),
    'static_fmd': Arm('the static network, for as long as FMDConv takes', None, as_long_as='fmd'),
    'static_k1': Arm('the static network, for as long as FMDConv with K = 1 takes', None, as_long_as='k1'),
    'cond': Arm('CondConv', 'cond'),
    'dy': Arm('DyConv: kernels alone', 'dy'),
    'od': Arm('ODConv', 'od'),
    'fmd': Arm('FMDConv'),
    'k1': Arm('FMDConv, K = 1: gates alone', changes=dict(model_kwargs=['num_kernels=1'])),
    'no_input': Arm('FMDConv without the gates of the input', changes=ANNEALED, open=('input',)),
    'no_output': Arm('FMDConv without the gates of the output', changes=ANNEALED, open=('output',)),
    'kernels': Arm('FMDConv without gates', changes=ANNEALED, open=('input', 'output')),
    'temperature_1': Arm('FMDConv, temperature 1 from the start', changes=dict(temperature=1.0)),
    'temperature_slow': Arm(
        'FMDConv, temperature 34 that falls until the end', changes=dict(temperature=34.0, annealed_by=1.0)),
    'temperature_34': Arm("FMDConv, temperature 34 throughout, as in the authors' code", hot=True),
}


def parse_scratch(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """preset, recipe, network, arms, seeds and output."""
    parser = make_parser(
        description, usage='scratch.py [preset] [--network NAME] [--arms ARM ...] [--seeds N] [--output FOLDER] '
        '[--option of train.py ...]')
    parser.add_argument(
        '--network', default='resnet20_cifar', choices=('resnet18_cifar', 'resnet20_cifar', 'resnet50_cifar'),
        help='the static one (resnet20_cifar)')
    parser.add_argument(
        '--arms', nargs='+', choices=ARMS, metavar='ARM', default=list(ARMS), help=f'all unless said: {" ".join(ARMS)}')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='runs of each, with seeds 0 to N - 1 (3)')
    parser.add_argument('--output', type=path, default=Path('runs/scratch'), help='for the runs (runs/scratch)')
    args, shared = parser.parse_known_args(argv)
    run = parse_recipe(shared)
    if args.seeds < 1:
        parser.error(f'--seeds must be at least 1, got {args.seeds}')
    if 'static' not in args.arms:
        parser.error(f'--arms must have static, which the others are compared with, got {" ".join(args.arms)}')
    if run.recipe.init or run.recipe.seed or run.resume:
        parser.error('--init, --seed and --resume are those of each run: leave them out')
    args.preset, args.recipe = run.preset, run.recipe
    return args
