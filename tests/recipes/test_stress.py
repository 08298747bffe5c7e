"""Runs that are killed, stopped and robbed of their disk at random moments end as one that nothing has happened to."""
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import _checkpoints
import processes
import pytest
import tiny
from test_train import PATH

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no SIGKILL')]
ENV = dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONPATH=PATH)
# What a record says of its run's times and circumstances, and not of its result.
OF_TIMES = {
    'epoch_seconds', 'median_epoch_seconds', 'legs', 'ies', 'rcs', 'ies_infer', 'rcs_infer', 'infer_ms_per_image',
    'infer_images_per_second', 'train_images_per_second', 'data_wait_share', 'peak_memory_mib', 'command', 'finished',
    'git_commit',
}
SCRIPT = '''
import os, signal, sys, threading, time
from pathlib import Path

moment, delay, number, rank, *arguments = sys.argv[1:]
began = threading.Event()

def strike():
    if moment != 'start':
        began.wait()
    unfinished = Path(arguments[-1], 'checkpoints', '.unfinished')
    while moment == 'checkpoint' and not unfinished.exists():
        time.sleep(0.0002)
    time.sleep(float(delay))
    os.kill(os.getpid(), int(number))

if moment != 'never' and os.environ.get('RANK', '0') == rank:
    threading.Thread(target=strike, daemon=True).start()
if moment == 'full':
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(delay), int(delay)))

import _training, tiny, train
step = _training.train_step
def train_step(*args):
    began.set()
    return step(*args)
_training.train_step = train_step
train.main(**vars(train.parse_train(arguments)))
'''


class Runs:
    """The same run again and again, on so many processes."""

    def __init__(self, count, dataset, folder):
        self.count, self.folder, self.script = count, folder, folder / 'script.py'
        self.script.write_text(SCRIPT)
        self.options = [
            'digits', '--model', tiny.NAME, '--dataset', dataset, '--epochs', 12, '--batch-size', 16, '--accumulate', 2,
            '--mixup', 0.2, '--cutmix', 0.2, '--reprob', 0.25, '--aa', 'rand-m5', '--ema-decay', 0.9, '--tracker',
            'none', '--checkpoint-every', '0.0005min', '--resume', 'auto', '--output']
        self.output, self.finished, self.tried = folder / 'run0', 0, collections.Counter()
        self.attempt(folder / 'uninterrupted')
        self.expected = self.result(folder / 'uninterrupted')

    def attempt(self, output, moment='never', delay=0, number=0, rank=0):
        """What each process printed to stderr, and how it ended."""
        done = processes.launch(
            self.count, self.script, moment, delay, int(number), rank, *self.options, output, env=ENV)
        return [(process.returncode, process.stderr) for process in done]

    def result(self, output):
        record = json.loads((output / 'result.json').read_text())
        return {name: value for name, value in record.items() if name not in OF_TIMES}

    def newest(self):
        found = _checkpoints.find(self.output / 'checkpoints') if (self.output / 'checkpoints').exists() else {}
        return max((key for key, path in found.items() if _checkpoints.damage(path) is None), default=(-1, 0))

    def interrupt(self, moment, delay, number, rank=0):
        before = self.newest()
        ended = self.attempt(self.output, moment, delay, number, rank)
        assert self.newest() >= before, f'lost what was saved: {before}, {self.newest()} after {moment} {delay}'
        if all(code == 0 for code, _ in ended):
            self.compare()
        else:
            codes = {0, -signal.SIGKILL, -number, 128 + number}  # the launcher of the tests kills those that are left
            if number == signal.SIGKILL and self.count > 1:
                codes.add(1)  # of one that lost another and said so before it was killed
            assert {code for code, _ in ended} <= codes, ended
            self.tried[f'{signal.Signals(number).name} at {moment}'] += 1

    def compare(self):
        assert self.result(self.output) == self.expected  # with the sha256 of its weights
        self.finished += 1
        self.output = self.folder / f'run{self.finished}'

    def finish(self):
        assert [code for code, _ in self.attempt(self.output)] == [0] * self.count
        self.compare()


