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

from lcl_mcore.data.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.errors import DataError

DIGEST_INTEGERS = 2  # a row's digest: 16 bytes
FIELDS = tuple(name for name, kind in MicroBatch.__annotations__.items() if kind == "Tensor")


@dataclass(frozen=True)
class RankReport:
    """What one data-parallel rank reports of its rows: sums, one digest and one lane state per row."""

    sums: tuple[int, ...]
    digests: tuple[bytes, ...]
    lanes: tuple[tuple[int, ...], ...]


def gather_reports(report: RankReport | DataError, group: dist.ProcessGroup | None) -> list[RankReport]:
    """The reports of all data-parallel ranks, in rank order. An error on one rank is raised on all."""
    if group is None:
        if isinstance(report, DataError):
            raise report
        return [report]
    widest = 0 if isinstance(report, DataError) else max(len(lane) for lane in report.lanes)
    header = torch.tensor([int(isinstance(report, DataError)), widest])
    headers = _all_gather(header, group)
    stopped = [rank for rank, item in enumerate(headers) if item[0]]
    if isinstance(report, DataError):
        raise report
    if stopped:
        raise DataError(f"data-parallel ranks {stopped}: reading stopped. Their own messages say why.")
    width = max(int(item[1]) for item in headers)
    return [_unpack(flat, len(report.sums), width) for flat in _all_gather(_pack(report, width), group)]


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


def send_step(step: StepBatch | DataError, group: dist.ProcessGroup) -> None:
    """Give a step (or the reason why there is none) to the other ranks of the model-parallel group."""
    if isinstance(step, DataError):
        _broadcast_json({"error": str(step)}, group)
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
    for flat in (integers, pixels):
        if flat.numel():
            dist.broadcast(flat, group_src=0, group=group)


def receive_step(group: dist.ProcessGroup) -> StepBatch:
    """The step that rank 0 of the model-parallel group sent."""
    header = _broadcast_json(None, group)
    if "error" in header:
        raise DataError(header["error"])
    shapes = [item["shapes"] for item in header["micro_batches"]]
    sizes = [[torch.Size(shape).numel() for shape in item] for item in shapes]
    image_field = FIELDS.index("images")
    pixels = torch.empty(sum(item[image_field] for item in sizes), dtype=torch.uint8)
    integers = torch.empty(sum(map(sum, sizes)) - pixels.numel(), dtype=torch.int64)
    for flat in (integers, pixels):
        if flat.numel():
            dist.broadcast(flat, group_src=0, group=group)
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
