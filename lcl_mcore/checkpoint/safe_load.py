"""Reads torch's distributed checkpoints without running what a forged one could contain.

torch unpickles `.metadata` without restriction, and byte entries with `weights_only=False`. `SafeReader` accepts
only the classes that honest metadata is made of, only tensors, and only files of the checkpoint's own folder.
torch itself reads each tensor with `weights_only=True`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lcl_mcore.errors import CheckpointError, explain

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(
        (_MODULE, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which honest metadata never does")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with a safe `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of every tensor in the checkpoint.

        Raises:
            CheckpointError: it is missing, damaged, or not made of tensors alone.
        """
        path = Path(self.path) / METADATA
        try:
            with open(path, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except Exception as error:  # a damaged pickle can raise anything
            raise _refused(path, str(error) or type(error).__name__) from None
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise _refused(path, "it does not describe a checkpoint")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise _refused(path, f"`{name}` is not a tensor")
        for place in metadata.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise _refused(path, f"it refers to `{place.relative_path}`, outside the checkpoint")
        return metadata


def _refused(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(explain(path, f"cannot be used: {reason}", "Use another checkpoint."))
