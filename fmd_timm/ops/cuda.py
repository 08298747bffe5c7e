"""Stub, replaced by the branch of the CUDA path."""
from . import per_image, per_kernel, reference


def algorithms(question, case) -> list:
    return [a for a in (per_kernel, per_image, reference) if a.supports(case)]
