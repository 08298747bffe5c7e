"""What a federated run is asked to be, beside its recipe. Like `_recipe.py` it imports no torch.

Options are named as Flower's own apps name them.
"""
import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from _arguments import add_options, make_parser, parse_recipe, path
from _presets import PRESETS
from _recipe import Recipe, option
from _recipe_checks import LARGEST, check_recipe

STRATEGIES = dict(  # of Flower, and the options that one alone has
    fedavg=(), fedavgm=('server_momentum', 'server_learning_rate'), fedprox=('proximal_mu',))
# What a recipe must leave as it is, and why.
NOT_FEDERATED = dict(
    streaming='each client needs the labels of its images',
    on_bad_image='a client that has a broken image says so and is dropped',
    aug_repeats='a client may have fewer images than that sampler takes',
    ema_decay='the average over the clients is what counts',
    kd_model_name='clients have no teacher',
    tracker='the record has every round',
)


@dataclass(frozen=True)
class Federation:
    num_supernodes: int = option(4, 'clients, which share the training images out', group='federation')
    alpha: float = option(
        0.5, 'of the Dirichlet distribution of each class over the clients: at 0.1 a client has few classes, at 100 '
        'all of them')
    num_server_rounds: int = option(15, 'rounds of sending, training and averaging')
    local_epochs: int = option(3, 'passes of a client over its images in a round')
    fraction_train: float = option(1.0, 'share of the connected clients that a round trains on')
    strategy: str = option('fedavg', f"Flower's strategy: {', '.join(STRATEGIES)}")
    server_momentum: float = option(0.0, 'of fedavgm')
    server_learning_rate: float = option(1.0, 'of fedavgm')
    proximal_mu: float = option(0.0, 'of fedprox: weight of the distance to what the server sent')
    fedbn: bool = option(False, 'keep every BatchNorm on its client, those of the attention too')
    fp16_kernels: bool = option(False, 'send the kernels of convolutions in half precision')
    round_timeout: float = option(3600.0, 'seconds that a round waits for a client')


def parse_federated(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """preset, recipe, federation, models, seeds, parallel and output.

    The recipe has the epochs of all rounds, so that its schedules span them.
    """
    parser = make_parser(
        description, prog='federated.py',
        usage='federated.py [preset] [--models NAME ...] [--seeds N] [--output FOLDER] [--option value ...] '
        '[--option of train.py ...]')
    parser.add_argument(
        '--models', nargs='+', metavar='NAME', help="networks to train one after the other (the preset's static and "
        'its FMDConv)')
    parser.add_argument('--seeds', type=int, default=1, metavar='N', help='runs of each, with seeds 0 to N - 1 (1)')
    parser.add_argument('--output', type=path, metavar='FOLDER', help='for the results (runs/federated_<preset>)')
    parser.add_argument(
        '--parallel', type=int, metavar='N', help='clients that train at the same time in the simulation (one for '
        'each GPU, or for each core)')
    add_options(parser, Federation())
    args, shared = parser.parse_known_args(argv)
    given = vars(args)
    models, seeds, parallel, output = (given.pop(name) for name in ('models', 'seeds', 'parallel', 'output'))
    federation, run = Federation(**given), parse_recipe(shared)
    usual = PRESETS[run.preset]
    if (run.recipe.model, run.recipe.seed, run.recipe.epochs, run.resume) != (
            usual.model, usual.seed, usual.epochs, None):
        parser.error(
            '--model, --seed, --epochs and --resume are those of each run: see --models, --seeds, '
            '--num-server-rounds and --local-epochs; the same command goes on')
    for name, least in ('seeds', seeds), ('parallel', 1 if parallel is None else parallel):
        if least < 1:
            raise SystemExit(f'--{name} must be at least 1, got {least}')
    if models is None and usual.model is None:
        parser.error(f'--models must be given with the preset {run.preset}')
    recipe = dataclasses.replace(run.recipe, epochs=federation.num_server_rounds * federation.local_epochs)
    models = list(dict.fromkeys(models or [usual.model.replace('_fmd', ''), usual.model]))
    check_federation(federation, recipe)
    check_recipe(dataclasses.replace(recipe, model=models[0]))
    return argparse.Namespace(
        preset=run.preset, recipe=recipe, federation=federation, models=models, seeds=seeds, parallel=parallel,
        output=output or Path('runs', f'federated_{run.preset}'))


def check_federation(federation: Federation, recipe: Recipe) -> None:
    """Refuse values that can't work, or that have no effect.

    Raises:
        SystemExit: Names the option, what it must be and what it is.
    """
    values = vars(federation)
    for name, least, most in (
            ('num_supernodes', 1, 10**5), ('num_server_rounds', 1, 10**6), ('local_epochs', 1, 10**6),
            ('alpha', 0.01, 1e6), ('fraction_train', 0.001, 1), ('server_momentum', 0, 1),
            ('server_learning_rate', 1e-6, 1e6), ('proximal_mu', 0, 1e6), ('round_timeout', 1, LARGEST)):
        if not least <= values[name] <= most:
            raise SystemExit(f'--{name.replace("_", "-")} must be between {least} and {most:g}, got {values[name]}')
    if federation.strategy not in STRATEGIES:
        raise SystemExit(f'--strategy must be one of {", ".join(STRATEGIES)}, got {federation.strategy!r}')
    usual = Federation()
    for strategy, names in STRATEGIES.items():
        changed = [name for name in names if values[name] != getattr(usual, name)]
        if changed and strategy != federation.strategy:
            raise SystemExit(f'--{changed[0].replace("_", "-")} has no effect: it needs --strategy {strategy}')
        if names and not changed and strategy == federation.strategy:
            options = ' or '.join(f'--{name.replace("_", "-")}' for name in names)
            raise SystemExit(f'--strategy {strategy} does what fedavg does: it needs {options}')
    usual = Recipe()
    for name, reason in NOT_FEDERATED.items():
        if getattr(recipe, name) != getattr(usual, name):
            raise SystemExit(f'--{name.replace("_", "-")} must be left out: {reason}')
