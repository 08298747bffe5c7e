"""Run a script that creates timm models, with the models of this package registered:

    python -m fmd_timm path/to/pytorch-image-models/validate.py --model resnet18_fmd --pretrained ...

For the scripts of timm's repository that have no `--device-modules` (its train.py has). The script runs as it would
with `python path/to/validate.py ...`, but `timm` is the one that this package found.
"""
import argparse
import runpy
import sys
from pathlib import Path

from . import models  # noqa: F401  registers them


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='python -m fmd_timm', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('script', type=Path, help='path of the script')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='all that follows is for the script')
    script = parser.parse_args().script
    if not script.is_file():
        parser.error(
            f"script must be the path of a Python file, got '{script}', where there is none. timm's scripts are not in "
            f"its package: they are in a checkout of https://github.com/huggingface/pytorch-image-models"
        )
    del sys.argv[0]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script.absolute()), run_name='__main__')


if __name__ == '__main__':
    main()
