"""How fast the images of a recipe come, without any training: what `recipes/bench.py --data` measures.

On one core, images are decoded and transformed as training does it (ours), and in the plain way: by Pillow and timm's
own transforms, which give the same pixels. The two take turns; a ratio is the median of those within the rounds. Then
the recipe's loading processes read an epoch in each round, or its first batches. Images that stay on the device were
decoded before.
"""
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _images
import psutil
import torch
from _accelerator import make_accelerator, usable_cores
from _data import LabelledImages, open_images, read_bytes, refuse_bad_images
from _loaders import batches_of, make_loaders, stay_on_device
from _measure import synchronize
from _recipe import Recipe
from _record import circumstances, device_name, public, read_json, write_for_device
from _start import complete, data_config, first_network
from accelerate import Accelerator
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm import tqdm

RESULTS = Path(__file__).parent / 'results' / 'data'
SECONDS = 2  # of one core, for each way in each round
BATCHES = 50  # of the loading processes, at most in each round
HEAD = '''
| images/s | plain, one core | ours, one core | ratio | processes | first batch after | memory, first and last round |
|---|---|---|---|---|---|---|
'''.strip()


@refuse_bad_images()
def main(preset: str, recipe: Recipe, rounds: int) -> None:
    """Measure, and write the record.

    `per_core` has images per second of CPU time. `epochs` has images per second of the clock, and the MiB of memory
    that this process and those that load images share with no other.
    """
    start = time.perf_counter()
    accelerator = make_accelerator(dataclasses.replace(recipe, tracker='none'), RESULTS)
    device = device_name(torch.device('cpu'))
    network, _ = first_network(recipe)
    asked, recipe = recipe, complete(recipe, network)
    config = data_config(recipe, network)
    images = open_images(recipe)
    loaders = make_loaders(accelerator, recipe, images, config)
    loader = accelerator.prepare(loaders[0])
    open_seconds = time.perf_counter() - start
    per_core = time_one_core(images['train'], loader, plain_transform(recipe, recipe.image_size, config), rounds)
    epochs = [time_epoch(accelerator, loader, epoch) for epoch in tqdm(range(rounds), 'epochs', leave=False)]
    record = dict(
        what='data', device=device, cores=usable_cores(), to=device_name(accelerator.device), preset=preset,
        recipe=public(dataclasses.asdict(asked)), images=len(images['train']), image_size=recipe.image_size,
        num_workers=recipe.num_workers, decoder='torchcodec' if _images.decode_jpeg else 'Pillow',
        images_on_device=stay_on_device(loaders), open_seconds=open_seconds, per_core=per_core, epochs=epochs,
        **circumstances('bench.py'),
    )
    print(HEAD, row_of(record), sep='\n')
    write_for_device(RESULTS, f'.{preset}', record)


def plain_transform(recipe: Recipe, size: int, config: dict) -> Callable:
    """train_transform, see there, by timm alone and for images of Pillow."""
    kwargs = dict(
        is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip, auto_augment=recipe.aa,
        color_jitter=recipe.color_jitter, interpolation=recipe.interpolation or config['interpolation'],
        mean=config['mean'], use_prefetcher=True)
    if recipe.crop == 'rrc':
        return create_transform(size, **kwargs)
    (_, *flip), augment, _ = (part.transforms for part in create_transform(size, separate=True, **kwargs))
    crop = [transforms.Resize((size, size)), transforms.RandomCrop(size, padding=size // 8)]
    return transforms.Compose([*crop, *flip, *augment, transforms.PILToTensor()])


def time_one_core(
        images: LabelledImages, loader: DataLoader, plain: Callable, rounds: int) -> dict[str, list[float]]:
    """Images per second of CPU time by both ways in each round, after one that warms up."""
    def read_plain(places: list[int]) -> None:
        for place in places:
            image, _ = images.find(place)
            plain(_images.decode(read_bytes(image)))

    def read(places: list[int]) -> None:
        if hasattr(loader.dataset, '__getitems__'):
            for start in range(0, len(places), loader.total_batch_size):
                loader.dataset.__getitems__(places[start:start + loader.total_batch_size])
        else:
            for place in places:
                images.transform(images.read(place)[0])

    ways = dict(plain=read_plain, ours=read)
    speeds = {name: [] for name in ways}
    places = itertools.cycle(torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist())
    threads, count = torch.get_num_threads(), 50
    torch.set_num_threads(1)
    for turn in tqdm(range(1 + rounds), 'one core', leave=False):
        chosen = list(itertools.islice(places, count))
        for name in ways if turn % 2 else reversed(ways):
            start = time.process_time()
            ways[name](chosen)
            seconds = time.process_time() - start
            if turn:
                speeds[name].append(count / seconds)
        if not turn:
            count = max(int(SECONDS / seconds * count), 1)
    torch.set_num_threads(threads)
    return speeds


def time_epoch(accelerator: Accelerator, loader: DataLoader, epoch: int) -> dict[str, float]:
    start = time.perf_counter()
    batches = iter(batches_of(loader, epoch))
    count = len(next(batches)[1])
    first = time.perf_counter() - start
    count += sum(len(labels) for _, labels in itertools.islice(batches, BATCHES - 1))
    synchronize(accelerator.device)
    seconds = time.perf_counter() - start
    process = psutil.Process()
    memory = sum(p.memory_full_info().uss for p in [process, *process.children(recursive=True)])
    return dict(
        images_per_second=count / seconds, first_batch_seconds=first, images=count,
        private_memory_mib=memory / 2**20)


def row_of(record: dict[str, Any]) -> str:
    """What a record says, in the table of recipes/README.md."""
    plain, ours = record['per_core']['plain'], record['per_core']['ours']
    first, *_, last = record['epochs'][:1] + record['epochs']
    rate = statistics.median(epoch['images_per_second'] for epoch in record['epochs'])
    cells = [
        f'`{record["preset"]}`, {record["images"]:,} images, {record["image_size"]} px',
        *(f'{statistics.median(speeds):,.0f}' for speeds in (plain, ours)),
        f'**{statistics.median(a / b for a, b in zip(ours, plain)):.2f}**',
        f'{rate:,.0f} {"on the device" if record.get("images_on_device") else "by {num_workers}".format(**record)}',
        f'{first["first_batch_seconds"]:.1f} s',
        f'{first["private_memory_mib"]:,.0f}, {last["private_memory_mib"]:,.0f} MiB',
    ]
    return f'| {" | ".join(cells)} |'


def make_table() -> str:
    """The table of data in recipes/README.md, in Markdown."""
    records = [read_json(path) for path in sorted(RESULTS.glob('*.json'))]
    tables = []
    for device in dict.fromkeys(record['device'] for record in records):
        of_device = [record for record in records if record['device'] == device]
        first = of_device[0]
        rounds = len(first['epochs'])
        title = f'{device}, torch {first["versions"]["torch"]}, {first["decoder"]}, median of {rounds} rounds:'
        tables.append('\n'.join([title, '', HEAD, *map(row_of, of_device)]))
    return '\n\n'.join(tables)
