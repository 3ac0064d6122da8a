"""The LCL model: vision encoder, attention pool with projector, causal LM, temperature.

Shape legend
    t   packed positions;  n  images;  m  images with a context;  k  targets;  D  LM width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from lcl_mcore.config.model import ModelConfig
from lcl_mcore.data.batch import MicroBatch
from lcl_mcore.models.language import LanguageModel
from lcl_mcore.models.layers import LayerBackend
from lcl_mcore.models.randomness import key_of
from lcl_mcore.models.segments import make_segments
from lcl_mcore.models.transformer_config import (
    Layout,
    language_transformer_config,
    vision_transformer_config,
)
from lcl_mcore.models.vision import AttentionPool, VisionEncoder

# Temperature of CLIP and of the released code: exp(s) starts at 1 / 0.07 and stays within [1, 100].
INITIAL_LOG_SCALE = math.log(1 / 0.07)
LOG_SCALE_RANGE = (0.0, math.log(100.0))


@dataclass(frozen=True)
class ImageFeatures:
    """vectors [n, D]: pooled, not normalised; latents [n, P, D]: what the LM reads. n may be 0."""

    vectors: Tensor
    latents: Tensor


def unit(x: Tensor) -> Tensor:
    """L2-normalise the last dimension in fp32 (released `lcl_model.py:181-199`)."""
    return F.normalize(x.float(), dim=-1)


class Temperature(nn.Module):
    """Learned inverse temperature of the contrastive logits; fp32 in every precision."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), INITIAL_LOG_SCALE, device=device))

    def forward(self) -> Tensor:
        """The scale, fp32 scalar."""
        return self.log_scale.exp().squeeze(0)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the scale in range; called after each optimizer step (released `train.py:187-189`).

        An fp32 parameter shares its storage with the distributed optimizer's master copy, so this
        clamps the master.
        """
        self.log_scale.clamp_(*LOG_SCALE_RANGE)


class LclModel(MegatronModule):
    """All of LCL on one pipeline stage.

    The trainer calls the parts in turn (`encode_images`, `read`, `image_side`, `context_side`), so that it
    can start the gathers of the contrastive loss between them.
    """

    def __init__(
        self, shape: ModelConfig, layout: Layout, backend: LayerBackend, groups: ProcessGroupCollection
    ) -> None:
        config = language_transformer_config(shape.language, layout)
        super().__init__(config=config)
        self.shape, self.layout, self.tp_group = shape, layout, groups.tp
        # First of all modules: where the rest is bf16, megatron's distributed optimizer lists fp32 parameters
        # before the others of their group, and its index of saved state follows the model's order.
        self.temperature = Temperature(layout.device)
        vision_config = vision_transformer_config(shape.vision, layout)
        self.vision = VisionEncoder(vision_config, shape.vision, backend, groups)
        self.pool = AttentionPool(vision_config, shape, groups)
        self.language = LanguageModel(config, shape.language, backend, groups)

    def encode_images(self, images: Tensor, keys: Tensor, seed: int) -> ImageFeatures:
        """images uint8 [n, 3, H, W], keys int64 [n] -> features of the n images, on every TP rank.

        The encoder always sees at least one image, and whole shares under sequence parallelism, so that
        every rank takes part in every collective and every parameter gets a gradient; what was added is
        cut off again and receives none.
        """
        n = images.shape[0]
        multiple = self.tp_group.size() if self.config.sequence_parallel else 1
        if self.layout.fp8:  # its matrix products want token counts that are multiples of 16
            multiple = math.lcm(multiple, 16)
        missing = max(-(-n // multiple), 1) * multiple - n
        if missing:
            images = torch.cat((images, images.new_zeros(missing, *images.shape[1:])))
            keys = torch.cat((keys, keys.new_zeros(missing)))
        vectors, latents = self.pool(self.vision(images, keys, key_of(seed, "vision")))
        return ImageFeatures(vectors[:n], latents[:n])

    def read(self, batch: MicroBatch, latents: Tensor, row_keys: tuple[int, ...], seed: int) -> Tensor:
        """Run the LM over a micro-batch whose image placeholders hold `latents` [n, P, D] -> hidden [t, D]."""
        segments = make_segments(
            batch.lengths, batch.tokens.device, row_keys=row_keys, seed=key_of(seed, "language")
        )
        return self.language(batch.tokens, batch.positions, latents, batch.image_starts, segments)

    def image_side(self, batch: MicroBatch, vectors: Tensor) -> Tensor:
        """Unit vectors of the images that have a context: vectors [n, D] -> [m, D] fp32."""
        return unit(vectors.index_select(0, batch.context_images))

    def context_side(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """Unit vectors of what precedes those images, the LM at their `<BoI>`: hidden [t, D] -> [m, D] fp32."""
        return unit(self.language.contexts(hidden, batch.context_rows))

    def forward(self, batch: MicroBatch, seed: int = 0) -> tuple[ImageFeatures, Tensor]:
        """Image features and LM hidden states [t, D] of a micro-batch on the device."""
        row_keys = tuple(range(len(batch.row_keys)))
        features = self.encode_images(batch.images, batch.image_keys, seed)
        return features, self.read(batch, features.latents, row_keys, seed)
