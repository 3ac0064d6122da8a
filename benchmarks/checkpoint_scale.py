"""What a checkpoint of many ranks costs: hashes, one rank's share of a save, and rank 0's work for all of them.

    python benchmarks/checkpoint_scale.py --out benchmarks/results/checkpoint-scale-cpu.json

Three measurements on this machine. `hashes`: GB per second and per processor second of each hash with one thread,
and per second with several. `rank`: a rank's share of the state (12 bytes a parameter: fp32 weight and two moments)
written, read back and verified as a run does it. `commit`: rank 0's work for all ranks; their files have the names and
sizes of a real save but hold nothing, while manifest, commit and metadata are real. Nothing goes over a network here:
a shared file system adds its latency to each operation; `tests/benchmarks/test_checkpoint_scale.py` counts these.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from lcl_mcore.checkpoint.dcp import METADATA, SafeReader, write_boxes
from lcl_mcore.checkpoint.hashing import hash_of
from lcl_mcore.checkpoint.shards import FIRST_MOMENT, SECOND_MOMENT, WEIGHTS, TensorBox, boxes
from lcl_mcore.checkpoint.store import (
    Entries,
    FolderStore,
    Manifest,
    TrainState,
    manifest_bytes,
    parse_manifest,
    verify,
    verify_written,
    write_state,
)

BYTES_PER_PARAMETER = 12
KINDS = (WEIGHTS, FIRST_MOMENT, SECOND_MOMENT)
RUN = "0123456789abcdef"


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def best(action: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of some, which neighbours on the machine disturbed least."""
    return min(seconds(action) for _ in range(repeats))


def hash_rates(size: int, threads: int, repeats: int) -> dict[str, dict[str, float]]:
    """GB/s by hash: one thread by the clock and by its processor time, and `threads`, each with its own buffer."""
    kinds: dict[str, Callable[[Any], object]] = {
        "sha256": lambda data: hashlib.sha256(data).digest(),
        "blake3": lambda data: hash_of([data]),
    }
    try:
        import xxhash

        kinds["xxh3_128"] = lambda data: xxhash.xxh3_128(data).digest()
    except ImportError:
        pass  # it is measured where it is installed; nothing here depends on it
    buffers = [memoryview(os.urandom(size)) for _ in range(threads)]
    rates = {}
    with ThreadPoolExecutor(threads) as pool:
        for name, digest in kinds.items():
            one = best(partial(digest, buffers[0]), repeats)
            begun = time.thread_time()
            for _ in range(repeats):
                digest(buffers[0])
            of_processor = (time.thread_time() - begun) / repeats
            several = best(lambda digest=digest: list(pool.map(digest, buffers)), repeats)  # type: ignore[misc]
            rates[name] = {
                "one": size / one / 1e9,
                "one_by_processor_time": size / of_processor / 1e9,
                "several": threads * size / several / 1e9,
            }
    return rates


def rank_share(nbytes: int, folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of one rank's part of a save, and of a restore's verification; the shortest of some."""
    elements = nbytes // BYTES_PER_PARAMETER
    tensors = [TensorBox(f"{kind}x", (elements,), (0,), torch.rand(elements)) for kind in KINDS]
    copies = [torch.empty(elements) for _ in KINDS]
    group = dist.new_group([0], backend="gloo")
    found: dict[str, list[float]] = {"copy": [], "write_and_hash": [], "read_back_and_hash": [], "verify": []}
    for number in range(repeats):
        store, name = FolderStore(folder), f"step-{number:08d}"
        store.prepare(name)
        staging = store.staging(name)
        marks = [time.perf_counter()]
        for copy, box in zip(copies, tensors, strict=True):
            copy.copy_(box.tensor)
        marks.append(time.perf_counter())
        entries = write_boxes(staging, tensors, group)
        marks.append(time.perf_counter())
        verify_written(staging, entries)
        marks.append(time.perf_counter())
        entries |= write_state(staging, TrainState(number, None, "", ""), "")
        store.commit(name, Manifest(RUN, number, "", entries))
        begun = time.perf_counter()
        assert verify(folder / name) == []
        verification = time.perf_counter() - begun
        taken = [*(after - before for before, after in pairwise(marks)), verification]
        for stage, duration in zip(found, taken, strict=True):
            found[stage].append(duration)
        store.remove([name])
    return {"bytes": nbytes, **{name: min(values) for name, values in found.items()}}


def model_shapes(parameters: int) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors of a transformer of about so many parameters, 4,096 wide."""
    width = 4096
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (50272, 4096)), ("head", (50272, 4096))]
    layers = max(1, round((parameters - 2 * math.prod(shapes[0][1])) / (12 * width * width)))
    for layer in range(layers):
        for name, shape in (
            ("qkv", (3 * width, width)),
            ("proj", (width, width)),
            ("fc1", (4 * width, width)),
            ("fc2", (width, 4 * width)),
            ("norm1", (width,)),
            ("norm2", (width,)),
            ("bias1", (4 * width,)),
            ("bias2", (width,)),
        ):
            shapes.append((f"layers.{layer}.{name}", shape))
    return shapes


