"""The LCL model: vision encoder, attention pool with projector, causal LM, temperature.

Shape legend
    t   packed positions;  n  images;  m  images with a context;  k  targets;  D  LM width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.groups import Groups
from lcl_mcore.models.attention import make_segments
from lcl_mcore.models.backends import Backends
from lcl_mcore.models.language import EmbeddingInput, LanguageModel
from lcl_mcore.models.stages import split_stages, stage_of
from lcl_mcore.models.transformer_config import language_transformer_config, vision_transformer_config
from lcl_mcore.models.vision import AttentionPool, VisionEncoder
from lcl_mcore.rng import key63

# Temperature of CLIP and of the released code: exp(s) starts at 1 / 0.07 and stays within [1, 100].
INITIAL_LOG_SCALE = math.log(1 / 0.07)
LOG_SCALE_RANGE = (0.0, math.log(100.0))


@dataclass(frozen=True)
class ImageFeatures:
    """vectors [n, D]: pooled, not normalised; latents [n, P, D]: what the LM reads. n may be 0."""

    vectors: Tensor
    latents: Tensor


def l2_normalize(x: Tensor) -> Tensor:
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


def image_multiple(tokens: int, shares: int, token_multiple: int) -> int:
    """What the number of images is filled up to a multiple of, so that each of `shares` tensor-parallel ranks has whole
    images and a multiple of `token_multiple` tokens.

    Args:
        tokens: of an image in the encoder.
    """
    return shares * token_multiple // math.gcd(tokens, token_multiple)


class LclModel(MegatronModule):
    """LCL, or the part of it that stands on one pipeline stage.

    The ViT, the pool and the embeddings are on the first stage, the temperature and what the losses need on
    the last, the LM's blocks on all. The trainer calls the parts in turn (`encode_images`, `forward_language`,
    `image_embeds`, `context_embeds`), so that it can start the gathers of the contrastive loss between them.

    Args:
        groups: the process groups of this rank; where every TP rank holds the whole ViT, it gets `groups.vision`.
        device: where the parameters are made.
        backends: which implementation serves each part.
    """

    model_type = ModelType.encoder_or_decoder  # what megatron's schedule asks for

    def __init__(self, config: RunConfig, groups: Groups, device: torch.device, backends: Backends) -> None:
        stage_layers = split_stages(config)
        language_config = language_transformer_config(
            config, device, stage_layers, gradient_accumulation_fusion=backends.gradient_accumulation_fusion
        )
        super().__init__(config=language_config)
        self.shape, self.tp_group = config.model, groups.tp
        self.token_multiple = config.train.token_multiple
        self.vision_data = config.resolved_vision_parallel == "data" and config.parallel.tensor_parallel_size > 1
        """Every TP rank holds the whole ViT and encodes a share of the images."""
        self.stage_layers = stage_layers
        self.stage = stage_of(stage_layers, groups.pp.rank() if len(stage_layers) > 1 else 0)
        if self.stage.last:
            # First of all modules: where the rest is bf16, megatron's distributed optimizer lists fp32
            # parameters before the others of their group, and its index of saved state follows the model's order.
            self.temperature = Temperature(device)
        if self.stage.first:
            vision_config = vision_transformer_config(config, device)
            vision_groups = groups.vision if self.vision_data else groups.megatron
            self.vision = VisionEncoder(vision_config, self.shape.vision, backends.layers, vision_groups)
            self.pool = AttentionPool(vision_config, self.shape, vision_groups)
            if self.vision_data:
                for parameter in self.vision_parameters():
                    parameter.tensor_model_parallel = False  # type: ignore[attr-defined]  # each rank has all of it
        self.language = LanguageModel(
            language_config, self.shape.language, backends.layers, groups.megatron, self.stage
        )
        self.received: Tensor | None = None

    def vision_parameters(self) -> list[nn.Parameter]:
        """Parameters of the ViT and the pool; none on later stages."""
        return [*self.vision.parameters(), *self.pool.parameters()] if self.stage.first else []

    def canonical_name(self, name: str) -> str:
        """The name that a parameter of this stage has in the model on one stage."""
        prefix = "language.blocks.layers."
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            return f"{prefix}{int(index) + self.stage.layers.start}.{rest}"
        if name == "language.head" and self.shape.language.tied_head:
            return "language.token_embedding.weight"
        return name

    def encode_images(self, images: Tensor, keys: Tensor, seed: int) -> ImageFeatures:
        """images uint8 [n, 3, H, W], keys int64 [n] -> features of the n images, on every TP rank.

        The encoder always sees at least one image, and whole shares where the TP ranks split the images, so
        that every rank takes part in every collective and every parameter gets a gradient; what was added
        is cut off again and receives none.
        """
        n = images.shape[0]
        shares = self.tp_group.size() if self.config.sequence_parallel or self.vision_data else 1
        multiple = image_multiple(self.shape.vision.tokens, shares, self.token_multiple)
        missing = max(-(-n // multiple), 1) * multiple - n
        if missing:
            images = torch.cat((images, images.new_zeros(missing, *images.shape[1:])))
            keys = torch.cat((keys, keys.new_zeros(missing)))
        if self.vision_data:
            start, share = self.tp_group.rank() * (len(keys) // shares), len(keys) // shares
            images, keys = images.narrow(0, start, share), keys.narrow(0, start, share)
        features = self.pool(self.vision(images, keys, key63(seed, "vision")))  # [n, 1 + P, D]
        if self.vision_data:  # the LM reads them on every rank alike: the gradient is split, not summed
            features = gather_from_sequence_parallel_region(
                features, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return ImageFeatures(features[:n, 0], features[:n, 1:])

    def forward_language(
        self, batch: MicroBatch, x: Tensor, sequence_keys: tuple[int, ...], seed: int, *, received: bool = False
    ) -> Tensor:
        """Run this stage's part of the LM over a micro-batch.

        Args:
            x: latents [n, P, D] for the image placeholders; with `received`, what the stage before returned.

        Returns:
            Hidden [t, D] on the last stage, else what the next stage takes.
        """
        segments = make_segments(
            batch.lengths, batch.tokens.device, sequence_keys=sequence_keys, seed=key63(seed, "language")
        )
        if received:
            return self.language(x, segments)
        start = EmbeddingInput(batch.tokens, batch.positions, x, batch.image_starts)
        return self.language(start, segments)

    def image_embeds(self, batch: MicroBatch, vectors: Tensor) -> Tensor:
        """Unit vectors of the images that have a context: vectors [n, D] -> [m, D] fp32."""
        return l2_normalize(vectors.index_select(0, batch.context_images))

    def context_embeds(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        """Unit vectors of what precedes those images, the LM at their `<BoI>`: hidden [t, D] -> [m, D] fp32."""
        return l2_normalize(self.language.contexts(hidden, batch.context_positions))

    def forward(self, batch: MicroBatch, seed: int = 0) -> tuple[ImageFeatures, Tensor]:
        """Image features and LM hidden states [t, D] of a micro-batch on the device."""
        sequence_keys = tuple(range(len(batch.sequence_keys)))
        features = self.encode_images(batch.images, batch.image_keys, seed)
        return features, self.forward_language(batch, features.latents, sequence_keys, seed)

    # --- what megatron's schedule and its gradient finalizer ask of a stage ---

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Take what the stage before sent: [stream], or [None] on the first stage."""
        self.received = tensors[0]

    @property
    def pre_process(self) -> bool:
        return self.stage.first

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        return self.shape.language.tied_head

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """This stage's copy of the tied matrix."""
        return self.language.token_embedding.weight if self.stage.first else self.language.head