@pytest.mark.parametrize('count, kills, stops', [(1, 20, 6), (2, 12, 4)])
def test_a_run_that_is_killed_and_stopped_at_random_moments_loses_nothing(
        count, kills, stops, digits_folder, tmp_path):
    runs, draw = Runs(count, digits_folder, tmp_path), random.Random(count)
    moments = dict(start=3.0, loop=0.6, checkpoint=0.02)
    while sum(runs.tried.values()) < kills:
        moment = draw.choice(['start', 'loop', 'loop', 'checkpoint', 'checkpoint'])
        runs.interrupt(moment, draw.uniform(0, moments[moment]), signal.SIGKILL, draw.randrange(count))
    while sum(runs.tried.values()) < kills + stops:
        moment, number = draw.choice(['loop', 'checkpoint']), draw.choice([signal.SIGTERM, signal.SIGINT])
        runs.interrupt(moment, draw.uniform(0, moments[moment]), number, draw.randrange(count))
    runs.finish()
    print(f'{count} process(es): {dict(runs.tried)}, {runs.finished} runs finished, all equal')


def test_a_run_whose_files_cannot_grow_says_so_and_goes_on_later(digits_folder, tmp_path):
    """As on a full disk: at a size that is in the middle of the weights, of the optimizer's state, of the average."""
    runs = Runs(1, digits_folder, tmp_path)
    runs.interrupt('loop', 0.1, signal.SIGTERM)  # and so with a checkpoint
    sizes = sorted(path.stat().st_size for path in (runs.output / 'checkpoints').glob('*/*'))
    for size in {sizes[-1] - 1, sizes[-1] // 2, 100_000}:  # what it prints is a file, too
        before = runs.newest()
        [(code, stderr)] = runs.attempt(runs.output, 'full', size)
        assert code == 1 and 'Traceback' not in stderr and 'could not be written' in stderr, stderr[-2000:]
        assert runs.newest() >= before > (-1, 0)
    runs.finish()


@contextlib.contextmanager
def mounted(folder, *options):
    done = subprocess.run(['mount', '-t', 'tmpfs', *options, 'tmpfs', folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f'only root mounts file systems: {done.stderr}')
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


@pytest.mark.skipif(shutil.which('mount') is None, reason='no mount')
@pytest.mark.parametrize('options', [('-o', 'ro'), ('-o', 'size=2m')], ids=['read-only', 'full'])
def test_a_disk_that_is_full_or_read_only_ends_a_run_in_a_sentence(options, digits_folder, tmp_path, monkeypatch):
    """From the third checkpoint on."""
    runs = Runs(1, digits_folder, tmp_path)
    mount = f'''
import subprocess, _checkpoints
save, saved = _checkpoints.save, []
def then_mount(accelerator, checkpoints, *args):
    saved.append(1)
    if len(saved) == 3:
        checkpoints.rename(checkpoints.with_name('before'))
        checkpoints.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', {', '.join(map(repr, options))}, 'tmpfs', checkpoints], check=True)
    return save(accelerator, checkpoints, *args)
_checkpoints.save = then_mount
'''
    script = runs.script.read_text()
    with mounted(tmp_path / 'uninterrupted'):  # skips where that is not allowed
        pass
    runs.script.write_text(script.replace('train.main(', f'{mount}\ntrain.main('))
    checkpoints = runs.output / 'checkpoints'
    try:
        [(code, stderr)] = runs.attempt(runs.output)
        left = [path.name for path in checkpoints.iterdir()]
    finally:
        subprocess.run(['umount', '-l', checkpoints], check=True)
    assert code == 1 and 'Traceback' not in stderr and 'could not be written, older ones are whole' in stderr, stderr
    assert not left
    shutil.rmtree(checkpoints)
    (runs.output / 'before').rename(checkpoints)
    assert runs.newest() > (-1, 0)
    runs.script.write_text(script)
    runs.finish()
