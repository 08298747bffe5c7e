"""A run's files on the Hugging Face Hub: who may write, what is there already, and pushing them in one commit."""
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _arguments import PUBLISHED_FILES
from _record import sha256, write_text
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, SpaceInfo

from fmd_timm.hub_errors import explain
from fmd_timm.models._pretrained import WEIGHTS_NAME

CONFIG, RECORD, CARD = 'config.json', 'result.json', 'README.md'
RUN_FILES = WEIGHTS_NAME, CONFIG, RECORD
EVAL_RESULTS = '.eval_results'  # folder of what the Hub fills the leaderboards of datasets from
# What recipes/export.py writes of a network, each with its record last
EXPORTED = {format: (*names, f'{names[0]}.json') for format, names in PUBLISHED_FILES.items()}
# What goes where it is not sent again: it may be of earlier weights, and the card says nothing of it.
STALE = [*sum(EXPORTED.values(), ()), f'{EVAL_RESULTS}/*']
OF_THE_HUB = '.gitattributes'  # in every repository from the first


def check_access(api: HfApi, repo: str) -> None:
    """Refuse a token that may not write to the repository, as far as tokens show it.

    Raises:
        SystemExit: Says whose token it is and what it may do.
    """
    user = api.whoami()
    # what a fine-grained token may do shows only when it is used
    if user.get('auth', {}).get('accessToken', {}).get('role') == 'read':
        raise SystemExit(f'the token of {user["name"]} may only read, publishing takes one that may write')
    owners = [user['name'], *(org['name'] for org in user.get('orgs', []) if org.get('roleInOrg') != 'read')]
    if repo.partition('/')[0] not in owners:
        raise SystemExit(f'{user["name"]} may not write to {repo}, only to repositories of {", ".join(owners)}')


def find_repository(
        api: HfApi, repo: str, private: bool, replace: bool, record: dict[str, Any]) -> ModelInfo | None:
    """What is there; None if there is no such repository.

    Raises:
        SystemExit: It is public and is to be private; or it isn't to be replaced, and is not empty and not an earlier
            run of this network on this dataset.
    """
    try:
        there = api.model_info(repo)
    except RepositoryNotFoundError:
        return None
    if private and not there.private:
        raise SystemExit(f'--private: {repo} is there already and public')
    files = {file.rfilename for file in there.siblings} - {OF_THE_HUB}
    if replace or not files:
        return there
    exported = [name for names in EXPORTED.values() if names[-1] in files for name in names]
    others = sorted(
        file for file in files - {*RUN_FILES, CARD, *exported} if not file.startswith(f'{EVAL_RESULTS}/'))
    holds = f'holds {", ".join(others)}' if others else None
    if not others:
        theirs = _record_in(api, repo, there.sha) if RECORD in files else {}
        found, own = ((r.get('model'), r.get('dataset')) for r in (theirs, record))
        if not theirs:
            holds = f'has no {RECORD} of a run'
        elif found != own:
            holds = f'holds a run of {found[0]} on {found[1]}, this one is of {own[0]} on {own[1]}'
    if holds:
        raise SystemExit(
            f'{repo} {holds}: publish to another repository, or put this run in the place of all that it holds with '
            f'--replace (its history stays)')
    return there


def _record_in(api: HfApi, repo: str, commit: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        text = Path(api.hf_hub_download(repo, RECORD, revision=commit, cache_dir=folder)).read_bytes()
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def push(
        api: HfApi, repo: str, files: dict[str, Path | str], there: ModelInfo | SpaceInfo | None, private: bool,
        delete: Sequence[str], kind: str = 'model',
) -> str:
    """Upload files in one commit, read them back, compare. Returns the commit.

    Args:
        files: By their names in the repository: a file to copy, or the text of one.
        there: What was found: a commit that somebody made since then is not built upon.
        private: Of a repository that is made.
        delete: Patterns of files that go where they are not sent.
        kind: 'model', or 'space' of Gradio.

    Raises:
        SystemExit: Says why it failed, and what the repository holds now.
    """
    with TemporaryDirectory() as folder:
        staged = Path(folder, 'staged')
        for name, content in files.items():
            if isinstance(content, str):
                write_text(staged / name, content)
            else:
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(content, staged / name)

        made = False
        try:
            if there is None:
                api.create_repo(
                    repo, private=private, repo_type=kind, **(dict(space_sdk='gradio') if kind == 'space' else {}))
                made = True
            commit = api.upload_folder(
                repo_id=repo, repo_type=kind, folder_path=staged, commit_message='Publish with fmd_timm',
                parent_commit=there and there.sha, delete_patterns=delete).oid
        except (Exception, KeyboardInterrupt) as error:  # the client and its transport have no common class
            left = _what_is_left(api, repo, there, made, kind)
            raise SystemExit(f'publishing to {repo} failed: {explain(error)}. {left}') from error

        for name in files:
            try:
                back = api.hf_hub_download(
                    repo, name, repo_type=kind, revision=commit, cache_dir=Path(folder, 'back'))
            except Exception as error:
                raise SystemExit(
                    f'{repo} has the files as commit {commit}, but {name} could not be read back to compare it: '
                    f'{explain(error)}. The same command compares again'
                ) from error
            if sha256(back) != sha256(staged / name):
                raise SystemExit(f'{name} of {repo} at {commit} is not what was uploaded, publish again')
        return commit


def _what_is_left(
        api: HfApi, repo: str, before: ModelInfo | SpaceInfo | None, made: bool, kind: str) -> str:
    """What the repository holds after an upload that failed; an empty one that was made for it is removed."""
    url = f'{api.endpoint}/{"spaces/" if kind == "space" else ""}{repo}'
    try:
        now = api.repo_info(repo, repo_type=kind)
        is_empty = {file.rfilename for file in now.siblings} <= {OF_THE_HUB}
        if before is not None and now.sha == before.sha:
            return 'The repository is as it was'
        if before is None and is_empty and made:
            api.delete_repo(repo, repo_type=kind)
            return 'The repository that was made for it is removed again'
    except RepositoryNotFoundError:
        return 'There is no such repository'
    except Exception as error:
        asked = 'An empty repository may be left' if made else 'What it holds now is unknown'
        return f'{asked} ({explain(error)}): look at {url}'
    return f'It is at commit {now.sha} now: look at {url}'
