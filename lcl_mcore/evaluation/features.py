"""Runs a model over held-out pairs: unit vectors of both sides, and generation losses with other images.

Everything here is one process at tensor-parallel size 1; checkpoints of any layout load into that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.data import SourceConfig
from lcl_mcore.config.run import RunConfig
from lcl_mcore.data.evaluation_data import eval_documents, with_blank_images, with_shuffled_images
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.losses.generation import generation_loss_sum
from lcl_mcore.models.lcl import LclModel

ROWS = 16  # rows per forward pass; images are shuffled within one, so not too few


@dataclass(frozen=True)
class PairFeatures:
    """Row i of both belongs to the i-th document: unit vectors fp32 [n, D] and images uint8 [n, 3, H, W]."""

    image: Tensor
    text: Tensor
    images: Tensor
    documents: tuple[str, ...]


def heldout_batches(
    config: RunConfig, source: SourceConfig, tokenizer: Tokenizer, side: str, limit: int | None = None
) -> Iterator[MicroBatch]:
    """Micro-batches of a held-out source with the image after (`text_first`) or before its text."""
    return eval_documents(
        config.data,
        source,
        tokenizer=tokenizer,
        image_size=config.model.vision.image_size,
        tokens_per_image=config.model.vision.patches,
        micro_batch_size=ROWS,
        image_embeds=side,  # type: ignore[arg-type]
        limit=limit,
    )


@torch.no_grad()
def pair_features(model: LclModel, batches: Iterator[MicroBatch]) -> PairFeatures:
    """Image vectors, and text vectors taken where training takes them: at the `<BoI>` after the text."""
    model.eval()
    device = next(model.parameters()).device
    image_vectors, texts, images = [], [], []
    documents: list[str] = []
    for host in batches:
        batch = host.to(device)
        features, hidden = model(batch)
        image_vectors.append(model.image_embeds(batch, features.vectors).cpu())
        texts.append(model.context_embeds(batch, hidden).cpu())
        images.append(host.images[host.context_images])
        documents.extend(host.documents)
    return PairFeatures(torch.cat(image_vectors), torch.cat(texts), torch.cat(images), tuple(documents))


@torch.no_grad()
def generation_loss(
    model: LclModel,
    batches: Iterator[MicroBatch],
    vocab_size: int,
    change: Callable[[MicroBatch], MicroBatch],
) -> float:
    """Nats per target token over all batches, after `change` has had its way with the images."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for host in batches:
        batch = change(host).to(device)
        _, hidden = model(batch)
        language = model.language
        loss = generation_loss_sum(
            language.targets(hidden, batch.target_positions),
            language.head_weight,
            batch.target_labels,
            vocab_start=language.vocab_range[0],
            vocab_size=vocab_size,
            tp_group=model.tp_group,
        )
        total += float(loss)
        count += len(batch.target_positions)
    return total / max(count, 1)


PICTURES: dict[str, Callable[[MicroBatch], MicroBatch]] = {
    "right": lambda batch: batch,
    "shuffled": with_shuffled_images,
    "none": with_blank_images,
}
"""Ways to give a document its images; the gap between them is what the LM reads from the latents."""
