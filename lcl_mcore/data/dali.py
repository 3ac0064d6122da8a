"""NVIDIA DALI as a decoder."""

from __future__ import annotations

from importlib.util import find_spec


def installed() -> bool:
    """Whether NVIDIA's own package is there (the one named `nvidia-dali` on PyPI is not theirs)."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
