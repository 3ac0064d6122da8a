"""Parameters and model FLOPs of a configuration, exactly and without building it, and the MFU that they give.

What counts as a FLOP: the multiplications and additions of matmuls (2 per multiply-add), as in torch's
`FlopCounterMode`; norms, activations, softmax and embedding look-ups do not count. Counted is what the model needs, not
what an implementation spends: no padding, no padded vocabulary rows, no recompute. Causal attention counts the pairs
(query, key) that its mask keeps, L (L + 1) / 2 for a segment of length L. Backward costs twice forward, except that
pixels need no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lcl_mcore.config.schema import LanguageConfig, ModelConfig, RunConfig, VisionConfig
from lcl_mcore.hardware import measured_peak, peak_flops

if TYPE_CHECKING:
    import torch

    from lcl_mcore.batch import MicroBatch, StepBatch
    from lcl_mcore.distributed.device import Device


def _block_parameters(width: int, mlp_width: int) -> int:
    norms = 4 * width
    attention = 4 * width * width + 4 * width
    return norms + attention + 2 * width * mlp_width + mlp_width + width


def _vision_parameters(shape: VisionConfig) -> int:
    w = shape.width
    embeddings = 3 * shape.patch_size**2 * w + shape.tokens * w + (w if shape.class_token else 0)
    block = _block_parameters(w, shape.mlp_width) + (0 if shape.layer_scale is None else 2 * w)
    return embeddings + shape.layers * block + (4 * w if shape.pre_norm else 2 * w)


def _language_parameters(shape: LanguageConfig) -> int:
    """Embeddings, blocks and the final norm."""
    embeddings = (shape.vocab_size + shape.max_positions + shape.position_offset) * shape.width
    return embeddings + shape.layers * _block_parameters(shape.width, shape.mlp_width) + 2 * shape.width


def parameter_counts(shape: ModelConfig) -> dict[str, int]:
    """Parameters by component; the padding rows of the vocabulary are not counted.

    The components of the released code: its text tower is `language_model` plus `context_projection`, its
    `lm_head` is `output_head` (which a tied model does not have).
    """
    h, d, language = shape.vision.width, shape.language.width, shape.language
    head = 2 * d if language.separate_norms else 0
    return {
        "vision_encoder": _vision_parameters(shape.vision),
        "pool_and_projector": 7 * h + 3 * (h * d + d) + d * d,
        "language_model": _language_parameters(language),
        "context_projection": d * d,
        "output_head": head + (0 if language.tied_head else language.vocab_size * d),
        "temperature": 1,
    }


@dataclass(frozen=True)
class FlopRates:
    """Forward FLOPs of one unit of each kind.

    Attributes:
        image: one image through the encoder, as a key and a value of the pool, and through the projector.
        patches: the part of `image` spent on the patch embedding, whose input has no gradient.
        encoder_call: one call of the encoder: the pool's query is the same for all images.
        token: one LM position, without attention.
        pair: one (query, key) pair of the LM's attention, over all layers.
        context: the embedding of one image's context.
        target: the vocabulary logits of one target.
        logit: one entry of the contrastive similarity matrix, which serves both directions.
    """

    image: int
    patches: int
    encoder_call: int
    token: int
    pair: int
    context: int
    target: int
    logit: int


def flop_rates(shape: ModelConfig) -> FlopRates:
    """FLOPs per unit of work of a model."""
    vision, language = shape.vision, shape.language
    h, d, p, s = vision.width, language.width, vision.patches, vision.tokens
    patches = 2 * p * 3 * vision.patch_size**2 * h
    block = s * (8 * h * h + 4 * h * vision.mlp_width) + 4 * s * s * h
    pool = 2 * p * 2 * h * d + 4 * p * d + 2 * (p + 1) * d * d  # keys and values, attention, output matrix
    return FlopRates(
        image=patches + vision.layers * block + pool,
        patches=patches,
        encoder_call=2 * h * d,
        token=language.layers * (8 * d * d + 4 * d * language.mlp_width),
        pair=language.layers * 4 * d,
        context=2 * d * d,
        target=2 * d * language.vocab_size,
        logit=2 * d,
    )


def attention_pairs(lengths: Sequence[int], causal: bool = True) -> int:
    """(query, key) pairs within segments of these lengths; `causal=False` counts the full squares."""
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def step_flops(
    shape: ModelConfig,
    *,
    images: int,
    tokens: int,
    pairs: int,
    contexts: int,
    targets: int,
    logits: int | None = None,
    encoder_calls: int = 1,
    forward_only: bool = False,
) -> int:
    """Model FLOPs of a batch, forward and backward, from integers known on the host.

    Args:
        images: images encoded.
        tokens: LM positions, image latents included, padding not.
        pairs: (query, key) pairs of the LM's attention, see `attention_pairs`.
        contexts: images in the contrastive loss.
        targets: positions in the generation loss.
        logits: entries of the contrastive matrix if it is not `contexts` squared.
        encoder_calls: micro-batches of all data-parallel ranks; matters for the pool's query only.
        forward_only: leave backward out.
    """
    rates = flop_rates(shape)
    forward = (
        images * rates.image
        + encoder_calls * rates.encoder_call
        + tokens * rates.token
        + pairs * rates.pair
        + contexts * rates.context
        + targets * rates.target
        + (contexts * contexts if logits is None else logits) * rates.logit
    )
    return forward if forward_only else 3 * forward - images * rates.patches


def document_lengths(batch: MicroBatch) -> list[int]:
    """Lengths of the segments that hold a target: the others are padding. `batch` is on the host."""
    import torch

    ends = torch.tensor(batch.lengths).cumsum(0)
    segments = torch.searchsorted(ends, batch.target_positions, right=True)
    filled = torch.bincount(segments, minlength=len(batch.lengths)) > 0
    return [n for n, real in zip(batch.lengths, filled.tolist(), strict=True) if real]


def batch_flops(config: RunConfig, batch: StepBatch, repeat: float = 1.0) -> int:
    """Model FLOPs of a whole global batch, forward and backward, from its counts of all data-parallel ranks.

    Args:
        config: of the run.
        batch: one data-parallel rank's share. Without a count of attention pairs (hand-made batches), all ranks are
            taken at this rank's pairs per token.
        repeat: how many times as many micro-batches the step has as `batch`.
    """

    def total(values: Sequence[int]) -> int:
        return round(sum(values) * repeat)

    counts = batch.counts
    pairs = total(counts.pairs)
    if not counts.pairs:
        own = [n for micro in batch.micro_batches for n in document_lengths(micro)]
        pairs = round(attention_pairs(own) * total(counts.tokens) / sum(own)) if own else 0
    contexts = total(counts.contexts)
    logits = contexts * contexts
    if config.loss.negatives == "micro_batch" and counts.micro_contexts:
        logits = total([sum(ranks) ** 2 for ranks in counts.micro_contexts])
    return step_flops(
        config.model,
        images=total(counts.images),
        tokens=total(counts.tokens),
        pairs=pairs,
        contexts=contexts,
        targets=total(counts.targets),
        logits=logits,
        encoder_calls=round(len(batch.micro_batches) * repeat) * len(counts.images),
    )


class MfuMeter:
    """Model FLOPs utilisation of a run; costs well under a millisecond per step, on the host.

    The rate of reference is a data sheet's where the device is known. Otherwise it is measured once at start, by all
    processes at the same time, as they share the machine's cores; such a figure says how close the run comes to this
    machine's matmuls, not to what is printed on its box.
    """

    def __init__(self, config: RunConfig, device: Device, dtype: torch.dtype, world_size: int) -> None:
        """Look the reference rate up, or measure it.

        Args:
            config: of the run.
            device: where the run computes.
            dtype: of the matmuls.
            world_size: processes of the job.
        """
        self.config, self.world_size = config, world_size
        self.peak = peak_flops(device.name, config.train.precision) or measured_peak(device, dtype)

    def mfu(self, batch: StepBatch, seconds: float) -> float:
        """Share of the reference rate that a step of this length reached."""
        return batch_flops(self.config, batch) / (seconds * self.world_size * self.peak.flops)

    def describe(self) -> str:
        """One line for the log."""
        return f"MFU relative to {self.peak.flops / 1e12:.4g} TFLOP/s per process ({self.peak.source})"


def describe_model(config: RunConfig) -> dict[str, Any]:
    """Sizes and costs of a run's model, as plain JSON types, without building it."""
    shape, length = config.model, config.data.sequence_length
    parameters, rates = parameter_counts(shape), flop_rates(shape)
    # A full sequence that is one document; shorter documents attend to less.
    attention = rates.pair * attention_pairs([length]) / length
    return {
        "recipe": config.recipe,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "tokens_per_image": {
            "encoder": shape.vision.tokens,
            "language_model": shape.vision.patches,
            "with_markers": shape.vision.patches + 2,
        },
        "sequence_length": length,
        "forward_flops": {
            "per_image": rates.image,
            "per_lm_token": rates.token,
            "per_lm_token_attention_in_full_sequence": attention,
            "per_context": rates.context,
            "per_target": rates.target,
        },
        "training_flops": {
            "per_image": 3 * rates.image - rates.patches,
            "per_lm_token": 3 * rates.token,
            "per_lm_token_attention_in_full_sequence": 3 * attention,
            "per_context": 3 * rates.context,
            "per_target": 3 * rates.target,
        },
    }
