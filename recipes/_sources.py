"""Weights by their name: found, pinned to the revision that is then recorded, and loaded.

Their name is a folder that timm's `local-dir:` loads (of a training run, for instance), a Hub repository
(`hf-hub:owner/name`, also `@revision`), or a model registered in timm whose weights are on the Hub (`resnet50.a1_in1k`,
`resnet18_fmd.<tag>`). Only safetensors are read.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from _record import sha256
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import parse_model_name
from torch import nn

from fmd_timm.hub_errors import explain
from fmd_timm.models._pretrained import WEIGHTS_NAME

FORMS = 'a folder, hf-hub:owner/name or a model.tag registered in timm'


@dataclass(frozen=True)
class Source:
    """Where the weights of a network are."""
    asked: str  # as the user said it
    name: str  # what timm.create_model loads
    repo: str | None  # on the Hub
    revision: str  # 'commit <40 hex digits>' of the repository, 'sha256 <64>' of a folder's weights
    cfg_overlay: dict[str, Any]  # pins the weights to the commit, and to safetensors


def find_source(asked: str, what: str) -> Source:
    """Find weights, and fetch them from the Hub where they aren't in the cache; no network is built.

    Args:
        asked: Folder, Hub repository or registered model, see above.
        what: What to call it in errors, such as '--init'.

    Raises:
        SystemExit: There is nothing of that name, it can't be fetched, or it has no safetensors.
    """
    if Path(asked).is_dir():
        return _find_folder(asked, Path(asked), what)
    name = f'hf-hub:{asked}' if '/' in asked and ':' not in asked else asked
    try:
        scheme, rest = parse_model_name(name)
        cfg = timm.get_pretrained_cfg(rest) if scheme is None else None
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f'{what} must be {FORMS}, got {asked!r}: {error}') from error
    if scheme == 'local-dir':
        return _find_folder(asked, Path(rest), what)
    if scheme == 'hf-hub':
        repo, commit = _fetch(asked, rest, ('config.json', WEIGHTS_NAME), what)
        overlay = dict(hf_hub_filename=WEIGHTS_NAME, custom_load=False)  # whatever its configuration names
        return Source(asked, f'hf-hub:{repo}@{commit}', repo, f'commit {commit}', overlay)
    if cfg is None or not cfg.hf_hub_id:
        reason = 'is not registered in timm' if cfg is None else 'has no weights on the Hub'
        raise SystemExit(f'{what} must be {FORMS}, got {asked!r}, which {reason}')
    repo, commit = _fetch(asked, cfg.hf_hub_id, (WEIGHTS_NAME,), what)
    overlay = dict(hf_hub_id=f'{repo}@{commit}', hf_hub_filename=WEIGHTS_NAME)
    return Source(asked, asked, repo, f'commit {commit}', overlay)


def _find_folder(asked: str, folder: Path, what: str) -> Source:
    missing = [name for name in ('config.json', WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f'{what} {asked!r} has no {" and no ".join(missing)}, expected {FORMS}')
    return Source(asked, f'local-dir:{folder}', None, f'sha256 {sha256(folder / WEIGHTS_NAME)}', {})


def _fetch(asked: str, repo: str, files: tuple[str, ...], what: str) -> tuple[str, str]:
    """(repository, commit), with the files of that commit in the cache."""
    repo, _, revision = repo.partition('@')
    for name in files:
        try:
            path = _download(repo, name, revision or None)
        except Exception as error:  # the Hub's client has no common class for its own and its transport's errors
            raise SystemExit(
                f'{what} {asked!r}: {name} of the Hub repository {repo} could not be fetched, expected {FORMS}: '
                f'{explain(error)}'
            ) from error
        revision = Path(path).parents[len(Path(name).parts) - 1].name  # the cache is snapshots/<commit>/<name>
    return repo, revision


def _download(repo: str, name: str, revision: str | None) -> str:
    """`hf_hub_download`, which without a network would try for half a minute: the cache, or the error, at once."""
    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    except HfHubHTTPError:
        pass  # the Hub is there: whether to try again is known to its client
    except (HTTPError, OfflineModeIsEnabled) as error:
        try:
            return hf_hub_download(repo, name, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
    return hf_hub_download(repo, name, revision=revision)


def load_network(source: Source, what: str, **model_args) -> nn.Module:
    """The network of a source.

    Raises:
        SystemExit: timm can't load it, or it doesn't take an argument.
    """
    try:
        return timm.create_model(
            source.name, pretrained=True, pretrained_cfg_overlay=source.cfg_overlay or None, **model_args)
    except Exception as error:  # safetensors, torch and timm each have their own
        raise SystemExit(f'{what} {source.asked!r} could not be loaded: {type(error).__name__}: {error}') from error


def origin_of(source: Source, network: nn.Module) -> dict[str, Any]:
    """Where the weights of a network are from."""
    cfg = network.pretrained_cfg
    return dict(
        weights=Path(source.asked).name if source.repo is None else source.asked, architecture=cfg['architecture'],
        repo=source.repo, revision=source.revision, license=cfg.get('license'))
