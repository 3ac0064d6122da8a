"""What data-parallel and model-parallel ranks tell each other about a step.

Both functions run in the loader's own thread, on gloo groups that nothing else uses. Python objects travel
through torch's object collectives (pickle: the senders are ranks of this job), tensors as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_mcore.batch import MicroBatch, StepBatch
from lcl_mcore.errors import DataError, LclError

MAX_CAUSE = 4000  # characters of an error that travel
INTEGER_FIELDS = tuple(
    name for name, kind in MicroBatch.__annotations__.items() if kind == "Tensor" and name != "images"
)


@dataclass(frozen=True)
class RankReport:
    """What one data-parallel rank reports of its sequences of a step.

    Attributes:
        sums: images, contexts, targets, tokens, attention pairs, failed images; then the contexts of each
            micro-batch.
        digests: 16 bytes per sequence.
        states: state of each sample stream after the step, as plain integers.
    """

    sums: tuple[int, ...]
    digests: tuple[bytes, ...]
    states: tuple[tuple[int, ...], ...]


def gather_reports(report: RankReport | Exception, group: dist.ProcessGroup | None) -> list[RankReport]:
    """The reports of all data-parallel ranks, in rank order.

    Any error on one rank, expected or not, is raised on all, so that no rank waits for one that will never
    come.

    Raises:
        Exception: `report` itself, where it is one.
        DataError: on the other ranks; it names the failed rank and the cause.
    """
    if group is None:
        if isinstance(report, Exception):
            raise report
        return [report]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, cause_of(report) if isinstance(report, Exception) else report, group=group)
    if isinstance(report, Exception):
        raise report
    causes = [f"data-parallel rank {rank}: {cause}" for rank, cause in enumerate(gathered) if isinstance(cause, str)]
    if causes:
        raise DataError("reading stopped. " + "; ".join(causes))
    return gathered


def cause_of(error: Exception) -> str:
    """What another rank says about an error of this one; our own messages need no class name."""
    text = str(error) if isinstance(error, LclError) else f"{type(error).__name__}: {error}"
    return text[:MAX_CAUSE] or type(error).__name__


def send_step(step: StepBatch | Exception, group: dist.ProcessGroup, pixel_ranks: Sequence[int] | None = None) -> None:
    """Give a step (or the reason why there is none) to the other ranks of the model-parallel group.

    Args:
        step: the step, or the error that took its place.
        group: ranks of this data-parallel index; its rank 0 sends.
        pixel_ranks: which ranks of the group need the images (None: all); the others get [0, 3, H, W].
    """
    if isinstance(step, Exception):
        dist.broadcast_object_list([cause_of(step)], group_src=0, group=group)
        return
    # Everything but the numbers: tensors on the meta device keep shape and type without content.
    outline = replace(step, micro_batches=tuple(batch.to(torch.device("meta")) for batch in step.micro_batches))
    dist.broadcast_object_list([outline], group_src=0, group=group)
    integers = [getattr(batch, name).reshape(-1) for batch in step.micro_batches for name in INTEGER_FIELDS]
    dist.broadcast(torch.cat(integers), group_src=0, group=group)
    pixels = torch.cat([batch.images.reshape(-1).cpu() for batch in step.micro_batches])
    if not pixels.numel():
        return
    if pixel_ranks is None:
        dist.broadcast(pixels, group_src=0, group=group)
        return
    for work in [dist.isend(pixels, group_dst=rank, group=group) for rank in pixel_ranks if rank]:
        if work is not None:
            work.wait()


def receive_step(group: dist.ProcessGroup, pixel_ranks: Sequence[int] | None = None) -> StepBatch:
    """The step that rank 0 of the model-parallel group sent; `pixel_ranks` as in `send_step`.

    Raises:
        DataError: the sender had an error; it carries the sender's message.
    """
    received: list[Any] = [None]
    dist.broadcast_object_list(received, group_src=0, group=group)
    outline = received[0]
    if isinstance(outline, str):
        raise DataError(outline)
    wanted = pixel_ranks is None or dist.get_rank(group) in pixel_ranks
    shapes = [{name: getattr(batch, name).shape for name in INTEGER_FIELDS} for batch in outline.micro_batches]
    integers = torch.empty(sum(s.numel() for item in shapes for s in item.values()), dtype=torch.int64)
    dist.broadcast(integers, group_src=0, group=group)
    pixel_count = sum(batch.images.numel() for batch in outline.micro_batches)
    pixels = torch.empty(pixel_count if wanted else 0, dtype=torch.uint8)
    if pixels.numel() and pixel_ranks is None:
        dist.broadcast(pixels, group_src=0, group=group)
    elif pixels.numel():
        dist.recv(pixels, group_src=0, group=group)
    flat = list(integers.split([s.numel() for item in shapes for s in item.values()]))
    images = pixels.split([batch.images.numel() if wanted else 0 for batch in outline.micro_batches])
    batches = []
    for batch, item, part in zip(outline.micro_batches, shapes, images, strict=True):
        fields: dict[str, Tensor] = {name: flat.pop(0).view(shape) for name, shape in item.items()}
        shape = batch.images.shape if wanted else (0, *batch.images.shape[1:])
        batches.append(replace(batch, **fields, images=part.view(shape)))
    return replace(outline, micro_batches=tuple(batches))
