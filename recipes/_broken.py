"""Images that can't be decoded: found before training, and left out or refused; what else about the images is odd."""
import io
import statistics

import numpy as np
from _data import LabelledImages, read_bytes
from _dataset import shortened
from _images import BadImage
from _recipe import Recipe
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

CHECKED_IMAGES = 50_000  # of a split, up to which it is decoded once before training starts
SAMPLED_IMAGES = 64  # of a split, whose sizes are looked at
FAR = 8  # times as large or as small as what the network gets


class Errors(Dataset):
    """What is wrong with each image: None, or (place among the images, sentence)."""

    def __init__(self, images: LabelledImages, places: range):
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, str] | None:
        place = self.places[index]
        try:
            self.images.read(place)
        except BadImage as error:
            return place, str(error)


def check(accelerator: Accelerator, recipe: Recipe, images: dict[str, LabelledImages]) -> dict[str, int | None]:
    """Decode all images once, each process its share of them, so that broken ones are known before training.

    Large splits are checked only where --on-bad-image says to leave broken images out: which ones are left out is then
    known to all processes before the first step, and to a run that goes on later. Otherwise, and where images are
    streamed, a broken image ends the run when it comes.

    Args:
        accelerator: Of the run.
        recipe: Complete.
        images: Of each part; those that can't be decoded are taken out.

    Returns:
        How many images of each part were left out; None where nobody looked.

    Raises:
        SystemExit: There are some, and --on-bad-image says stop; or too few are left.
    """
    unread = {}
    for part, of in images.items():
        if recipe.streaming or len(of) > CHECKED_IMAGES and recipe.on_bad_image == 'stop':
            unread[part] = None
            continue
        errors = find_errors(accelerator, of, recipe.num_workers)
        if errors and recipe.on_bad_image == 'stop':
            more = f'; so are {len(errors) - 1} more' if len(errors) > 1 else ''
            raise SystemExit(f'{errors[0][1]}{more}; --on-bad-image skip leaves such images out')
        for _, sentence in errors:
            accelerator.print(f'left out: {sentence}')
        images[part] = of.select(np.delete(np.arange(len(of)), [place for place, _ in errors])) if errors else of
        unread[part] = len(errors)
    if recipe.batch_size > len(images['train']) or not len(images['validation']):
        raise SystemExit(
            f'{len(images["train"])} images are left to train on and {len(images["validation"])} to validate, expected '
            f'at least --batch-size {recipe.batch_size} and 1')
    return unread


def find_errors(accelerator: Accelerator, images: LabelledImages, num_workers: int) -> list[tuple[int, str]]:
    """(place among the images, sentence) of each image that can't be decoded, the same on every process."""
    places = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(Errors(images, places), batch_size=64, num_workers=num_workers, collate_fn=list)
    bar = tqdm(
        total=len(places), desc=f'checking {images.name}', leave=False, mininterval=1,
        disable=not accelerator.is_main_process)
    errors = []
    with bar:
        for batch in loader:
            errors += filter(None, batch)
            bar.update(len(batch))
    return sorted(gather_object(errors))


def warn_of_images(images: dict[str, LabelledImages], recipe: Recipe) -> None:
    """Print what is odd about the images, though it can be meant.

    Args:
        images: Of each part.
        recipe: Complete.
    """
    train = images['train']
    counts = np.bincount(train.targets, minlength=len(train.label_names))
    missing = [train.label_names[i] for i in np.flatnonzero(counts == 0)]
    if missing:
        print(f'warning: {train.name} has no image of {len(missing)} of its {len(counts)} classes, which can\'t be '
              f'learned: {shortened(missing)}')
    sides = shorter_sides(train)
    for size in sorted(recipe.train_sizes()) if sides else ():
        side = statistics.median(sides)
        if side >= FAR * size or side * FAR <= size:
            print(f'warning: the images of {train.name} have {side:g} pixels on their shorter side (median of '
                  f'{len(sides)}), the network gets {size}: see --image-size')


def shorter_sides(images: LabelledImages) -> list[int]:
    """Pixels of some images; their files' headers tell."""
    sides = []
    for place in images.sample(SAMPLED_IMAGES):
        try:
            image, _ = images.find(place)
            with Image.open(io.BytesIO(read_bytes(image))) as file:
                sides.append(min(file.size))
        except Exception:  # a broken one is named when it is decoded
            continue
    return sides
