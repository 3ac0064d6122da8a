"""Retrieval transfer (paper appendix A.2): a new text encoder and a new attention pool, trained contrastively.

Shape legend
    n  pairs;  P  patch tokens;  h  encoder width;  D  width of the shared space
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lcl_kernels import infonce
from torch import Tensor

from lcl_mcore.config.evaluation import RetrievalConfig
from lcl_mcore.config.model import ModelConfig
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.evaluation.captioned import CHUNK, CaptionDataset, chance, flat, recalls, text_rows
from lcl_mcore.evaluation.loading import LoadedModel
from lcl_mcore.evaluation.probe import fit_head
from lcl_mcore.evaluation.transfer import (
    Encoder,
    TransferHead,
    compare,
    draw_captions,
    learning,
    step_seed,
    token_source,
)
from lcl_mcore.models.lcl import Temperature, l2_normalize
from lcl_mcore.models.transformer_config import vision_transformer_config
from lcl_mcore.models.vision import AttentionPool
from lcl_mcore.rng import key_of


class DualEncoder(TransferHead):
    """Patch tokens and texts to one space, all new: pool, causal text encoder, temperature.

    The pool's output matrix and the LM's context projection are the linear layers of the two sides.
    """

    def __init__(
        self, shape: ModelConfig, width: int, context: Context, tokenizer: Tokenizer, config: RetrievalConfig
    ) -> None:
        super().__init__(replace(shape, vision=replace(shape.vision, width=width, heads=1)), context)
        self.tokenizer, self.room = tokenizer, min(config.text_tokens, shape.language.max_positions)
        self.temperature = Temperature(self.device)
        vision = vision_transformer_config(self.config, self.device)
        self.pool = AttentionPool(vision, self.shape, self.groups)
        self.draw(key_of(config.seed, "two towers"))

    def image_vectors(self, tokens: Tensor) -> Tensor:
        """[n, P, h] -> unit vectors fp32 [n, D]."""
        return l2_normalize(self.pool(tokens.reshape(-1, 1, tokens.shape[-1]))[:, 0])

    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """The LM's state at each text's last token, the end mark: unit vectors fp32 [n, D]."""
        rows = text_rows(self.tokenizer, texts, self.room, self.tokenizer.eos)
        none = torch.zeros(0, self.pool.patches, self.shape.language.width, device=self.device)
        hidden = self.forward_language(rows, none, torch.zeros(0, dtype=torch.int64))
        return l2_normalize(self.language.contexts(hidden, rows.last.to(hidden.device)))


Side = Callable[[int], Tensor]
"""Part of a batch -> its vectors."""


def contrastive_backward(image: Side, text: Side, parts: int, scale: Callable[[], Tensor]) -> Tensor:
    """Loss of a batch that is computed in parts, and its exact gradient.

    With several parts all vectors come first, without graphs; then each part is computed again and receives
    the gradient of its vectors (GradCache, arXiv:2101.06983). A part must give the same vectors both times.
    """
    if parts == 1:
        loss = infonce(image(0), text(0), scale())
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        pieces = [(image(part), text(part)) for part in range(parts)]
    images = torch.cat([one for one, _ in pieces]).requires_grad_()
    texts = torch.cat([two for _, two in pieces]).requires_grad_()
    loss = infonce(images, texts, scale())
    loss.backward()
    assert images.grad is not None
    assert texts.grad is not None
    start = 0
    for part, (one, _) in enumerate(pieces):
        rows = slice(start, start + len(one))
        torch.autograd.backward((image(part), text(part)), (images.grad[rows], texts.grad[rows]))
        start = rows.stop
    return loss.detach()


def train_towers(
    towers: DualEncoder,
    encoder: Encoder,
    train: CaptionDataset,
    config: RetrievalConfig,
    note: Callable[[str], None] = lambda line: None,
) -> float:
    """Train new parts and, unless it is frozen, the encoder; mean loss of the last tenth of the steps, nats."""
    tokens = token_source(encoder, train, config.cache_mb)

    def backward(indices: Tensor, step: int) -> Tensor:
        towers.temperature.clamp()
        texts = draw_captions(train, indices, step_seed(config, step))
        parts = indices.split(config.chunk_size)
        chosen = [texts[i : i + config.chunk_size] for i in range(0, len(texts), config.chunk_size)]
        return contrastive_backward(
            lambda part: towers.image_vectors(tokens(parts[part], step_seed(config, step, part))),
            lambda part: towers.text_vectors(chosen[part]),
            len(parts),
            towers.temperature,
        )

    groups = [(list(towers.parameters()), 1.0), (encoder.parameters, config.encoder_lr / config.lr)]
    with learning(encoder):
        return fit_head(backward, groups, len(train), config.steps, config, note)


@torch.no_grad()
def score_towers(towers: DualEncoder, encoder: Encoder, test: CaptionDataset) -> dict[str, float]:
    """TR@k and IR@k."""
    texts, owner = flat(test)
    images = [
        towers.image_vectors(encoder.encode(test.fetch(part.tolist()).to(encoder.device), 0)).cpu()
        for part in torch.arange(len(test)).split(CHUNK)
    ]
    written = [towers.text_vectors(texts[i : i + CHUNK]).cpu() for i in range(0, len(texts), CHUNK)]
    return recalls(torch.cat(images), torch.cat(written), owner)


def retrieval_transfer(
    opened: LoadedModel,
    train: CaptionDataset,
    test: CaptionDataset,
    config: RetrievalConfig,
    baselines: bool = True,
) -> dict[str, Any]:
    """TR@k and IR@k after training on `train`, beside the same on untrained encoders and on raw patches."""
    tokenizer = opened.tokenizer()

    def arm(encoder: Encoder) -> dict[str, Any]:
        towers = DualEncoder(opened.config.model, encoder.width, opened.context, tokenizer, config)
        loss = train_towers(towers, encoder, train, config, opened.context.log)
        return {**score_towers(towers, encoder, test), "train_loss": loss}

    result = compare(opened, train, test, config, "retrieval", arm, baselines)
    return {**result, "captions": len(flat(test)[0]), "chance": chance(test)}
