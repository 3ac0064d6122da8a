"""Held-out retrieval and generation loss while training, on the ranks and with the model at hand.

Data-parallel ranks share the documents; tensor-parallel ranks compute together. A stop signal ends it at the next
micro-batch on all ranks together, and training then stops as it always does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.data import SourceConfig
from lcl_mcore.config.run import RunConfig
from lcl_mcore.data.evaluation_data import eval_documents
from lcl_mcore.data.tokenizer import Tokenizer, build_tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.evaluation.retrieval import recall_at
from lcl_mcore.losses.generation import generation_loss_sum
from lcl_mcore.metrics import RunLog, read_metrics
from lcl_mcore.models.lcl import LclModel

FILE = "evaluation.jsonl"


@dataclass
class PeriodicEvaluation:
    """Called by the training loop; does nothing at steps that are not due."""

    config: RunConfig
    context: Context
    tokenizer: Tokenizer

    def due(self, step: int) -> bool:
        """Whether an evaluation follows `step` steps done."""
        every = self.config.evaluation.every
        return every > 0 and step % every == 0

    def run(self, model: LclModel, step: int, stop: Callable[[], bool], log: RunLog) -> bool:
        """Evaluate after `step` steps; all ranks together. Returns whether a stop request cut it short."""
        model.eval()
        try:
            numbers = self._numbers(model, stop)
        finally:
            model.train()
        if numbers is None:
            log.info(f"evaluation after step {step} cut short by a stop request")
            return True
        if log.enabled:
            record = {"step": step, **numbers}
            write_record(self.context.run_folder / FILE, record)
            if log.board is not None:
                for name, value in numbers.items():
                    log.board.add_scalar(f"heldout/{name}", value, step)
            log.info(
                f"held-out   step {step}  R@1 {numbers['R@1']:.3f}  R@5 {numbers['R@5']:.3f} of {numbers['images']}"
                f"  generation {numbers['generation']:.4f}"
            )
        return False

    @torch.no_grad()
    def _numbers(self, model: LclModel, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Retrieval over documents with the text first, nats per token with the image first."""
        groups, device = self.context.groups, self.context.device.device
        width = self.config.model.language.width
        images, texts = [torch.zeros(0, width, device=device)], [torch.zeros(0, width, device=device)]
        for host in self._together("text_first", stop):
            if host is None:
                return None
            batch = host.to(device)
            features, hidden = model(batch)
            images.append(model.image_embeds(batch, features.vectors))
            texts.append(model.context_embeds(batch, hidden))
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for host in self._together("image_first", stop):
            if host is None:
                return None
            batch = host.to(device)
            _, hidden = model(batch)
            language = model.language
            sums[0] += generation_loss_sum(
                language.targets(hidden, batch.target_positions),
                language.head_weight,
                batch.target_labels,
                vocab_start=language.vocab_range[0],
                vocab_size=self.config.model.language.vocab_size,
                tp_group=groups.tp,
            )
            sums[1] += len(batch.target_positions)
        dist.all_reduce(sums, group=groups.dp)
        image, text = (gather_rows(torch.cat(side), groups.dp).cpu() for side in (images, texts))
        recall = recall_at(image, text, (1, 5))
        return {
            "images": recall.candidates,
            "R@1": recall.mean(1),
            "R@5": recall.mean(5),
            "generation": float(sums[0] / sums[1].clamp(min=1)),
        }

    def _together(self, side: str, stop: Callable[[], bool]) -> Iterator[MicroBatch | None]:
        """This rank's micro-batches while any rank has some; None, and the end, when any rank was told to stop."""
        groups, model = self.context.groups, self.config.model.vision
        documents = eval_documents(
            self.config.data,
            SourceConfig(path=self.config.evaluation.data, max_images=1000),
            tokenizer=self.tokenizer,
            image_size=model.image_size,
            tokens_per_image=model.patches,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            image_embeds=side,  # type: ignore[arg-type]
            limit=self.config.evaluation.limit,
        )
        while True:
            batch = next(documents, None)
            asked = torch.tensor([float(stop()), float(batch is not None)])
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=groups.host_control)
            if asked[0]:
                yield None
                return
            if not asked[1]:
                return
            if batch is not None:
                yield batch


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' rows [n_r, D] end to end in rank order."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    sizes = [int(c) for c in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Append a line; lines of the same or later steps, lost with a crash, are replaced."""
    kept = [line for line in read_metrics(path) if line["step"] < record["step"]]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in [*kept, record]), encoding="utf-8")
    partial.replace(path)


def periodic_evaluation(config: RunConfig, context: Context) -> PeriodicEvaluation | None:
    """What the configuration asks for, if anything."""
    if not config.evaluation.every:
        return None
    return PeriodicEvaluation(config, context, build_tokenizer(config.data.tokenizer))
