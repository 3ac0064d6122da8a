"""Closes the doors through which a torch distributed checkpoint could run code while it is read.

`.metadata` is unpickled by torch without restriction, and byte entries are loaded with `weights_only=False`.
Within `restricted_unpickling` the first accepts only the classes that honest metadata is made of, and the second
loads plain data only.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed.checkpoint.default_planner as default_planner
import torch.distributed.checkpoint.filesystem as filesystem

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_ALLOWED = {
    *((_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("builtins", "set"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise RuntimeError(
            f"checkpoint metadata refers to {module}.{name}, which honest metadata never does: refused"
        )


class _PlainTorch(types.ModuleType):
    """torch, except that `load` takes plain data only."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return torch.load(file, **(options | {"weights_only": True}))


@contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Read checkpoints safely inside this block."""
    safe_pickle: Any = types.SimpleNamespace(
        **{name: getattr(pickle, name) for name in ("dump", "dumps", "PickleError", "UnpicklingError")},
        load=lambda file, **options: _MetadataUnpickler(file).load(),
        loads=lambda data, **options: _MetadataUnpickler(io.BytesIO(data)).load(),
    )
    patched: list[tuple[Any, str, Any]] = [
        (filesystem, "pickle", safe_pickle),
        (default_planner, "torch", _PlainTorch("torch")),
    ]
    previous = [getattr(module, name) for module, name, _ in patched]
    for module, name, value in patched:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(patched, previous, strict=True):
            setattr(module, name, value)
