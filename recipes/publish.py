"""Publish a run on the Hugging Face Hub:

    python recipes/publish.py --run runs/digits --repo acme/resnet20_fmd_cifar.digits --tag digits

The folder holds `model.safetensors`, `config.json` and `result.json`, as training leaves them. All is checked before
anything is uploaded: that the record is of these weights and does not contradict itself, too. Then one commit brings
these files and the card made from `result.json`, and what the Hub holds at that commit is compared with what was sent.

A repository that holds something else than an earlier run of this network on this dataset is left alone, unless
--replace says to put this run in the place of all its files. Its history stays.

With `--with onnx` the file that recipes/export.py wrote into the folder comes along with its record, and the card has
a section on it. Exported files of an earlier publication go where they are not published again.

With --twin the card compares the run with that of the static network by the same recipe and seed. The accuracy on a
dataset of the Hub goes to `.eval_results`, too.

With --tag the run is also recorded in hub_cards/, so that `timm.create_model('<architecture>.<tag>', pretrained=True)`
loads this very commit. Publishing a tag again replaces its record.
"""
import sys

from _arguments import parse_publish

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_publish(sys.argv[1:], __doc__)

import re
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from _hub import CARD, CONFIG, EVAL_RESULTS, EXPORTED, RECORD, RUN_FILES, STALE, check_access, find_repository, push
from _record import read_json, sha256, write_json, write_text
from _record_checks import check_record
from _space import STALE_PAGE, find_space, space_files
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models import filter_pretrained_cfg

import fmd_timm
from fmd_timm.card_details import TWIN
from fmd_timm.hub_errors import explain
from fmd_timm.model_card import check_complete, make_card, make_eval_results
from fmd_timm.models._pretrained import WEIGHTS_NAME

HUB_CARDS = Path(__file__).parents[1] / 'hub_cards'  # of this checkout, wherever fmd_timm is installed


def check_names(repo: str, space: str | None, tag: str | None) -> None:
    for option, name in ('--repo', repo), ('--space', space):
        if name is None:
            continue
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise SystemExit(f'{option} {name!r} is not valid: {error}') from error
        if '/' not in name:
            raise SystemExit(f'{option} must be OWNER/NAME, got {name!r}')
    if tag is not None and not re.fullmatch('[A-Za-z0-9_-]+', tag):
        raise SystemExit(f"--tag must consist of letters, digits, '_' and '-', got {tag!r}")


def read_object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f'{path} is not readable: {error}') from error
    if not isinstance(content, dict):
        raise SystemExit(f'{path} must hold a JSON object, got {type(content).__name__}')
    return content


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run, if it is complete and can be true."""
    record = read_object(run / RECORD)
    try:
        check_complete(record)
        check_record(record)
    except ValueError as error:
        raise SystemExit(f'{run / RECORD}: {error}') from error
    return record


def read_twin(twin: Path, run: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the static network: of the record of its run, which must be by the same recipe."""
    from _report import check_comparable  # and matplotlib, which takes a second

    theirs = read_record(twin)
    if record['method'] is None or theirs['method'] is not None:
        raise SystemExit(
            f'--twin must be the run of a static network, to compare a dynamic one with, got {theirs["model"]} in '
            f'{twin} beside {record["model"]}')
    if theirs['seed'] != record['seed']:
        raise SystemExit(f'--twin must be a run with the seed {record["seed"]}, got {theirs["seed"]} in {twin}')
    check_comparable({run / RECORD: record, twin / RECORD: theirs})
    return {name: theirs[name] for name in TWIN}


def check_weights(run: Path, record: dict[str, Any]) -> None:
    """Refuse weights that the record is not of: those of another run, or changed since."""
    expected, found = record['weights_sha256'], sha256(run / WEIGHTS_NAME)
    if found != expected:
        raise SystemExit(
            f'{run / RECORD} is of other weights: theirs have sha256 {expected}, {WEIGHTS_NAME} has {found}')


def read_exported(run: Path, format: str) -> dict[str, Any]:
    """The record of the exported files in the folder, if it is of these files, and these of the weights beside them."""
    *files, name = EXPORTED[format]
    command = f'python recipes/export.py {run} --format {format}'
    missing = [file for file in (*files, name) if not (run / file).is_file()]
    if missing:
        raise SystemExit(f'--with {format}: {run} has no {", ".join(missing)}, which this writes: {command}')
    record = read_object(run / name)
    try:
        exported_from, expected = record['checkpoint']['revision'], {file: record['files'][file] for file in files}
        found = {file: dict(bytes=(run / file).stat().st_size, sha256=sha256(run / file)) for file in files}
    except (KeyError, TypeError) as error:
        raise SystemExit(f'{run / name} is no record of recipes/export.py ({type(error).__name__}: {error})') from error
    weights = f'sha256 {sha256(run / WEIGHTS_NAME)}'
    if exported_from != weights:
        raise SystemExit(
            f'{run / name} is of other weights: it was exported from those with {exported_from}, {WEIGHTS_NAME} has '
            f'{weights}. Export again: {command}')
    for file in files:
        if found[file] != expected[file]:
            raise SystemExit(
                f'{run / name} is of another {file}: it has {expected[file]}, the file {found[file]}. Export again: '
                f'{command}')
    return record


