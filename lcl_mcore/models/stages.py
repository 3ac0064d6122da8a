"""Which part of the model stands on which pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.models.flops import flop_rates


@dataclass(frozen=True)
class Stage:
    """One stage of `count`: its LM layers (0-based, of the whole model); the first also has the ViT."""

    index: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        """Embeddings, ViT and pool are here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """The norms and matrices of the losses and the temperature are here."""
        return self.index == self.count - 1


def stage_of(stage_layers: tuple[int, ...], index: int) -> Stage:
    """Stage `index` of a pipeline with these LM layers per stage."""
    start = sum(stage_layers[:index])
    return Stage(index, len(stage_layers), range(start, start + stage_layers[index]))


def split_stages(config: RunConfig) -> tuple[int, ...]:
    """LM layers per pipeline stage: the configured ones, or those that make the slowest stage fastest.

    Counted in forward FLOPs of a sequence that is half image latents: the first stage also encodes those
    images, the last forms the logits of the other half. Every stage after the first has at least one
    layer; among equal splits the one with more layers in front.
    """
    parallel, language = config.parallel, config.model.language
    if parallel.stage_layers is not None:
        return parallel.stage_layers
    stages, layers, length = parallel.pipeline_parallel_size, language.layers, config.data.sequence_length
    if stages == 1:
        return (layers,)
    rates = flop_rates(config.model)
    layer = (length * rates.token + length * length / 2 * rates.pair) / layers
    images = length / 2 / config.model.vision.patches * rates.image
    logits = length / 2 * rates.target

    def slowest(split: tuple[int, ...]) -> float:
        return max(split[0] * layer + images, split[-1] * layer + logits, max(split) * layer)

    splits = [
        (first, *_even(layers - first - last, stages - 2), last)
        for first in range(layers - stages + 1, -1, -1)
        for last in range(1, layers - first - (stages - 2) + 1)
        if stages > 2 or first + last == layers
    ]
    return min(splits, key=slowest)


def _even(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` whole numbers as equal as possible."""
    edges = [-(-total * i // parts) for i in range(parts + 1)] if parts else []
    return tuple(b - a for a, b in pairwise(edges))
