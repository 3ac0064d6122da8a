"""Pieces of tensors to and from a folder, by torch's distributed checkpoint format.

torch writes, describes and reshards; added here are boxes instead of whole tensors, a SHA-256 of what each
rank writes while it writes it, and reading without unpickling foreign classes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lcl_mcore.checkpoint.safe_load import SafeReader
from lcl_mcore.checkpoint.shards import Piece
from lcl_mcore.errors import CheckpointError, explain

Entries = dict[str, dict[str, Any]]  # file name -> {"bytes": size, "sha256": hex}
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    AssertionError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape)


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans this rank's pieces; torch checks over all ranks that they tile each tensor exactly."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(p.key, torch.Size(p.offset)): p for p in pieces}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        _chunk(piece), TensorProperties(dtype=piece.tensor.dtype), torch.Size(piece.shape)
                    ),
                )
                for index, piece in self.pieces.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index].tensor


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Plans what of the checkpoint each wanted piece is made of."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = {MetadataIndex(p.key, torch.Size(p.offset)): p for p in pieces}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for piece in self.pieces.values():
            stored = self.metadata.state_dict_metadata.get(piece.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{piece.key} is not in it")
            if tuple(stored.size) != piece.shape:
                raise ValueError(f"{piece.key} is {tuple(stored.size)} there and {piece.shape} here")
            reads = create_read_items_for_chunk_list(piece.key, stored, [_chunk(piece)])
            if sum(math.prod(read.lengths) for read in reads) != piece.tensor.numel():
                raise ValueError(f"{piece.key} has gaps")
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index].tensor

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


class _HashingFile:
    """A file that hashes what passes through it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0
        self.error: OSError | None = None
        self.tell, self.flush, self.fileno, self.close = file.tell, file.flush, file.fileno, file.close

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.bytes += memoryview(data).nbytes
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch's serializer reports only that the file is too short
            raise


class HashingFiles(FileSystem):
    """torch's file access that keeps size and hash of every file written."""

    def __init__(self) -> None:
        self.entries: Entries = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with open(path, mode) as file:
            if mode != "wb":
                yield file
                return
            stream = _HashingFile(file)  # type: ignore[arg-type]
            try:
                yield stream
            finally:
                self.error = self.error or stream.error
        self.entries[Path(path).name] = {"bytes": stream.bytes, "sha256": stream.hash.hexdigest()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def write_pieces(folder: Path, pieces: Sequence[Piece], group: dist.ProcessGroup) -> Entries:
    """Write all ranks' pieces; collective over `group` (gloo), which nobody else may be using.

    Returns:
        The files this rank wrote, with the hash of what it meant to write; all flushed to the disk.

    Raises:
        OSError: this rank cannot write.
        CheckpointException: some rank failed; raised on every other rank.
    """
    files = HashingFiles()
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    writer.fs = files
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(pieces), process_group=group)
    except dcp.CheckpointException:
        if files.error is not None:
            raise files.error from None
        raise
    return files.entries


def read_metadata(folder: Path) -> Metadata:
    """The tensors of a checkpoint folder.

    Raises:
        CheckpointError: see `SafeReader.read_metadata`.
    """
    return SafeReader(folder).read_metadata()


def read_pieces(folder: Path, pieces: Sequence[Piece]) -> None:
    """Fill the tensors of `pieces` from a checkpoint of any layout; needs no other process.

    Raises:
        CheckpointError: damaged, or a tensor is missing or has another shape.
    """
    reader, planner = SafeReader(folder), _LoadPlanner(pieces)
    metadata = reader.read_metadata()
    try:
        planner.set_up_planner({}, metadata, is_coordinator=False)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except _DAMAGE as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            explain(
                folder,
                f"cannot be loaded into this model: {reason}",
                "Use the configuration it was written with, or another checkpoint.",
            )
        ) from error