def metadata_of(parameters: int, ranks: int) -> tuple[Metadata, dict[str, int]]:
    """What torch writes for a model whose state is divided evenly over the ranks, and the size of each rank's file."""
    shapes = model_shapes(parameters)
    share = -(-sum(math.prod(shape) for _, shape in shapes) // ranks)
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    sizes: Counter[str] = Counter()
    first = 0
    for name, shape in shapes:
        last = first + math.prod(shape)
        parts = [
            (rank, box)
            for rank in range(first // share, -(-last // share))
            for box in boxes(shape, max(first, rank * share) - first, min(last, (rank + 1) * share) - first)
        ]
        for kind in KINDS:
            chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for _, (offset, size) in parts]
            tensors[kind + name] = TensorStorageMetadata(
                TensorProperties(dtype=torch.float32), torch.Size(shape), chunks
            )
            for rank, (offset, size) in parts:
                file, length = f"__{rank}_0.distcp", 4 * math.prod(size) + 1200  # torch's frame around a tensor
                places[MetadataIndex(kind + name, torch.Size(offset))] = _StorageInfo(file, sizes[file], length)
                sizes[file] += length
        first = last
    return Metadata(tensors, storage_data=places), dict(sizes)


def all_files(parameters: int, ranks: int, folder: Path) -> tuple[FolderStore, str, Manifest, Metadata]:
    """A save of all ranks that is ready to be committed; the tensors' files are holes."""
    metadata, sizes = metadata_of(parameters, ranks)
    store, name = FolderStore(folder), "step-00000001"
    store.prepare(name)
    staging = store.staging(name)
    entries: Entries = {}
    for number, (file, size) in enumerate(sizes.items()):
        (staging / file).touch()
        os.truncate(staging / file, size)
        entries[file] = {"bytes": size, "hash": hash_of([number.to_bytes(8, "little")])}
    pickled = pickle.dumps(metadata)
    (staging / METADATA).write_bytes(pickled)
    entries[METADATA] = {"bytes": len(pickled), "hash": hash_of([pickled])}
    entries.update(write_state(staging, TrainState(1, None, "", ""), ""))
    return store, name, Manifest(RUN, 1, "", entries), metadata


def commit_of_all(parameters: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Rank 0's work for the files of all, and what each rank does with the manifest and the metadata in a restore."""
    store, name, manifest, metadata = all_files(parameters, ranks, folder)
    data = manifest_bytes(manifest)
    commit = seconds(lambda: store.commit(name, manifest))
    return {
        "parameters": sum(math.prod(shape) for _, shape in model_shapes(parameters)),
        "ranks": ranks,
        "commit_seconds": commit,
        "manifest_bytes": len(data),
        "manifest_write_seconds": best(lambda: manifest_bytes(manifest)),
        "manifest_parse_seconds": best(lambda: parse_manifest(data)),
        "metadata_bytes": manifest.files[METADATA]["bytes"],
        "metadata_chunks": len(metadata.storage_data),
        "metadata_read_seconds": best(lambda: SafeReader(folder / name).read_metadata()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=8e9)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()

    from lcl_mcore.diagnostics import environment

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        share = round(args.parameters * BYTES_PER_PARAMETER / args.ranks)
        result = environment.describe() | {
            "hashes": hash_rates(64 << 20, args.threads, args.repeats),
            "threads": args.threads,
            "rank": rank_share(share, folder, args.repeats),
            "commit": commit_of_all(round(args.parameters), args.ranks, folder),
        }
    finally:
        shutil.rmtree(folder)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
