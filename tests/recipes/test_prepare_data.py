"""recipes/prepare_data.py: each image once, no larger than asked, in files that training reads; stopped, it goes on."""
import io
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import _data
import _dataset
import datasets
import numpy as np
import prepare_data
import processes
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_train import make_recipe

LABEL = datasets.ClassLabel(names=['cat', 'dog'])
SIZES = [(40, 30), (20, 64), (12, 10), (16, 16), (33, 17)]  # width and height; 16 is to be the shorter side


def encode(pixels, format='JPEG', **kwargs):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **kwargs)
    return file.getvalue()


def photograph(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, (x + y) / 2], axis=2).astype(np.uint8)


def make_source(folder, files, **columns):
    """A dataset in a folder, its images and further columns as given, with labels in turn."""
    features = dict(img=datasets.Image(), label=LABEL)
    rows = datasets.Dataset.from_dict(
        dict(img=[dict(bytes=file, path=f'{i}.png') for i, file in enumerate(files)],
             label=[i % 2 for i in range(len(files))], number=list(range(len(files)))),
        features=datasets.Features(**features, number=datasets.Value('int32')))
    folder.mkdir()
    rows.to_parquet(folder / 'train.parquet')
    rows.select(range(2)).to_parquet(folder / 'validation.parquet')
    return folder


def prepare(source, folder, **options):
    argv = [source, str(folder), *(f'--{name}={value}' for name, value in options.items())]
    prepare_data.main(**vars(prepare_data.parse_prepare_data(argv)))


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(prepare_data, 'usable_cores', lambda: 1)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    files = [encode(photograph(*size)) for size in SIZES[:3]] + [
        encode(photograph(*SIZES[3]), 'PNG'), encode(photograph(*SIZES[4])[..., 0], 'PNG')]
    return make_source(tmp_path_factory.mktemp('source') / 'pets', files)


@pytest.fixture(scope='module')
def prepared(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp('prepared') / 'new'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, 'usable_cores', lambda: 1)
        prepare(str(source), folder, size=16, shards=2)
    return folder


def rows_of(folder, split='train'):
    rows = _dataset.open_dataset(str(folder))[split].cast_column('img', datasets.Image(decode=False))
    return {row['number']: row for row in rows}


def test_large_images_get_the_shorter_side_and_keep_their_shape(prepared):
    rows = rows_of(prepared)
    sizes = {number: Image.open(io.BytesIO(row['img']['bytes'])).size for number, row in rows.items()}
    assert sizes == {0: (21, 16), 1: (16, 51), 2: (12, 10), 3: (16, 16), 4: (31, 16)}
    small = np.asarray(Image.open(io.BytesIO(rows[0]['img']['bytes']))).astype(int)
    assert abs(small - photograph(21, 16)).mean() < 4


def test_small_images_stay_as_they_are_in_any_format(source, prepared):
    before, after = rows_of(source), rows_of(prepared)
    for number in 2, 3:
        assert after[number]['img'] == before[number]['img']
    assert before[0]['img']['path'] == '0.png' and after[0]['img']['path'] == '0.jpg'


def test_every_row_is_there_once_with_its_other_columns_and_types(source, prepared):
    for split in 'train', 'validation':
        before, after = _dataset.open_dataset(str(source))[split], _dataset.open_dataset(str(prepared))[split]
        assert after.features == before.features
        assert sorted(zip(after['number'], after['label'])) == sorted(zip(before['number'], before['label']))
    assert after.features['label'].names == LABEL.names


def test_shards_have_the_hubs_names_and_differ_by_one_row_at_most(prepared):
    assert sorted(path.name for path in prepared.rglob('*') if path.is_file()) == [
        'settings.json', *(f'{split}-0000{i}-of-00002.parquet' for split in ('train', 'validation') for i in (0, 1))]
    assert [len(pq.read_table(prepared / 'data' / f'train-0000{i}-of-00002.parquet')) for i in (0, 1)] == [3, 2]


def test_row_groups_are_small(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, 'GROUP', 2)
    prepare(str(source), tmp_path / 'new', size=16, shards=1)
    assert pq.ParquetFile(tmp_path / 'new/data/train-00000-of-00001.parquet').num_row_groups == 3


def test_rows_are_shuffled_always_alike():
    parts = [list(rows) for rows, _ in prepare_data.share_out('train', 1000, 8, prepare_data.Path())]
    assert [len(part) for part in parts] == [125] * 8
    assert sorted(sum(parts, [])) == list(range(1000)) != sum(parts, [])
    again = [list(rows) for rows, _ in prepare_data.share_out('train', 1000, 8, prepare_data.Path())]
    assert parts == again


def test_a_split_with_fewer_images_than_shards_has_one_in_each(tmp_path):
    paths = [path.name for _, path in prepare_data.share_out('val', 2, 64, tmp_path)]
    assert paths == ['val-00000-of-00002.parquet', 'val-00001-of-00002.parquet']


