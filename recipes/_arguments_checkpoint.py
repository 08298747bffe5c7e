"""What the commands take that score a checkpoint, inspect it or predict with it; see _arguments.py."""
import argparse
from pathlib import Path

from _arguments import csv_path, make_parser, path
from _recipe import VALIDATION_SPLITS


def add_images(parser: argparse.ArgumentParser) -> None:
    """A checkpoint and the labelled images to score it on."""
    parser.add_argument('checkpoint', help='folder, hf-hub:org/name, or registered model.tag')
    parser.add_argument('--dataset', required=True, help="'digits', a dataset id on the Hub, or a folder")
    parser.add_argument('--dataset-config', help='configuration of a dataset that has several')
    parser.add_argument('--split', help=f'the first of {", ".join(VALIDATION_SPLITS)} by default')
    parser.add_argument(
        '--validation-share', type=float, help='the share of each class that a run held out of --split (that of the '
        'run, or train) to validate on')
    parser.add_argument('--seed', type=int, help='of that run, where the checkpoint is not its folder')
    parser.add_argument('--image-column', help='column of images; found from the features')
    parser.add_argument('--label-column', help='column of labels; found from the features and names')
    parser.add_argument(
        '--streaming', action='store_true', help='read images while evaluating, without a copy of them on the disk')
    parser.add_argument('--batch-size', type=int, default=256, help='images per step, over all processes (256)')
    parser.add_argument('--num-workers', type=int, default=4, help='data loading processes per process (4)')


def check_images(args: argparse.Namespace) -> None:
    if args.validation_share is not None and not 0 < args.validation_share < 1:
        raise SystemExit(f'--validation-share must be above 0 and below 1, got {args.validation_share}')
    if args.validation_share is not None and args.streaming:
        raise SystemExit('--validation-share must be left out with --streaming, which reads no label before its turn')
    if args.seed is not None and args.validation_share is None:
        raise SystemExit('--seed has no effect: it needs --validation-share')


def parse_evaluate(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    add_images(parser)
    parser.add_argument(
        '--results-file', type=csv_path, metavar='FILE', help="also write the columns of timm's validate.py, .csv")
    args = parser.parse_args(argv)
    check_images(args)
    return args


def parse_inspect_attention(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    add_images(parser)
    parser.add_argument('--output', type=path, metavar='FOLDER', help='for the table, the record and the picture')
    args = parser.parse_args(argv)
    check_images(args)
    return args


def parse_predict(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('checkpoint', help='folder, hf-hub:owner/name, registered model.tag, or an exported .onnx file')
    parser.add_argument('images', nargs='+', type=path, help='files, or folders of them')
    parser.add_argument('--top', type=int, default=5, metavar='K', help='classes to print for each image (5)')
    parser.add_argument(
        '--format', choices=('text', 'csv', 'json'), default='text', help='how they are printed (text, image by image)')
    parser.add_argument('--output', type=Path, metavar='FILE', help='also write them to a file, .csv or .json')
    args = parser.parse_args(argv)
    if args.top < 1:
        raise SystemExit(f'--top must be at least 1, got {args.top}')
    if args.output and args.output.suffix not in ('.csv', '.json'):
        raise SystemExit(f'--output must end in .csv or .json, got {args.output}')
    return args


def parse_demo(argv: list[str], description: str | None = None) -> argparse.Namespace:
    parser = make_parser(description)
    parser.add_argument('checkpoint', help='folder, hf-hub:owner/name, or registered model.tag')
    parser.add_argument(
        '--dataset', help="'digits', a dataset id on the Hub, or a folder, whose mean is marked beside the image's mix")
    parser.add_argument(
        '--twin', metavar='CHECKPOINT', help='the static network by the same recipe, whose classes are shown as well')
    parser.add_argument('--share', action='store_true', help='also at a public address, through a server of Gradio')
    return parser.parse_args(argv)
