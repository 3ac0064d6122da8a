"""Small models and hand-made micro-batches for the model's tests."""

from __future__ import annotations

import dataclasses

import torch

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import LanguageConfig, ModelConfig, VisionConfig

Document = tuple[int | str, ...]
"""A document: a number is that many text tokens, "i" an image."""

OPT = ModelConfig(
    vision=VisionConfig(
        image_size=32,
        patch_size=16,
        width=48,
        layers=3,
        heads=4,
        mlp_width=96,
        class_token=False,
        pre_norm=False,
        layer_scale=0.3,
    ),
    language=LanguageConfig(vocab_size=300, width=32, layers=2, heads=4, mlp_width=64, max_positions=64),
    pool_heads=2,
)
CLIP = ModelConfig(
    vision=VisionConfig(image_size=48, patch_size=16, width=32, layers=2, heads=2, mlp_width=128),
    language=LanguageConfig(
        vocab_size=261,
        width=48,
        layers=3,
        heads=2,
        mlp_width=192,
        activation="gelu",
        max_positions=64,
        position_offset=0,
        tied_head=False,
        separate_norms=True,
        init="clip_text",
    ),
    pool_heads=4,
)
SHAPES = {"opt": OPT, "clip": CLIP}


def micro_batch(
    shape: ModelConfig, rows: list[list[Document]], row_length: int = 64, seed: int = 0, context_rule: str = "text"
) -> MicroBatch:
    """Pack documents into rows as the data engine does: begin, text, `<BoI>` P latents `<EoI>`, end, padding.

    The last five ids of the vocabulary are begin, end, placeholder, `<BoI>` and `<EoI>`; padding is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    patches, vocab = shape.vision.patches, shape.language.vocab_size
    begin, end, hole, boi, eoi = range(vocab - 5, vocab)
    tokens: list[int] = []
    positions: list[int] = []
    starts: list[int] = []
    lengths, group_ids = [], []
    context_positions, context_images, target_positions, target_labels = [], [], [], []
    for r, documents in enumerate(rows):
        for d, document in enumerate(documents):
            ids = [begin]
            for piece in document:
                if isinstance(piece, int):
                    ids += torch.randint(1, vocab - 5, (piece,), generator=generator).tolist()
                    continue
                if len(ids) > (1 if context_rule == "text" else 0):
                    context_positions.append(len(tokens) + len(ids))
                    context_images.append(len(starts))
                    group_ids.append(1000 * r + d)
                starts.append(len(tokens) + len(ids) + 1)
                ids += [boi, *([hole] * patches), eoi]
            ids.append(end)
            for i, label in enumerate(ids[1:]):
                if label not in (hole, eoi):
                    target_positions.append(len(tokens) + i)
                    target_labels.append(label)
            tokens += ids
            positions += range(len(ids))
            lengths.append(len(ids))
        padding = (r + 1) * row_length - len(tokens)
        assert padding >= 0, f"row {r} is {-padding} tokens too long"
        if padding:
            tokens += [0] * padding
            positions += range(padding)
            lengths.append(padding)
    size = (len(starts), 3, shape.vision.image_size, shape.vision.image_size)
    as_tensor: dict[str, list[int]] = {
        "tokens": tokens,
        "positions": positions,
        "image_starts": starts,
        "context_positions": context_positions,
        "context_images": context_images,
        "target_positions": target_positions,
        "target_labels": target_labels,
        "image_keys": list(range(len(starts))),
        "sequence_keys": list(range(len(rows))),
        "group_ids": group_ids,
    }
    return MicroBatch(
        lengths=tuple(lengths),
        images=torch.randint(0, 256, size, generator=generator, dtype=torch.uint8),
        **{name: torch.tensor(value, dtype=torch.int64) for name, value in as_tensor.items()},  # type: ignore[arg-type]
    )


def with_rates(shape: ModelConfig, drop_path: float, dropout: float) -> ModelConfig:
    """The same shape with stochastic depth and dropout."""
    return dataclasses.replace(
        shape,
        vision=dataclasses.replace(shape.vision, drop_path=drop_path),
        language=dataclasses.replace(shape.language, dropout=dropout, embedding_dropout=dropout),
    )
