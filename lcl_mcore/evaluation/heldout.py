"""Retrieval and generation loss on held-out documents, of a trained model and during training.

Image vectors and context vectors come from where training takes them: the pool, and the LM at the `<BoI>` after a text.

Shape legend
    n  images with a context;  D  LM width;  H, W  pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import RunConfig, SourceConfig
from lcl_mcore.data.evaluation_data import eval_documents, with_blank_images, with_shuffled_images
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.loader import DataContext
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.distributed.groups import gather_objects
from lcl_mcore.errors import DataError, explain
from lcl_mcore.evaluation.embedding_metrics import chance, recall_at, require_finite
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.losses.generation import generation_loss_sum
from lcl_mcore.metrics import RunLog, StepLines
from lcl_mcore.models.lcl import LclModel

KS = (1, 5)
SEQUENCES = 16
"""In one forward pass; images are shuffled within one, so not too few."""

ImageChange = Callable[[MicroBatch], MicroBatch]
IMAGE_CHANGES: dict[str, ImageChange] = {
    "right": lambda batch: batch,
    "shuffled": with_shuffled_images,
    "none": with_blank_images,
}
"""Which images a document is shown with; the gap between their losses is what the LM reads from the latents."""

Order = Literal["text_first", "image_first"]


# --- what is measured


@dataclass(frozen=True)
class PairEmbeds:
    """Row i of image, text and images belongs to the i-th image with a context.

    Attributes:
        image, text: unit vectors fp32 [n, D] on the CPU.
        images: uint8 [n, 3, H, W].
    """

    image: Tensor
    text: Tensor
    images: Tensor


def heldout_source(path: str) -> SourceConfig:
    """A held-out data set, of whose documents all images are used."""
    return SourceConfig(path=path, max_images=1000)


def heldout_batches(
    config: RunConfig,
    context: Context,
    source: SourceConfig,
    tokenizer: Tokenizer,
    order: Order,
    *,
    micro_batch_size: int = SEQUENCES,
    limit: int | None = None,
) -> Iterator[MicroBatch]:
    """Micro-batches of a held-out source, the image of a pair after or before its text.

    Args:
        context: whose data-parallel ranks share the documents.
        limit: documents used by all ranks together, from the first on.
    """
    return eval_documents(
        config,
        DataContext.of(config, context),
        tokenizer,
        source,
        micro_batch_size=micro_batch_size,
        order=order,
        limit=limit,
    )


@torch.no_grad()
def pair_embeds(model: LclModel, batches: Iterable[MicroBatch]) -> PairEmbeds:
    """Image and context vectors of all images that have a context."""
    device, width = next(model.parameters()).device, model.shape.language.width
    side = model.shape.vision.image_size
    image, text = [torch.zeros(0, width)], [torch.zeros(0, width)]
    images = [torch.zeros(0, 3, side, side, dtype=torch.uint8)]
    for host in batches:
        batch = host.to(device)
        features, hidden = model(batch)
        image.append(model.image_embeds(batch, features.vectors).cpu())
        text.append(model.context_embeds(batch, hidden).cpu())
        images.append(host.images[host.context_images])
    return PairEmbeds(torch.cat(image), torch.cat(text), torch.cat(images))


@torch.no_grad()
def generation_sums(
    model: LclModel, batches: Iterable[MicroBatch], change: ImageChange = IMAGE_CHANGES["right"]
) -> Tensor:
    """Summed cross-entropy in nats and number of target tokens, after `change` was applied to the images: fp64 [2]."""
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    language = model.language
    for host in batches:
        batch = change(host).to(device)
        _, hidden = model(batch)
        sums[0] += generation_loss_sum(
            language.targets(hidden, batch.target_positions),
            language.head_weight,
            batch.target_labels,
            vocab_start=language.vocab_range[0],
            vocab_size=model.shape.language.vocab_size,
            tp_group=model.tp_group,
        )
        sums[1] += len(batch.target_positions)
    return sums


def mean_loss(sums: Tensor) -> float:
    """`generation_sums` -> nats per target token; NaN without targets."""
    return float(sums[0] / sums[1])


def generation_losses(
    loaded: LoadedModel, source: SourceConfig, tokenizer: Tokenizer, changes: Iterable[str]
) -> dict[str, float]:
    """Nats per token of captions that follow their image, for the named `IMAGE_CHANGES`."""
    return {
        name: mean_loss(
            generation_sums(
                loaded.model,
                heldout_batches(loaded.config, loaded.context, source, tokenizer, "image_first"),
                IMAGE_CHANGES[name],
            )
        )
        for name in changes
    }


# --- of a trained model


@dataclass(frozen=True)
class HeldoutResult:
    """Numbers of the trained and of the untrained model; vectors of the trained one, and the text of each."""

    summary: dict[str, Any]
    embeds: PairEmbeds
    captions: tuple[str, ...]


def evaluate_heldout(loaded: LoadedModel, heldout: str) -> HeldoutResult:
    """Retrieval and generation loss over a prepared data set; leaves the model with random weights."""
    config, model, tokenizer = loaded.config, loaded.model, loaded.tokenizer()
    source = heldout_source(heldout)
    embeds = pair_embeds(model, heldout_batches(config, loaded.context, source, tokenizer, "text_first"))
    if not len(embeds.image):
        remedy = "Give documents with text before an image."
        raise DataError(explain(heldout, "no document has an image with a context", remedy))
    generation = generation_losses(loaded, source, tokenizer, IMAGE_CHANGES)
    reset_weights(loaded)
    untrained = pair_embeds(model, heldout_batches(config, loaded.context, source, tokenizer, "text_first"))
    trained, count = _retrieval(embeds), len(embeds.image)
    captions, documents = _captions(loaded, source, tokenizer)
    found = len(NativeDataset(heldout))
    summary = {
        "run": str(loaded.folder),
        "weights": str(loaded.weights),
        "documents": documents,
        "skipped": {"too long for a sequence, or not readable": found - documents} if found > documents else {},
        "steps": loaded.state.step,
        "images_seen": loaded.state.images_seen,
        "heldout": heldout,
        "candidates": count,
        "retrieval": {
            "trained": trained,
            "untrained": _retrieval(untrained),
            "chance": {f"R@{k}": chance(count, k) for k in KS},
        },
        "r5_over_chance": trained["R@5"] / chance(count, 5),
        "generation": generation,
        "hardware": loaded.context.device.name,
    }
    return HeldoutResult(summary, embeds, captions)


def _retrieval(embeds: PairEmbeds) -> dict[str, Any]:
    recall = recall_at(require_finite(embeds.image, "image vectors"), require_finite(embeds.text, "text vectors"), KS)
    return {
        "candidates": recall.images,
        **{f"R@{k}": recall.mean(k) for k in KS},
        **{f"image_to_text_R@{k}": recall.image_to_text[k] for k in KS},
        **{f"text_to_image_R@{k}": recall.text_to_image[k] for k in KS},
    }


def _captions(loaded: LoadedModel, source: SourceConfig, tokenizer: Tokenizer) -> tuple[tuple[str, ...], int]:
    """The text before each image, in the order of `pair_embeds`; and the number of documents."""
    captions: list[str] = []
    documents: set[str] = set()
    for batch in heldout_batches(loaded.config, loaded.context, source, tokenizer, "text_first"):
        documents.update(batch.documents)
        starts = [0]
        for length in batch.lengths:
            starts.append(starts[-1] + length)
        for position in batch.context_positions.tolist():
            start = max(start for start in starts if start <= position)
            captions.append(tokenizer.decode(batch.tokens[start:position].tolist()).strip())
    return tuple(captions), len(documents)


# --- during training

FILE = "evaluation.jsonl"


class _StopRequestedError(Exception):
    """Some rank was asked to end the run."""


class _UnreadableError(Exception):
    """Some rank could not read the held-out documents; the text is its reason."""


@dataclass
class PeriodicEvaluation:
    """Evaluates every so many steps, on the ranks that train and with their model.

    Data-parallel ranks share the documents; tensor-parallel ranks compute together. A stop signal ends it at the next
    micro-batch on all ranks together.
    """

    config: RunConfig
    context: Context
    tokenizer: Tokenizer

    def due(self, step: int) -> bool:
        """Whether an evaluation follows when `step` steps are done."""
        every = self.config.evaluation.every
        return every > 0 and step % every == 0

    def run(self, model: LclModel, step: int, stop: Callable[[], bool], log: RunLog) -> None:
        """Evaluate after `step` steps and log the result; all ranks together."""
        model.eval()
        try:
            numbers = self._numbers(model, stop)
        except _StopRequestedError:
            log.info(f"evaluation after step {step} cut short by a stop request")
            return
        except _UnreadableError as error:
            log.info(f"WARNING evaluation after step {step} skipped, training goes on: {error}")
            return
        finally:
            model.train()
        if not log.enabled:
            return
        lines = StepLines(self.context.run_folder / FILE, log.info)
        lines.rewind(step - 1)
        lines.write({"step": step, **numbers})
        lines.close()
        if log.board is not None:
            log.board.write({"step": step, **{f"heldout/{name}": value for name, value in numbers.items()}})
        log.info(
            f"held-out   step {step}  R@1 {numbers['R@1']:.3f}  R@5 {numbers['R@5']:.3f} of {numbers['images']}"
            f"  generation {numbers['generation']:.4f}"
        )

    def _numbers(self, model: LclModel, stop: Callable[[], bool]) -> dict[str, Any]:
        """Retrieval over documents with the text first, nats per token with the image first."""
        dp = self.context.groups.dp
        own = pair_embeds(model, self._batches("text_first", stop))
        sums = generation_sums(model, self._batches("image_first", stop))
        dist.all_reduce(sums, group=dp)
        ranks: list[tuple[Tensor, Tensor]] = [(own.image, own.text)] * dp.size()
        dist.all_gather_object(ranks, (own.image, own.text), group=dp)
        image, text = (torch.cat(vectors) for vectors in zip(*ranks, strict=True))
        recall = recall_at(image, text, KS)
        return {"images": recall.images, "R@1": recall.mean(1), "R@5": recall.mean(5), "generation": mean_loss(sums)}

    def _batches(self, order: Order, stop: Callable[[], bool]) -> Iterator[MicroBatch]:
        """This rank's micro-batches, as long as any rank has some.

        Raises:
            _StopRequestedError: on all ranks together, when any rank was asked to stop.
            _UnreadableError: likewise, when any rank could not read its documents.
        """
        groups, evaluation = self.context.groups, self.config.evaluation
        batches = heldout_batches(
            self.config,
            self.context,
            heldout_source(evaluation.data),
            self.tokenizer,
            order,
            micro_batch_size=self.config.train.resolved_micro_batch_size,
            limit=evaluation.limit,
        )
        while True:
            batch, problem = None, ""
            try:
                batch = next(batches, None)
            except (DataError, OSError) as error:
                problem = str(error)
            asked = torch.tensor([float(stop()), float(batch is not None), float(problem != "")])
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=groups.host_control)
            if asked[0]:
                raise _StopRequestedError
            if asked[2]:
                raise _UnreadableError(next(filter(None, gather_objects(problem, groups.host_control))))
            if not asked[1]:
                return
            if batch is not None:
                yield batch


def periodic_evaluation(config: RunConfig, context: Context, tokenizer: Tokenizer) -> PeriodicEvaluation | None:
    """What the configuration asks for, if anything."""
    if not config.evaluation.every:
        return None
    return PeriodicEvaluation(config, context, tokenizer)
