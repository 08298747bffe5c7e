"""What each command takes, parsed with the standard library alone.

Each command parses its arguments first and imports the rest after that: torch, timm, accelerate and datasets take
seconds, and a typo is to be answered at once. `description` is the command's docstring.
"""
import argparse
import dataclasses
import types
from pathlib import Path
from typing import Any

from _presets import PRESETS
from _recipe_checks import check_effects, check_recipe

METHODS = 'cond', 'dy', 'od', 'fmd'  # fmd_timm.layers.METHODS, which takes seconds to import
EXPORT_SUFFIXES = {  # of the formats of _exported.py
    'onnx': '.onnx', 'openvino': '.xml', 'executorch': '.pte', 'torch-export': '.pt2'}
EXPORT_WEIGHTS = {
    'onnx': ('fp32', 'fp16', 'int8', 'int8-static'), 'openvino': ('fp32', 'fp16', 'int8'),
    'torch-export': ('fp32', 'fp16', 'int8'),
    'executorch': ('fp32',)}  # what is computed of constants alone is computed before the file is written
# What the Hub may hold: a file of torch.export runs in PyTorch alone, where the weights themselves do.
PUBLISHED_FILES = {
    'onnx': ('model.onnx',), 'openvino': ('model.xml', 'model.bin'), 'executorch': ('model.pte',)}


def make_parser(description: str | None, **kwargs) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)


