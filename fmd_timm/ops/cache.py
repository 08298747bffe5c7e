"""Sizes of the caches: algorithms work on as much at a time as stays in one."""
import os
from functools import cache
from pathlib import Path

CACHES = Path('/sys/devices/system/cpu/cpu0/cache')
# Bytes where the system doesn't tell (macOS, Windows, some containers): what a core of a server has had since 2017
# (Skylake-SP, Neoverse N1, Zen 4), and of L3 what a laptop has.
DEFAULTS = {2: 2**20, 3: 2**23}


@cache
def cache_bytes(level: int) -> int:
    """Bytes of the L2 or L3 cache (`level` 2 or 3) of the first core, an estimate where the system doesn't tell.

    Linux itself is asked before the C library: glibc 2.36 takes the L3 of an AMD EPYC for ten times what it is.
    """
    for folder in sorted(CACHES.glob('index*')):
        try:
            if int((folder / 'level').read_text()) == level:
                return int((folder / 'size').read_text().strip().removesuffix('K')) * 1024
        except (OSError, ValueError):
            continue
    name = f'SC_LEVEL{level}_CACHE_SIZE'
    known = os.sysconf(name) if name in getattr(os, 'sysconf_names', {}) else 0
    return known if known > 0 else DEFAULTS[level]
