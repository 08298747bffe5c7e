"""Stub, replaced by the branch that measures caches."""


def cache_bytes(level: int) -> int:
    return {2: 2**20, 3: 2**25}[level]