def name(text: str) -> str:
    """The type of arguments that name something: '' is a shell variable that was not set, and not this folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a name, got ''")
    return text


def path(text: str) -> Path:
    return Path(name(text))


def csv_path(text: str) -> Path:
    if not text.endswith('.csv'):
        raise argparse.ArgumentTypeError(f'must end in .csv, got {text!r}')
    return Path(text)


def parse_recipe(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """preset, recipe, output and resume, with no value checked but for those without effect."""
    parser = make_parser(
        description, prog='train.py',
        usage='train.py [preset] [--output FOLDER] [--resume auto|FOLDER] [--option value ...]')
    parser.add_argument('preset', nargs='?', choices=PRESETS, default='digits', help='the recipe to start from')
    parser.add_argument('--output', type=path, metavar='FOLDER', help='for the results (runs/<preset>)')
    parser.add_argument(
        '--resume', type=name, metavar='auto|FOLDER', help="checkpoint to go on from; 'auto' is the output's last")
    add_options(parser, PRESETS[next((argument for argument in argv if argument in PRESETS), 'digits')])
    given = vars(parser.parse_args(argv))
    output, resume, preset = given.pop('output'), given.pop('resume'), given.pop('preset')
    recipe = dataclasses.replace(PRESETS[preset], **given)
    check_effects(recipe, given)
    return argparse.Namespace(preset=preset, recipe=recipe, output=output or Path('runs', preset), resume=resume)


def add_options(parser: argparse.ArgumentParser, preset: Any) -> None:
    """An option for each value of a recipe, or of what else has them; what isn't given isn't parsed."""
    for field in dataclasses.fields(preset):
        if field.metadata['group']:
            group = parser.add_argument_group(field.metadata['group'])
        value = getattr(preset, field.name)
        shown = ' '.join(map(str, value)) if isinstance(value, list) else value
        kwargs = dict(
            default=argparse.SUPPRESS, help=f'{field.metadata["help"]} ({shown})'.replace('%', '%%'))
        kind = field.type
        if isinstance(kind, types.UnionType):
            kind = next(k for k in kind.__args__ if k is not type(None))
        if kind is bool:
            kwargs['action'] = argparse.BooleanOptionalAction
        elif isinstance(kind, types.GenericAlias):  # a list
            kwargs |= dict(type=kind.__args__[0], metavar=kind.__args__[0].__name__, nargs='+')
        else:
            kwargs |= dict(type=kind, metavar=kind.__name__)
        group.add_argument('--' + field.name.replace('_', '-'), **kwargs)


def parse_train(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """preset, recipe, output and resume."""
    run = parse_recipe(argv, description)
    check_recipe(run.recipe)
    return run


def parse_timing(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """preset, recipe, models and output."""
    parser = make_parser(description)
    parser.add_argument('--models', nargs='+', required=True, metavar='NAME', help='models registered in timm')
    args, rest = parser.parse_known_args(argv)
    run = parse_recipe(rest)
    check_recipe(dataclasses.replace(run.recipe, model=args.models[0]))
    return argparse.Namespace(preset=run.preset, recipe=run.recipe, models=args.models, output=run.output)


def parse_compare(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """preset, recipe, models, seeds, output, and the arguments for recipes/train.py that all runs share."""
    parser = make_parser(
        description,
        usage='compare.py [preset] [--models NAME ...] [--seeds N] [--output FOLDER] [--option of train.py ...]',
    )
    parser.add_argument(
        '--models', nargs='+', metavar='NAME', help='one static network and dynamic ones (those of the preset)')
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='runs per model, with seeds 0 to N - 1 (3)')
    parser.add_argument('--output', type=path, metavar='FOLDER', help='for the results (runs/compare_<preset>)')
    args, shared = parser.parse_known_args(argv)
    run = parse_recipe(shared)
    usual = PRESETS[run.preset]
    if (run.recipe.model, run.recipe.seed, run.resume) != (usual.model, usual.seed, None):
        parser.error('--model, --seed and --resume are those of each run: see --models and --seeds')
    if run.recipe.init or usual.model is None:
        parser.error('a comparison trains from random weights: leave out --init and the preset finetune')
    if args.seeds < 1:
        parser.error(f'--seeds must be at least 1, got {args.seeds}')
    models = args.models or [usual.model.replace('_fmd', infix) for infix in ('', *(f'_{m}' for m in METHODS))]
    if len(set(models)) < len(models):
        parser.error(f'--models names a model twice: {" ".join(models)}')
    check_recipe(run.recipe)
    return argparse.Namespace(
        preset=run.preset, recipe=run.recipe, models=models, seeds=args.seeds,
        output=args.output or Path('runs', f'compare_{run.preset}'), shared=shared,
    )


def parse_report(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('folder', type=path, help='output of recipes/compare.py')
    return parser.parse_args(argv)


def parse_export(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('checkpoint', help='folder, hf-hub:owner/name, or registered model.tag')
    parser.add_argument('--format', required=True, choices=EXPORT_SUFFIXES)
    parser.add_argument(
        '--batch', choices=('1', 'dynamic'), default='1', help='images at a time: one, which is faster, or any number, '
        'of which executorch takes 8 (1)')
    parser.add_argument(
        '--weights', choices=('fp32', 'fp16', 'int8', 'int8-static'), default='fp32', help='how they are stored; int8: '
        'the kernels of dynamic convolutions, and all else in fp16; int8-static: the whole network, which computes in '
        'int8 too, by the static quantization of onnxruntime (fp32)')
    parser.add_argument('--output', type=path, metavar='FILE', help='model.<format> in the folder of the checkpoint')
    parser.add_argument(
        '--images', type=name, metavar='DATASET', help='to compare the file with PyTorch on: a folder, or a dataset id '
        'on the Hub (those that the run validated on)')
    args = parser.parse_args(argv)
    suffix = EXPORT_SUFFIXES[args.format]
    if args.output and args.output.suffix != suffix:
        raise SystemExit(f'--output must end in {suffix} for --format {args.format}, got {args.output}')
    if args.weights not in EXPORT_WEIGHTS[args.format]:
        taken = ', '.join(EXPORT_WEIGHTS[args.format])
        raise SystemExit(f'--weights must be one of {taken} for --format {args.format}, got {args.weights}')
    return args


def parse_convert(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('checkpoint', type=path, help='file of torch.save')
    parser.add_argument('--model', type=name, required=True, help='resnet18_od, mobilenetv2_100_od, resnet18_fmd, ...')
    parser.add_argument('--output', type=path, metavar='FOLDER', help='for the result (runs/<model>)')
    args = parser.parse_args(argv)
    if args.model.split('_')[-1] not in ('od', 'fmd'):
        raise SystemExit(f'--model must be a network of ODConv or FMDConv, got {args.model!r}')
    args.output = args.output or Path('runs', args.model)
    return args


def parse_publish(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('--run', type=path, required=True, help='folder that training wrote')
    parser.add_argument('--repo', required=True, metavar='OWNER/NAME', help='model repository, made if there is none')
    parser.add_argument(
        '--with', nargs='+', choices=PUBLISHED_FILES, default=[], dest='formats', metavar='FORMAT',
        help=f'publish what recipes/export.py wrote into the folder, too: {", ".join(PUBLISHED_FILES)}')
    parser.add_argument(
        '--twin', type=path, metavar='RUN', help='run of the static network by the same recipe, which the card is to '
        'compare this one with')
    parser.add_argument(
        '--space', metavar='OWNER/NAME',
        help='also publish the page of recipes/demo.py as a Space, which loads the network from --repo')
    parser.add_argument('--tag', help='record it in hub_cards/ as <architecture>.<tag>')
    parser.add_argument('--private', action='store_true', help='make the repository private')
    parser.add_argument('--replace', action='store_true', help='take the place of whatever the repository holds')
    parser.add_argument('--dry-run', action='store_true', help='check, then print what would be pushed')
    args = parser.parse_args(argv)
    args.formats = list(dict.fromkeys(args.formats))
    return args


def parse_bench(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """models, layers, edge, rounds, table, results_file, and data: None, or preset and recipe."""
    parser = make_parser(
        description, usage='bench.py [--models NAME ...] [--layers] [--edge] [--rounds N] [--results-file FILE] '
        '[--table] [--data [preset] [--option of train.py ...]]')
    parser.add_argument(
        '--models', nargs='+', metavar='NAME', help='static networks of timm (resnet18 resnet50, and '
        'mobilenetv3_small_100 with --edge)')
    parser.add_argument('--layers', action='store_true', help='time single layers')
    parser.add_argument('--edge', action='store_true', help='time exported networks in other runtimes')
    parser.add_argument('--data', action='store_true', help='time the loading of the images of a recipe')
    parser.add_argument('--rounds', type=int, default=5, metavar='N', help='measurements of each (5)')
    parser.add_argument('--table', action='store_true', help="print the tables of the documentation")
    parser.add_argument(
        '--results-file', type=csv_path, metavar='FILE', help="also write the times of the networks in the columns of "
        "timm's benchmark.py, .csv")
    args, of_recipe = parser.parse_known_args(argv)
    if args.rounds < 1:
        raise SystemExit(f'--rounds must be at least 1, got {args.rounds}')
    if of_recipe and not args.data:
        parser.error(f'unrecognized arguments: {" ".join(of_recipe)}')
    if args.layers + args.edge + args.data > 1:
        parser.error('--layers, --edge and --data are different measurements: leave out all but one')
    if args.results_file and (args.layers or args.edge or args.data or args.table):
        parser.error('--results-file is of whole networks: leave out --layers, --edge, --data and --table')
    run = parse_recipe(of_recipe) if args.data else None
    if run:
        check_recipe(run.recipe)
    args.models = args.models or ['resnet18', 'resnet50', *(['mobilenetv3_small_100'] if args.edge else [])]
    return argparse.Namespace(**dict(vars(args), data=run))


def parse_first_gpu(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('--output', type=path, default=Path('gpu_report.md'), help='the report (gpu_report.md)')
    parser.add_argument('--dry-run', action='store_true', help='on the CPU, scaled down')
    return parser.parse_args(argv)


def parse_transfer(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('--seeds', type=int, default=3, metavar='N', help='runs of each, with seeds 0 to N - 1 (3)')
    parser.add_argument('--output', type=path, default=Path('runs/transfer'), help='folder of the runs')
    args = parser.parse_args(argv)
    if args.seeds < 1:
        raise SystemExit(f'--seeds must be at least 1, got {args.seeds}')
    return args


def parse_prepare_data(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('dataset', help='a dataset id on the Hub, or a folder of parquet files or images')
    parser.add_argument('folder', type=Path, help='for the result; train.py takes it as --dataset')
    parser.add_argument('--size', type=int, default=256, help="pixels of an image's shorter side, at most (256)")
    parser.add_argument(
        '--shards', type=int, default=64, metavar='N', help='files of each split (64, which 8 processes with 8 workers '
        'can share; about 600 MB each for ImageNet)')
    parser.add_argument('--quality', type=int, default=90, help='of the JPEGs (90)')
    parser.add_argument('--dataset-config', help='configuration of a dataset that has several')
    parser.add_argument('--image-column', help='column of images; found from the features')
    args = parser.parse_args(argv)
    for name, most in ('size', 65500), ('shards', 99999), ('quality', 100):  # of JPEG, of the files' names, of JPEG
        if not 1 <= getattr(args, name) <= most:
            raise SystemExit(f'--{name} must be between 1 and {most}, got {getattr(args, name)}')
    return args