def load_network(run: Path, config: dict[str, Any], record: dict[str, Any]) -> nn.Module:
    """The network as everybody will load it, if the three files of the run are of one network."""
    architecture = config.get('architecture', '')
    if not (timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith('fmd_timm.')):
        raise SystemExit(f'{run / CONFIG}: {architecture!r} is no architecture of fmd_timm')
    if 'num_classes' in config.get('model_args', {}):
        raise SystemExit(f'{run / CONFIG}: transformers refuses num_classes in model_args; save with fmd_timm.hub')
    try:
        network = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    except Exception as error:  # safetensors, torch and timm each have their own
        raise SystemExit(f'timm cannot load {run}: {type(error).__name__}: {error}') from error
    broken = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise SystemExit(f'{run / WEIGHTS_NAME} has numbers that are NaN or infinite, in {", ".join(broken[:3])}')
    parameters = sum(p.numel() for p in network.parameters())
    for name, value in ('model', architecture), ('num_classes', network.num_classes), ('parameters', parameters):
        if record[name] != value:
            raise SystemExit(f'{run / RECORD} is of another network: {name} is {record[name]!r}, expected {value!r}')
    if record.get('label_names') != network.pretrained_cfg.get('label_names'):
        raise SystemExit(f'{run}: {RECORD} and {CONFIG} have different label_names')
    return network


def check_tag(tag: str, record: dict[str, Any], config: dict[str, Any], network: nn.Module) -> None:
    """Arguments are not stored with a tag: the architecture's defaults have to give the same network."""
    architecture = record['model']
    arguments = {**config.get('model_args', {}), **record['model_args']}
    for name in 'num_classes', 'in_chans', 'global_pool':  # timm stores them always
        arguments.pop(name, None)
    if arguments:
        raise SystemExit(f'--tag {tag}: a tag is {architecture} with its default arguments, this run has {arguments}')
    tagged = timm.create_model(architecture, pretrained=True, pretrained_cfg=network.pretrained_cfg).eval()
    images = torch.randn(2, *network.pretrained_cfg['input_size'])
    with torch.no_grad():
        if not torch.allclose(tagged(images), network(images), rtol=1e-3, atol=1e-4):
            raise SystemExit(
                f'--tag {tag}: a tag is {architecture} with its default arguments, which give other logits than '
                f'the model_args {config.get("model_args")} of this run'
            )


def write_record(name: str, record: dict[str, Any], card: ModelCard) -> None:
    write_text(HUB_CARDS / f'{name}.md', str(card))
    write_json(HUB_CARDS / f'{name}.json', record)  # last: it makes the tag
    print(f'wrote {HUB_CARDS / name}.md and .json')


def main(
        run: Path, repo: str, formats: list[str], twin: Path | None, space: str | None, tag: str | None,
        private: bool, replace: bool, dry_run: bool,
) -> None:
    check_names(repo, space, tag)
    missing = [name for name in RUN_FILES if not (run / name).is_file()]
    if missing:
        raise SystemExit(f'--run {run} has no {", ".join(missing)}')
    config, record = read_object(run / CONFIG), read_record(run)
    names = [*RUN_FILES, *(name for format in formats for name in EXPORTED[format])]
    if formats:
        record['exported'] = [read_exported(run, format) for format in formats]
    if twin:
        record['twin'] = read_twin(twin, run, record)
    try:
        texts = {CARD: str(card := make_card(record, repo))}
    except ValueError as error:
        raise SystemExit(f'{run}: {error}') from error
    results = make_eval_results(record, repo)
    if results:
        texts[f'{EVAL_RESULTS}/{record["dataset"].rpartition("/")[2]}.yaml'] = results
    page = space_files(repo, space, card.data.license) if space else {}
    check_weights(run, record)
    network = load_network(run, config, record)
    if tag:
        check_tag(tag, record, config, network)

    if dry_run:
        print(card)
        print(f'would push to {repo}: {", ".join([*names, *texts])}; {CARD} is the card above')
        if space:
            print(f'would push to the Space {space}: {", ".join(page)}')
        if tag:
            print(f'would write {HUB_CARDS / record["model"]}.{tag}.json and .md')
        return

    api = HfApi(library_name='fmd_timm', library_version=fmd_timm.__version__)
    try:
        check_access(api, repo)
        there = find_repository(api, repo, private, replace, record)
        card.validate()
        if space:
            check_access(api, space)
            there_is = find_space(api, space, private, replace)
    except Exception as error:  # the Hub's client has no common class for its own and its transport's errors
        raise SystemExit(f'nothing was sent to {repo}: {explain(error)}') from error
    commit = push(api, repo, {name: run / name for name in names} | texts, there, private, '*' if replace else STALE)
    print(f'published {api.endpoint}/{repo}/tree/{commit}')
    if tag:
        hub = dict(repo=repo, commit=commit, sha256=record['weights_sha256'])
        pretrained_cfg = filter_pretrained_cfg(network.pretrained_cfg, remove_source=True)
        write_record(f'{record["model"]}.{tag}', {**record, 'hub': hub, 'pretrained_cfg': pretrained_cfg}, card)
    if space:
        push(api, space, page, there_is, private, '*' if replace else STALE_PAGE, 'space')
        print(f'published {api.endpoint}/spaces/{space}')


if __name__ == '__main__':
    main(**vars(arguments))
