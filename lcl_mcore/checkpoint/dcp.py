"""Boxes of tensors to and from a folder, by torch's distributed checkpoint format.

torch writes, describes and reshards. Added here are boxes instead of whole tensors, a hash of what each rank
writes while it writes it, and reading that runs nothing of what a forged checkpoint could contain: torch unpickles
`.metadata` without restriction, and byte entries with `weights_only=False`. `SafeReader` accepts only the classes
that valid metadata is made of, only tensors, and only files of the checkpoint's own folder; torch itself reads each
tensor with `weights_only=True`. Parameters that were renamed are found under their present names.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lcl_mcore.checkpoint.hashing import start_hash
from lcl_mcore.checkpoint.shards import TensorBox, current_name
from lcl_mcore.checkpoint.store import Entries
from lcl_mcore.errors import CheckpointError, explain, printable
from lcl_mcore.storage import LocalStorage

METADATA = ".metadata"
MAX_METADATA_BYTES = 64 << 20  # ten thousand ranks need less
MAX_DIMENSIONS = 8


def _chunk(box: TensorBox) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offset), box.tensor.shape)


# --- writing ---


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans this rank's boxes; torch checks over all ranks that they tile each tensor exactly."""

    def __init__(self, boxes: Sequence[TensorBox]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = {MetadataIndex(b.key, torch.Size(b.offset)): b for b in boxes}

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index,
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        _chunk(box), TensorProperties(dtype=box.tensor.dtype), torch.Size(box.shape)
                    ),
                )
                for index, box in self.boxes.items()
            ]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.boxes[index].tensor


class _HashingFile:
    """A file that hashes what passes through it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.hash, self.bytes = file, start_hash(), 0
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
        self.entries[Path(path).name] = {"bytes": stream.bytes, "hash": stream.hash.hexdigest()}

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


def write_boxes(folder: Path, boxes: Sequence[TensorBox], group: dist.ProcessGroup) -> Entries:
    """Write all ranks' boxes; collective over `group` (gloo), which nobody else may be using.

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
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(boxes), process_group=group)
    except dcp.CheckpointException:
        if files.error is not None:
            raise files.error from None
        raise
    return files.entries


# --- reading ---

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
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which valid metadata never does")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with a safe `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of every tensor in the checkpoint.

        Raises:
            CheckpointError: it is missing, damaged, or not made of tensors alone.
        """
        path = Path(self.path) / METADATA
        try:
            with closing(LocalStorage(path.parent)) as files:
                sizes = files.sizes()
                if METADATA not in sizes:
                    raise ValueError("missing")
                if sizes[METADATA] > MAX_METADATA_BYTES:
                    raise ValueError(f"larger than {MAX_METADATA_BYTES} bytes")
                data = files.read(METADATA, 0, sizes[METADATA])
            return _checked(_MetadataUnpickler(io.BytesIO(data)).load(), sizes)
        except Exception as error:  # a damaged or forged pickle can raise anything
            rule = f"cannot be used: {printable(str(error)) or type(error).__name__}"
            raise CheckpointError(explain(path, rule, "Use another checkpoint.")) from None


def _checked(metadata: object, sizes: Mapping[str, int]) -> Metadata:
    """The metadata, under today's names of the tensors.

    Args:
        sizes: of the checkpoint's files, which bound what tensors may claim.

    Raises:
        ValueError: it holds something else than tensors in files of its own folder.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it does not describe a checkpoint")
    for place in metadata.storage_data.values():
        if place.relative_path not in sizes:
            raise ValueError(f"it refers to `{place.relative_path}`, outside the checkpoint")
        if not _counts((place.offset, place.length)) or place.offset + place.length > sizes[place.relative_path]:
            raise ValueError(f"it refers to bytes that `{place.relative_path}` does not have")
        if place.transform_descriptors:
            raise ValueError(f"`{place.relative_path}` is encoded")
    spans = sorted((place.relative_path, place.offset, place.length) for place in metadata.storage_data.values())
    for (file, start, length), (other, after, _) in pairwise(spans):
        if file == other and start + length > after:
            raise ValueError(f"it refers twice to bytes of `{file}`")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"`{name}` is not a tensor")
    tensors = {current_name(name): entry for name, entry in metadata.state_dict_metadata.items()}
    if len(tensors) != len(metadata.state_dict_metadata):
        raise ValueError("it holds a tensor under an old and under its present name")
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)
        _check_chunks(name, entry, metadata.storage_data)
    places = {
        MetadataIndex(current_name(index.fqn), index.offset, index.index): place
        for index, place in metadata.storage_data.items()
    }
    return replace(metadata, state_dict_metadata=tensors, storage_data=places)


def _counts(values: Sequence[object]) -> bool:
    """Whether these are sizes or offsets."""
    return all(type(value) is int and 0 <= value < 1 << 60 for value in values)


def _check_chunks(name: str, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, Any]) -> None:
    """Refuse a tensor that claims more than its bytes in the files.

    Raises:
        ValueError: its chunks are not a division of it, or one has no place.
    """
    dtype, shape, elements = entry.properties.dtype, tuple(entry.size), 0
    if not isinstance(dtype, torch.dtype) or not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"`{name}` is no tensor of {str(dtype)[:40]}")
    for chunk in entry.chunks:
        offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
        inside = len(offset) == len(size) == len(shape) and _counts(offset) and _counts(size)
        if not inside or any(o + n > whole for o, n, whole in zip(offset, size, shape, strict=True)):
            raise ValueError(f"`{name}` has a chunk outside of it")
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or place.length < math.prod(size) * dtype.itemsize:
            raise ValueError(f"`{name}` has a chunk without its bytes")
        elements += math.prod(size)
    if elements != math.prod(shape):
        raise ValueError(f"`{name}` has gaps")


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Plans what of the checkpoint each wanted box is made of."""

    def __init__(self, boxes: Sequence[TensorBox]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.boxes = {MetadataIndex(b.key, torch.Size(b.offset)): b for b in boxes}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for box in self.boxes.values():
            stored = self.metadata.state_dict_metadata.get(box.key)
            if not isinstance(stored, TensorStorageMetadata):
                raise ValueError(f"{box.key} is not in it")
            if tuple(stored.size) != box.shape:
                raise ValueError(f"{box.key} is {tuple(stored.size)} there and {box.shape} here")
            reads = create_read_items_for_chunk_list(box.key, stored, [_chunk(box)])
            if sum(math.prod(read.lengths) for read in reads) != box.tensor.numel():
                raise ValueError(f"{box.key} has gaps")
            items += reads
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.boxes[index].tensor

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is not a tensor")


def read_boxes(folder: Path, boxes: Sequence[TensorBox]) -> None:
    """Fill the tensors of `boxes` from a checkpoint of any layout; needs no other process.

    Raises:
        CheckpointError: damaged, or a tensor is missing or has another shape.
    """
    reader, planner = SafeReader(folder), _LoadPlanner(boxes)
    metadata = reader.read_metadata()
    try:
        planner.set_up_planner({}, metadata, is_coordinator=False)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        reader.read_data(planner.create_local_plan(), planner).wait()
    except Exception as error:  # a damaged or forged tensor can raise anything
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 400)
        raise CheckpointError(
            explain(
                folder,
                f"cannot be loaded into this model: {reason}",
                "Use the configuration it was written with, or another checkpoint.",
            )
        ) from error
