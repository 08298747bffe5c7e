"""The page of recipes/demo.py as a Space on the Hugging Face Hub."""
from modulefinder import ModuleFinder
from pathlib import Path

from _hub import CARD, OF_THE_HUB
from huggingface_hub import HfApi, SpaceCardData
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import SpaceInfo

import fmd_timm

RECIPES = Path(__file__).parent
GRADIO = '6.31.0'  # with which the page was tried
PAGE = 'recipes/demo.py'  # by which a Space of ours is known
STALE_PAGE = ['recipes/*']  # what goes where it is not sent again

APP = '''\
"""The page of recipes/demo.py in fmd-timm, with {repo}."""
import sys

sys.path.insert(0, 'recipes')
import demo

demo.main(**vars(demo.parse_demo(['hf-hub:{repo}'])))
'''

README = '''\
---
{data}
---
# {title}

[{repo}](https://huggingface.co/{repo}): the classes of an image, and how it mixes the kernels of each layer. The page
is `recipes/demo.py` of [fmd-timm](https://pypi.org/project/fmd-timm/).
'''


def space_files(repo: str, space: str, licence: str) -> dict[str, str]:
    """All files of a Space, by their paths: the page itself with what it imports of the recipes, which no wheel has.

    Args:
        repo: 'owner/name' of the network, which the Space loads when it starts.
        space: 'owner/name' of the Space.
        licence: Of the weights.
    """
    title = space.rpartition('/')[2]
    data = SpaceCardData(
        title=title, emoji='🧩', colorFrom='gray', colorTo='gray', sdk='gradio', sdk_version=GRADIO,
        python_version='3.12', app_file='app.py', models=[repo], license=licence)
    finder = ModuleFinder([str(RECIPES)])
    finder.run_script(str(RECIPES / 'demo.py'))
    modules = {Path(module.__file__).name for module in finder.modules.values() if module.__file__}
    return {
        CARD: README.format(data=data.to_yaml(), title=title, repo=repo),
        'requirements.txt': f'fmd-timm[demo]=={fmd_timm.__version__}\n',
        'app.py': APP.format(repo=repo),
        **{f'recipes/{name}': (RECIPES / name).read_text(encoding='utf-8') for name in sorted(modules)}}


def find_space(api: HfApi, space: str, private: bool, replace: bool) -> SpaceInfo | None:
    """What is there; None if there is no such Space.

    Raises:
        SystemExit: It is public and is to be private; or it isn't to be replaced, and is not empty and not this page.
    """
    try:
        there = api.space_info(space)
    except RepositoryNotFoundError:
        return None
    if private and not there.private:
        raise SystemExit(f'--private: the Space {space} is there already and public')
    files = {file.rfilename for file in there.siblings} - {OF_THE_HUB, CARD}
    if files and PAGE not in files and not replace:
        raise SystemExit(
            f'the Space {space} holds {", ".join(sorted(files))}: publish to another Space, or put this page in the '
            f'place of all that it holds with --replace (its history stays)')
    return there
