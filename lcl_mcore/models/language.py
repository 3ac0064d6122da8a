"""Causal language model over packed rows in which image latents stand at their placeholders.

Shape legend
    t   positions of all rows of the micro-batch, end to end;  D  width;  V  padded vocabulary
    n   images;  P  latents per image;  m  images with a context;  k  prediction targets
"""

from __future__ import annotations

import torch
from lcl_kernels import scatter_image_latents
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.utils import VocabUtility
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from lcl_mcore.config.model import LanguageConfig
from lcl_mcore.models.layers import LayerBackend, LayerNorm, drop_rows, layer_spec, parameter_device
from lcl_mcore.models.randomness import key_of
from lcl_mcore.models.segments import Segments
from lcl_mcore.models.transformer_config import no_init, without_sequence_parallel


class LanguageModel(MegatronModule):
    """Token and position embeddings, causal blocks, and the norms and matrices of the two losses."""

    def __init__(
        self, config: TransformerConfig, shape: LanguageConfig, backend: LayerBackend, groups: ProcessGroupCollection,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self.shape, self.tp_group = shape, groups.tp
        dense = without_sequence_parallel(config)
        device, dtype = parameter_device(config), config.params_dtype

        self.token_embedding = VocabParallelEmbedding(
            shape.padded_vocab_size, shape.width, init_method=no_init, config=dense, tp_group=groups.tp
        )
        positions = shape.max_positions + shape.position_offset
        self.position_embedding = nn.Parameter(
            torch.empty(positions, shape.width, dtype=dtype, device=device)
        )
        specs = [
            layer_spec(config, backend, "language", i, causal=True, dropout=shape.dropout)
            for i in range(shape.layers)
        ]
        self.blocks = TransformerBlock(
            config,
            TransformerBlockSubmodules(layer_specs=specs, layer_norm=None),
            post_layer_norm=False,
            pg_collection=groups,
        )
        self.norm_final = LayerNorm(dense, shape.width, shape.norm_eps)
        self.norm_head = LayerNorm(dense, shape.width, shape.norm_eps) if shape.separate_norms else None
        # Used as x @ W (released `text_projection`; W2 of paper section 3.2).
        self.context_projection = nn.Parameter(
            torch.empty(shape.width, shape.width, dtype=dtype, device=device)
        )
        self.head: nn.Parameter | None = None
        if not shape.tied_head:
            rows = shape.padded_vocab_size // groups.tp.size()
            self.head = nn.Parameter(torch.empty(rows, shape.width, dtype=dtype, device=device))
            self.head.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.head.partition_dim = 0  # type: ignore[attr-defined]
            self.head.partition_stride = 1  # type: ignore[attr-defined]

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix, [V / tp, D]."""
        return self.token_embedding.weight if self.head is None else self.head

    @property
    def vocab_range(self) -> tuple[int, int]:
        """First and last (exclusive) row of the padded vocabulary on this rank."""
        return VocabUtility.vocab_range_from_global_vocab_size(
            self.shape.padded_vocab_size, self.tp_group.rank(), self.tp_group.size()
        )

    def forward(
        self, tokens: Tensor, positions: Tensor, latents: Tensor, image_starts: Tensor, segments: Segments
    ) -> Tensor:
        """tokens, positions [t], latents [n, P, D], image_starts [n] -> hidden [t, D] on every TP rank.

        The output is not normalised: each loss has its own norm (see `contexts` and `targets`).
        """
        x = self.token_embedding(tokens)  # [t, D]
        x = scatter_image_latents(x, latents.to(x.dtype), image_starts)
        x = x + self.position_embedding[positions + self.shape.position_offset]
        x = x[:, None]
        if self.config.sequence_parallel:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        if self.training and self.shape.dropout > 0.0:
            local = x.shape[0]
            start = self.tp_group.rank() * local if self.config.sequence_parallel else 0
            seed = key_of(segments.seed, "embedding")
            x = drop_rows(x, segments, seed, self.shape.dropout, (start, start + local))
        x = self.blocks(x, attention_mask=None, packed_seq_params=segments)
        if self.config.sequence_parallel:
            # What follows is computed on every TP rank alike, so the gradient is split, not summed.
            x = gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return x[:, 0]

    def contexts(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The LM's view of what precedes each image: hidden [t, D], rows [m] -> [m, D]."""
        return self.norm_final(hidden.index_select(0, rows)) @ self.context_projection

    def targets(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Normalised hidden states that predict a target: hidden [t, D], rows [k] -> [k, D]."""
        norm = self.norm_final if self.norm_head is None else self.norm_head
        return norm(hidden.index_select(0, rows))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """megatron's sharded state; only the untied head needs telling that it is split over TP."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.head is not None:
            state[f"{prefix}head"] = make_tp_sharded_tensor_for_checkpoint(
                self.head, f"{prefix}head", tp_axis=0, prepend_offsets=sharded_offsets, tp_group=self.tp_group
            )
        return state
