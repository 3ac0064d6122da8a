"""Causal language model over packed sequences in which image latents stand at their placeholders.

In a pipeline each stage holds a share of the blocks; the first also the embeddings, the last what the losses
need. Between stages travels the residual stream, [t / tp under sequence parallelism, 1, D].

Shape legend
    t   positions of all sequences of the micro-batch, end to end;  D  width;  V  padded vocabulary
    n   images;  P  latents per image;  m  images with a context;  k  prediction targets
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lcl_kernels import drop, scatter_image_latents
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lcl_mcore.config.schema import LanguageConfig
from lcl_mcore.models.attention import Segments
from lcl_mcore.models.layers import (
    LayerBackend,
    LayerNorm,
    draw_masks,
    layer_spec,
    parameter_device,
    sequence_row_keys,
    transformer_block,
)
from lcl_mcore.models.linear import TokenEmbedding
from lcl_mcore.models.stages import Stage
from lcl_mcore.models.transformer_config import no_init, without_sequence_parallel
from lcl_mcore.rng import key63


@dataclass(frozen=True)
class EmbeddingInput:
    """What the first stage reads: tokens, positions [t], latents [n, P, D], image_starts [n]."""

    tokens: Tensor
    positions: Tensor
    latents: Tensor
    image_starts: Tensor


class LanguageModel(MegatronModule):
    """Token and position embeddings, causal blocks, and the norms and matrices of the two losses."""

    def __init__(
        self,
        config: TransformerConfig,
        shape: LanguageConfig,
        backend: LayerBackend,
        groups: ProcessGroupCollection,
        stage: Stage,
    ) -> None:
        super().__init__(config=config)
        self.shape, self.tp_group, self.stage, self.elementwise = shape, groups.tp, stage, backend.elementwise
        dense = without_sequence_parallel(config)
        device, dtype = parameter_device(config), config.params_dtype

        def parameter(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, dtype=dtype, device=device))

        if stage.first:
            self.token_embedding = TokenEmbedding(
                shape.padded_vocab_size, shape.width, init_method=no_init, config=dense, tp_group=groups.tp
            )
            self.token_embedding.shared = shape.tied_head and stage.last
            self.position_embedding = parameter(shape.max_positions + shape.position_offset, shape.width)
        specs = [layer_spec(config, backend, "language", i, causal=True, dropout=shape.dropout) for i in stage.layers]
        self.blocks = transformer_block(config, specs, groups)
        self.head: nn.Parameter | None = None
        if stage.last:
            self.norm_final = LayerNorm(dense, shape.width, shape.norm_eps)
            self.norm_head = LayerNorm(dense, shape.width, shape.norm_eps) if shape.separate_norms else None
            # Used as x @ W (released `text_projection`; W2 of paper section 3.2).
            self.context_projection = parameter(shape.width, shape.width)
            if not (shape.tied_head and stage.first):
                self.head = parameter(shape.padded_vocab_size // groups.tp.size(), shape.width)
                self.head.tensor_model_parallel = True  # type: ignore[attr-defined]
                self.head.partition_dim = 0  # type: ignore[attr-defined]
                self.head.partition_stride = 1  # type: ignore[attr-defined]
        if shape.tied_head and stage.count > 1:
            self._share_embedding()

    def _share_embedding(self) -> None:
        """Mark the copies of the tied matrix on the first and last stage for megatron.

        Their gradients are summed over the two stages; a bucket of its own gives both copies the same
        shards; the norm counts one of them.
        """
        if self.stage.first:
            self.token_embedding.weight.shared_embedding = True
        elif self.head is not None:
            self.head.shared_embedding = True  # type: ignore[attr-defined]
            self.head.shared = True  # type: ignore[attr-defined]

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix, [V / tp, D]; on the last stage."""
        return self.token_embedding.weight if self.head is None else self.head

    @property
    def vocab_range(self) -> tuple[int, int]:
        """First and last (exclusive) row of the padded vocabulary on this rank."""
        return VocabUtility.vocab_range_from_global_vocab_size(
            self.shape.padded_vocab_size, self.tp_group.rank(), self.tp_group.size()
        )

    def forward(self, x: EmbeddingInput | Tensor, segments: Segments) -> Tensor:
        """Run this stage's part.

        Args:
            x: embedding input on the first stage, else the stream that the stage before returned.

        Returns:
            Last stage: hidden [t, D] on every TP rank, not normalised, as each loss has its own norm (see
            `contexts` and `targets`). Other stages: the stream for the next.
        """
        stream = self._embed(x, segments) if isinstance(x, EmbeddingInput) else x
        if self.training:
            draw_masks(self.blocks, segments)
        stream = self.blocks(stream, attention_mask=None, packed_seq_params=segments)
        if not self.stage.last:
            return stream
        if self.config.sequence_parallel:
            # What follows is computed on every TP rank alike, so the gradient is split, not summed.
            stream = gather_from_sequence_parallel_region(
                stream, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return stream[:, 0]

    def _embed(self, x: EmbeddingInput, segments: Segments) -> Tensor:
        """Tokens, image latents in their places, and positions."""
        stream = self.token_embedding(x.tokens)  # [t, D]
        stream = scatter_image_latents(stream, x.latents.to(stream.dtype), x.image_starts)
        stream = stream + self.position_embedding[x.positions + self.shape.position_offset]
        stream = stream[:, None]
        if self.config.sequence_parallel:
            stream = scatter_to_sequence_parallel_region(stream, group=self.tp_group)
        if self.training and self.shape.embedding_dropout > 0.0:
            local = stream.shape[0]
            start = self.tp_group.rank() * local if self.config.sequence_parallel else 0
            seed = torch.full((1,), key63(segments.seed, "embedding"), dtype=torch.int64, device=stream.device)
            keys = sequence_row_keys(segments, seed)[0, start : start + local]
            stream = drop(stream[:, 0], keys, self.shape.embedding_dropout)[:, None]
        return stream

    def contexts(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The LM's view of what precedes each image: hidden [t, D], positions [m] -> [m, D]."""
        return self.norm_final(hidden.index_select(0, positions)) @ self.context_projection

    def targets(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Normalised hidden states that predict a target: hidden [t, D], positions [k] -> [k, D]."""
        norm = self.norm_final if self.norm_head is None else self.norm_head
        return norm(hidden.index_select(0, positions))
