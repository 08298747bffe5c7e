"""The loop over the epochs: training, evaluation, checkpoints, and where it is stopped and goes on."""
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _checkpoints
import torch
from _accelerator import broadcast_buffers, exchange, tracked
from _interruptions import Interruptions, parse_every
from _loaders import batches_of
from _measure import score
from _training import Training, learning_rate, train_epoch
from torch.utils.data import DataLoader
from tqdm import tqdm


def train_epochs(
        training: Training,
        train_loader: DataLoader,
        validation_loader: DataLoader,
        progress: dict[str, Any],
        checkpoints: Path,
) -> None:
    """Train from where `progress` is to the end, and keep it up to date.

    Raises:
        SystemExit: 130 after Ctrl-C and 143 after SIGTERM, with a checkpoint; or training has diverged, or a checkpoint
            can't be written.
    """
    accelerator, recipe = training.accelerator, training.recipe
    seconds, epochs = parse_every(recipe.checkpoint_every)

    def save():
        folder = _checkpoints.save(accelerator, checkpoints, progress, training.ema)
        # What came since the last step: after the last epoch there is no other that would tell.
        no_loss = torch.zeros((), device=accelerator.device)
        interruptions.hear(*exchange(accelerator, no_loss, *interruptions.wishes())()[1:])
        interruptions.saved()
        if interruptions.signal:
            stop(training, progress, folder, interruptions.signal)

    with Interruptions(seconds if accelerator.is_main_process else math.inf) as interruptions:
        for epoch in range(progress['epochs_done'], recipe.epochs):
            finish_epoch(training, train_loader, progress, interruptions, save)
            metrics = evaluate(training, validation_loader, interruptions)
            if metrics is None:
                save()  # and end, because a signal stopped the evaluation
            logged = dict(
                metrics, train_loss=progress['train_loss'], lr=learning_rate(training.optimizer),
                epoch_seconds=progress['seconds'])
            tracked(accelerator.log, logged, step=epoch + 1)
            accelerator.print(
                f'epoch {epoch + 1}: ' + ', '.join(f'{name} {value:.4g}' for name, value in logged.items()))
            if metrics['top1'] > progress['best_top1']:
                progress |= dict(best_top1=metrics['top1'], best_epoch=epoch + 1)
            progress['legs'][-1]['epoch_seconds'].append(progress['seconds'])
            progress['legs'][-1]['data_wait_seconds'].append(progress['waited'])
            progress['history'].append(logged)
            progress |= dict(epochs_done=epoch + 1, step=0, seconds=0.0, waited=0.0, metrics=metrics)
            if epoch + 1 == recipe.epochs or epochs and (epoch + 1) % epochs == 0:
                save()


def finish_epoch(
        training: Training,
        loader: DataLoader,
        progress: dict[str, Any],
        interruptions: Interruptions,
        save: Callable[[], None],
) -> None:
    """Train the steps that are left of an epoch, all of them or until `save` ends the process."""
    recipe, epoch = training.recipe, progress['epochs_done']
    steps_per_epoch = training.total_steps // recipe.epochs
    if progress['step'] == steps_per_epoch:  # it was stopped before it was evaluated
        return
    first = progress['step'] * recipe.accumulate
    with tqdm(  # of the whole run, so that it tells when that ends
            total=recipe.epochs * len(loader), initial=epoch * len(loader) + first,
            desc=f'epoch {epoch + 1}/{recipe.epochs}', leave=False, mininterval=1,
            disable=not training.accelerator.is_main_process) as bar:

        def counted():
            asked = time.perf_counter()
            for batch in batches_of(loader, epoch, first):
                progress['waited'] += time.perf_counter() - asked
                yield batch
                bar.update()
                asked = time.perf_counter()

        batches = counted()
        while progress['step'] < steps_per_epoch:
            seconds, loss = train_epoch(
                training, batches, interruptions, lambda loss: bar.set_postfix(loss=f'{loss:.3f}', refresh=False))
            progress |= dict(
                step=training.step - epoch * steps_per_epoch, seconds=progress['seconds'] + seconds, train_loss=loss)
            if interruptions.pending:
                save()
        next(batches, None)  # there is none: the loader comes to its end, also where the last step was interrupted


def evaluate(training: Training, loader: DataLoader, interruptions: Interruptions) -> dict[str, float] | None:
    """The score of the network that counts; None if it was stopped.

    Raises:
        SystemExit: It is none, because training has diverged.
    """
    broadcast_buffers(training.model)
    if training.ema:
        broadcast_buffers(training.ema.module)
    metrics = score(
        training.accelerator, training.evaluated, loader, training.normalize, len(loader.dataset), interruptions)
    if metrics and not math.isfinite(metrics['loss']):
        raise SystemExit(
            f'the loss of the validation images is {metrics["loss"]} after step {training.step} with learning rate '
            f'{learning_rate(training.optimizer):.4g}: training has diverged; the last checkpoint is from before it'
        )
    return metrics


def stop(training: Training, progress: dict[str, Any], checkpoint: Path, signal: int) -> None:
    """End this process as the signal would have ended it, but with a word on how to go on."""
    tracked(training.accelerator.end_training)
    done, step = progress['epochs_done'], progress['step']
    where = f'epoch {done + 1}, step {step}' if step else f'epoch {done}'
    if training.accelerator.is_main_process:
        print(
            f'stopped after {where}: go on with --resume auto (saved as {checkpoint})', file=sys.stderr, flush=True)
    raise SystemExit(128 + signal)
