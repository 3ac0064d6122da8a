"""What data-parallel and model-parallel ranks tell each other about a step: tensors and JSON, no pickle.

Both run in the loader's own thread, on gloo groups that nothing else uses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.errors import DataError, LclError

MAX_CAUSE = 4000  # characters of an error that travel
DIGEST_INTEGERS = 2  # a row's digest: 16 bytes
FIELDS = tuple(name for name, kind in MicroBatch.__annotations__.items() if kind == "Tensor")


@dataclass(frozen=True)
class RankReport:
    """What one data-parallel rank reports of its rows: sums, one digest and one lane state per row."""

    sums: tuple[int, ...]
    digests: tuple[bytes, ...]
    lanes: tuple[tuple[int, ...], ...]


def gather_reports(report: RankReport | Exception, group: dist.ProcessGroup | None) -> list[RankReport]:
    """The reports of all data-parallel ranks, in rank order.

    Any error on one rank, expected or not, is raised on all: there as it is, elsewhere as a `DataError`
    that names the rank and the cause. So no rank waits for one that will never come.
    """
    if group is None:
        if isinstance(report, Exception):
            raise report
        return [report]
    cause = cause_of(report).encode() if isinstance(report, Exception) else b""
    widest = 0 if isinstance(report, Exception) else max(len(lane) for lane in report.lanes)
    headers = torch.stack(_all_gather(torch.tensor([len(cause), widest]), group))
    longest, width = headers.amax(0).tolist()
    if longest:
        padded = torch.frombuffer(bytearray(cause.ljust(longest)), dtype=torch.uint8)
        causes = [
            item.numpy().tobytes().decode("utf-8", "replace").rstrip() for item in _all_gather(padded, group)
        ]
        if isinstance(report, Exception):
            raise report
        stopped = (f"data-parallel rank {rank}: {text}" for rank, text in enumerate(causes) if text)
        raise DataError("reading stopped. " + "; ".join(stopped))
    if isinstance(report, Exception):
        raise AssertionError("an error always has a cause")
    return [_unpack(flat, len(report.sums), width) for flat in _all_gather(_pack(report, width), group)]


def cause_of(error: Exception) -> str:
    """What another rank says about an error of this one; our own messages need no class name."""
    text = str(error) if isinstance(error, LclError) else f"{type(error).__name__}: {error}"
    return text[:MAX_CAUSE] or type(error).__name__


def _all_gather(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return parts


def _pack(report: RankReport, width: int) -> Tensor:
    """Flat int64: sums, number of rows, then per row the digest, the state's length and the state."""
    values = [*report.sums, len(report.lanes)]
    for digest, lane in zip(report.digests, report.lanes, strict=True):
        values += [int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8)]
        values += [len(lane), *lane, *([0] * (width - len(lane)))]
    return torch.tensor(values, dtype=torch.int64)


def _unpack(flat: Tensor, sums: int, width: int) -> RankReport:
    values: list[int] = flat.tolist()
    digests, lanes = [], []
    for i in range(values[sums]):
        at = sums + 1 + i * (DIGEST_INTEGERS + 1 + width)
        digests.append(b"".join(v.to_bytes(8, "little", signed=True) for v in values[at : at + 2]))
        length = values[at + 2]
        lanes.append(tuple(values[at + 3 : at + 3 + length]))
    return RankReport(tuple(values[:sums]), tuple(digests), tuple(lanes))


def send_step(
    step: StepBatch | Exception, group: dist.ProcessGroup, pixel_ranks: Sequence[int] | None = None
) -> None:
    """Give a step (or the reason why there is none) to the other ranks of the model-parallel group.

    pixel_ranks   which ranks of the group need the images (None: all); the others get [0, 3, H, W]
    """
    if isinstance(step, Exception):
        _broadcast_json({"error": cause_of(step)}, group)
        return
    _broadcast_json(
        {
            "counts": step.counts.__dict__,
            "position": step.position,
            "order_hash": step.order_hash,
            "statistics": step.statistics,
            "micro_batches": [
                {
                    "lengths": batch.lengths,
                    "documents": batch.documents,
                    "shapes": [list(getattr(batch, name).shape) for name in FIELDS],
                }
                for batch in step.micro_batches
            ],
        },
        group,
    )
    integers, pixels = _flatten(step.micro_batches)
    dist.broadcast(integers, group_src=0, group=group)
    if not pixels.numel():
        return
    if pixel_ranks is None:
        dist.broadcast(pixels, group_src=0, group=group)
        return
    for work in [dist.isend(pixels, group_dst=rank, group=group) for rank in pixel_ranks if rank]:
        if work is not None:
            work.wait()


def receive_step(group: dist.ProcessGroup, pixel_ranks: Sequence[int] | None = None) -> StepBatch:
    """The step that rank 0 of the model-parallel group sent; `pixel_ranks` as in `send_step`."""
    header = _broadcast_json(None, group)
    if "error" in header:
        raise DataError(header["error"])
    shapes = [item["shapes"] for item in header["micro_batches"]]
    image_field = FIELDS.index("images")
    wanted = pixel_ranks is None or dist.get_rank(group) in pixel_ranks
    pixel_count = sum(torch.Size(shape[image_field]).numel() for shape in shapes)
    if not wanted:
        for shape in shapes:
            shape[image_field][0] = 0
    sizes = [[torch.Size(shape).numel() for shape in item] for item in shapes]
    pixels = torch.empty(pixel_count if wanted else 0, dtype=torch.uint8)
    integers = torch.empty(sum(map(sum, sizes)) - pixels.numel(), dtype=torch.int64)
    dist.broadcast(integers, group_src=0, group=group)
    if pixels.numel() and pixel_ranks is None:
        dist.broadcast(pixels, group_src=0, group=group)
    elif pixels.numel():
        dist.recv(pixels, group_src=0, group=group)
    batches = []
    at = {"integers": 0, "pixels": 0}
    for item, item_shapes, item_sizes in zip(header["micro_batches"], shapes, sizes, strict=True):
        fields: dict[str, Any] = {name: tuple(item[name]) for name in ("lengths", "documents")}
        for name, shape, size in zip(FIELDS, item_shapes, item_sizes, strict=True):
            kind, flat = ("pixels", pixels) if name == "images" else ("integers", integers)
            fields[name] = flat[at[kind] : at[kind] + size].view(shape)
            at[kind] += size
        batches.append(MicroBatch(**fields))
    micro = tuple(tuple(values) for values in header["counts"].pop("micro_contexts"))
    sums = {name: tuple(values) for name, values in header["counts"].items()}
    counts = GlobalCounts(**sums, micro_contexts=micro)
    return StepBatch(
        tuple(batches), counts, header["position"], header["order_hash"], statistics=header["statistics"]
    )


def _flatten(batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor]:
    """All integers of the micro-batches in one tensor, all pixels in another."""
    integers = [getattr(b, name).reshape(-1) for b in batches for name in FIELDS if name != "images"]
    return torch.cat(integers), torch.cat([batch.images.reshape(-1).cpu() for batch in batches])


def _broadcast_json(value: dict[str, Any] | None, group: dist.ProcessGroup) -> dict[str, Any]:
    """Rank 0's value on every rank of the group."""
    content = b"" if value is None else json.dumps(value).encode()
    size = torch.tensor([len(content)])
    dist.broadcast(size, group_src=0, group=group)
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0)
    if value is None:
        flat = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(flat, group_src=0, group=group)
    result: dict[str, Any] = json.loads(flat.numpy().tobytes())
    return result