def test_training_opens_it(prepared):
    images = _data.open_images(make_recipe(prepared, batch_size=2))
    assert len(images['train']) == 5 and images['train'].label_names == ['cat', 'dog']
    assert images['validation'].split == 'validation'


def test_a_folder_of_images_is_put_into_the_files(tmp_path):
    for i, label in enumerate(LABEL.names):
        (tmp_path / 'pets/train' / label).mkdir(parents=True)
        (tmp_path / 'pets/train' / label / f'{i}.png').write_bytes(encode(photograph(8, 8), 'PNG'))
    prepare(str(tmp_path / 'pets'), tmp_path / 'new', shards=1)
    shutil.rmtree(tmp_path / 'pets')
    rows = _dataset.open_dataset(str(tmp_path / 'new'))['train']
    assert [image.size for image in rows['image']] == [(8, 8)] * 2
    paths = [image['path'] for image in rows.cast_column('image', datasets.Image(decode=False))['image']]
    assert sorted(paths) == ['0.png', '1.png']


def test_stopped_it_goes_on_and_writes_only_what_is_missing(source, prepared, tmp_path, monkeypatch):
    folder, written = tmp_path / 'new', []

    def write_one(shards):
        yield prepare_data.write(shards[0])
        (shards[1].path.with_name('.' + shards[1].path.name)).write_bytes(b'half of a sh')
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, 'write_all', write_one)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(source), folder, size=16, shards=2)
    with pytest.raises(SystemExit, match='could not be loaded|was not found'):
        _dataset.open_dataset(str(folder))
    usual = prepare_data.write_all
    monkeypatch.setattr(
        prepare_data, 'write_all', lambda shards: written.extend(shard.path.name for shard in shards) or usual(shards))
    prepare(str(source), folder, size=16, shards=2)
    assert len(written) == 3 and 'train-00000-of-00002.parquet' not in written
    files = [{path.name: path.read_bytes() for path in (there / 'data').iterdir()} for there in (folder, prepared)]
    assert files[0] == files[1]


def test_what_is_complete_is_left_alone(source, prepared, capsys):
    times = {path: path.stat().st_mtime_ns for path in prepared.rglob('*')}
    prepare(str(source), prepared, size=16, shards=2)
    assert 'is complete' in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in prepared.rglob('*')}


def test_a_folder_with_something_else_is_refused(source, prepared, tmp_path):
    with pytest.raises(SystemExit, match=r'prepared otherwise \(size 16 there and 8 now\), expected the same settings'):
        prepare(str(source), prepared, size=8, shards=2)
    (tmp_path / 'holiday.txt').touch()
    with pytest.raises(SystemExit, match='must be a new folder, or one that this command began'):
        prepare(str(source), tmp_path)


@pytest.mark.parametrize('place', [0, 100], ids=['found while the size is estimated', 'found by a process'])
def test_an_image_that_cannot_be_decoded_is_named_with_its_row_and_file(place, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, 'SAMPLE', 2)
    files = [encode(photograph(8, 8), 'PNG')] * 150
    row = np.random.default_rng(0).permutation(150)[place]
    files[row] = files[row][:40]
    source = make_source(tmp_path / 'pets', files)
    with pytest.raises(SystemExit, match=rf"split 'train': the image in row {row} \({row}.png\) cannot be decoded: ."):
        prepare(str(source), tmp_path / 'new', shards=1)


def test_a_process_that_is_killed_ends_the_others(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, 'check_space', lambda folder, missing: None)
    monkeypatch.setattr(prepare_data, 'shrink', lambda *args: os.kill(os.getpid(), 9))  # the processes are forks
    with pytest.raises(SystemExit, match='a process was killed, perhaps for its memory: the same command goes on'):
        prepare(str(source), tmp_path / 'new')


def test_where_the_first_process_is_killed_the_others_end(source, tmp_path):
    script = f"""
import multiprocessing, os, pathlib, signal, time, prepare_data

def shrink(*args):
    pathlib.Path('pid').write_text(str(os.getpid()))
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)

multiprocessing.set_start_method('fork', force=True)  # the processes know the shrink of this one
prepare_data.check_space = lambda *args: None
prepare_data.shrink, prepare_data.usable_cores = shrink, lambda: 1
prepare_data.main(**vars(prepare_data.parse_prepare_data([{str(source)!r}, 'new'])))
"""
    recipes = Path(prepare_data.__file__).parent
    done = processes.run('-c', script, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(recipes)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, deadline = int((tmp_path / 'pid').read_text()), time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data.shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(SystemExit, match='needs about 0.0 GB, and its disk has 0.0 GB left'):
        prepare(str(source), tmp_path / 'new')
    assert not list(tmp_path.rglob('*.parquet'))


def test_processes_that_are_not_forks_of_this_one_do_it_too(source, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, 'get_context', lambda method=None: processes.FORKS)
    prepare(str(source), tmp_path / 'new', size=16, shards=2)
    assert rows_of(tmp_path / 'new') == rows_of(prepared)
