"""cache_bytes: what the system tells, or an estimate."""
import os

import pytest

from fmd_timm.ops import cache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A processor whose caches the C library doesn't know."""
    monkeypatch.setattr(cache, 'CACHES', tmp_path)
    monkeypatch.setattr(os, 'sysconf_names', {}, raising=False)
    return tmp_path


def add_cache(folder, number: int, **files: str) -> None:
    index = folder / f'index{number}'
    index.mkdir()
    for name, content in files.items():
        (index / name).write_text(content + '\n')


def test_sizes_of_this_machine_are_plausible():
    assert 2**17 <= cache.cache_bytes() <= 2**27


def test_linux_tells_the_size_of_level_2(folder):
    add_cache(folder, 0, level='1', size='32K')
    add_cache(folder, 1, level='2', size='1280K')
    add_cache(folder, 2, level='3', size='32768K')
    assert cache.cache_bytes.__wrapped__() == 1280 * 1024


def test_without_linux_the_c_library_tells_it(folder, monkeypatch):
    monkeypatch.setattr(os, 'sysconf_names', {'SC_LEVEL2_CACHE_SIZE': 191}, raising=False)
    monkeypatch.setattr(os, 'sysconf', {'SC_LEVEL2_CACHE_SIZE': 3 * 2**18}.get, raising=False)
    assert cache.cache_bytes.__wrapped__() == 3 * 2**18


@pytest.mark.parametrize('known', [0, -1])
def test_what_nobody_tells_is_estimated(folder, known, monkeypatch):
    add_cache(folder, 0, level='2')
    add_cache(folder, 1, level='2', size='many')
    monkeypatch.setattr(os, 'sysconf_names', {'SC_LEVEL2_CACHE_SIZE': 191}, raising=False)
    monkeypatch.setattr(os, 'sysconf', lambda name: known, raising=False)
    assert cache.cache_bytes.__wrapped__() == 2**20
