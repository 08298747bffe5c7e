"""Is an inflated network a good start?  python recipes/transfer.py [--seeds 3] [--output runs/transfer]

On scikit-learn's digits, for every seed: a static resnet18_cifar learns the digits 0 to 4, as the preset `digits` says
but for epochs and learning rate.
Then networks learn the digits 5 to 9, all from the same batches in the same number of steps:

    scratch   resnet18_fmd_cifar from random weights, likewise
    static    the static network, fine-tuned as the preset `finetune` says
    inflated  resnet18_fmd_cifar grown out of the static network, fine-tuned likewise

Writes recipes/results/finetune/digits.json. The same command goes on where it was stopped.
"""
import sys

from _arguments import parse_transfer

if __name__ == '__main__':  # before the imports below, which take seconds
    arguments = parse_transfer(sys.argv[1:], __doc__)

import dataclasses
import statistics
from pathlib import Path

import datasets
from _dataset import load_digits
from _presets import PRESETS
from _record import circumstances, write_json
from _runs import run

RESULT = Path(__file__).parent / 'results' / 'finetune' / 'digits.json'
EPOCHS = 4  # of 11 steps
FIRST_EPOCHS, LR = 8, 0.05  # of the static network on the first half, and of what starts from random weights
STATIC, DYNAMIC = 'resnet18_cifar', 'resnet18_fmd_cifar'


def write_half(digits: range, folder: Path) -> None:
    """Some digits as a dataset of their own, with labels from 0 on."""
    names = [str(digit) for digit in digits]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    for split, rows in load_digits().items():
        chosen = [row for row in rows if row['label'] in digits]
        columns = {
            'image': [row['image'] for row in chosen], 'label': [row['label'] - digits.start for row in chosen]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f'{split}.parquet')


def summary(records: list[dict]) -> dict:
    top1 = [record['top1'] for record in records]
    return dict(
        top1=top1, top1_mean=statistics.mean(top1), top1_std=statistics.stdev(top1) if len(top1) > 1 else None,
        loss=[record['loss'] for record in records], parameters=records[0]['parameters'],
        init=[record['init'] for record in records], recipe=dict(records[0]['recipe'], seed=None, init=None),
    )


def main(seeds: int, output: Path) -> None:
    first, second = output / 'digits_0-4', output / 'digits_5-9'
    write_half(range(0, 5), first)
    write_half(range(5, 10), second)

    shared = dict(epochs=EPOCHS, tracker='none', image_size=8, crop='pad', hflip=0.0, num_workers=0, batch_size=64)
    starts, arms = [], {}
    for seed in range(seeds):
        start = output / f'start_{seed}'
        scratch = dataclasses.replace(PRESETS['digits'], **shared, dataset=str(second), lr=LR, seed=seed)
        finetune = dataclasses.replace(PRESETS['finetune'], **shared, dataset=str(second), seed=seed)
        pretrained = dataclasses.replace(
            scratch, model=STATIC, dataset=str(first), epochs=FIRST_EPOCHS)
        starts.append(run('digits', pretrained, start))
        recipes = dict(
            scratch=('digits', dataclasses.replace(scratch, model=DYNAMIC)),
            static=('finetune', dataclasses.replace(finetune, init=str(start))),
            inflated=('finetune', dataclasses.replace(finetune, model=DYNAMIC, init=f'inflated:{start}')),
        )
        for name, (preset, recipe) in recipes.items():
            arms.setdefault(name, []).append(run(preset, recipe, output / f'{name}_{seed}'))

    last = arms['inflated'][-1]
    result = dict(
        seeds=seeds, train_images=last['train_images'], validation_images=last['validation_images'],
        steps=EPOCHS * (last['train_images'] // last['global_batch']), start=summary(starts),
        runs={name: summary(records) for name, records in arms.items()},
        **dict(circumstances('transfer.py'), device=last['device'], versions=last['versions']),
    )
    write_json(RESULT, result)
    print(f'| {result["steps"]} steps on digits 5 to 9 | top-1, {seeds} seeds | loss |\n|---|---|---|')
    for name, runs in result['runs'].items():
        loss = statistics.mean(runs['loss'])
        print(f'| {name} | {runs["top1_mean"]:.2f} ± {runs["top1_std"] or 0:.2f} | {loss:.4f} |')


if __name__ == '__main__':
    main(**vars(arguments))
