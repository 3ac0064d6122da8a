"""Vision encoder, attention pool and projector.

Shape legend
    n   images (at least one: a dummy stands in where a rank has none);  H, W  pixels
    P   patch latents per image;  s  encoder tokens per image (P, or P + 1 with a class token)
    h   ViT width;  D  LM width (also the contrastive space);  a  pool heads on this TP rank
Under sequence parallelism each TP rank holds the tokens of n / tp whole images between the norms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lcl_mcore.config.schema import ModelConfig, VisionConfig
from lcl_mcore.models.attention import make_segments
from lcl_mcore.models.layers import (
    LayerBackend,
    LayerNorm,
    draw_masks,
    layer_spec,
    mark_sequence_parallel,
    parameter_device,
    transformer_block,
)
from lcl_mcore.models.linear import ColumnLinear, RowLinear
from lcl_mcore.models.transformer_config import no_init, without_sequence_parallel

# OpenAI CLIP's pixel statistics (paper section 4.1: "same image transform as OpenCLIP").
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def patchify(images: Tensor, mean: Tensor, std: Tensor, patch_size: int) -> Tensor:
    """uint8 [n, 3, H, W], pixel statistics [3, 1, 1] -> normalised fp32 [n, P, 3 * patch_size ** 2]."""
    pixels = (images.float() / 255.0 - mean) / std
    n, channels, height, width = pixels.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixels.view(n, channels, rows, patch_size, columns, patch_size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, channels * patch_size**2)


class VisionEncoder(MegatronModule):
    """ViT: patch embedding, learned positions, pre-norm blocks, final norm; the class token is dropped."""

    def __init__(
        self, config: TransformerConfig, shape: VisionConfig, backend: LayerBackend, groups: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.shape = shape
        self.tp_group = groups.tp
        width, device = shape.width, parameter_device(config)

        def parameter(*size: int) -> nn.Parameter:
            value = nn.Parameter(torch.empty(*size, dtype=config.params_dtype, device=device))
            return mark_sequence_parallel(value, config.sequence_parallel)

        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.patch_embedding = parameter(width, 3 * shape.patch_size**2)
        self.class_token = parameter(width) if shape.class_token else None
        self.position_embedding = parameter(shape.tokens, width)
        self.norm_pre = LayerNorm(config, width, shape.norm_eps) if shape.pre_norm else nn.Identity()
        rates = [shape.drop_path * i / max(shape.layers - 1, 1) for i in range(shape.layers)]
        specs = [
            layer_spec(config, backend, "vision", i, causal=False, layer_scale=shape.layer_scale, drop_path=rate)
            for i, rate in enumerate(rates)
        ]
        self.blocks = transformer_block(config, specs, groups)
        self.norm_post = LayerNorm(config, width, shape.norm_eps)

    def forward(self, images: Tensor, keys: Tensor, seed: int) -> Tensor:
        """images uint8 [n, 3, H, W], keys int64 [n] -> patch latents [n_local * P, 1, h].

        n_local is n, or n / tp under sequence parallelism (n must then be a multiple of tp).
        """
        s, total = self.position_embedding.shape[0], images.shape[0]
        segments = make_segments((s,) * total, images.device, keys=keys, seed=seed)
        if self.training:
            draw_masks(self.blocks, segments)
        if self.config.sequence_parallel:
            share = total // self.tp_group.size()
            images = images.narrow(0, self.tp_group.rank() * share, share)
        x = F.linear(
            patchify(images, self.pixel_mean, self.pixel_std, self.shape.patch_size).to(self.patch_embedding.dtype),
            self.patch_embedding,
        )
        if self.class_token is not None:
            x = torch.cat((self.class_token.expand(x.shape[0], 1, -1), x), dim=1)
        x = self.norm_pre(x + self.position_embedding)
        x = self.blocks(x.reshape(-1, 1, x.shape[-1]), attention_mask=None, packed_seq_params=segments)
        x = x.view(-1, s, x.shape[-1])[:, int(self.shape.class_token) :]
        return self.norm_post(x).reshape(-1, 1, x.shape[-1])


class AttentionPool(MegatronModule):
    """One learned query attends over an image's patch latents; its value path is also the projector.

    Released code `attentive.py:109-146`; the paper names the pool (section 4.1) and leaves the projector
    open. The projector output is the pool's output for an attention that looks at one patch only, so a
    uniform attention pools to the mean of the projected latents.
    """

    def __init__(self, config: TransformerConfig, shape: ModelConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        h, width = shape.vision.width, shape.language.width
        dense = without_sequence_parallel(config)
        eps = shape.vision.norm_eps
        self.patches = shape.vision.patches
        self.head_channels = width // shape.pool_heads
        query = torch.empty(1, 1, h, dtype=config.params_dtype, device=parameter_device(config))
        self.query = nn.Parameter(query)
        self.norm_q = LayerNorm(dense, h, eps)
        self.norm_k = LayerNorm(config, h, eps)
        self.norm_v = LayerNorm(config, h, eps)
        common = {"init_method": no_init, "bias": True, "gather_output": False, "tp_group": groups.tp}
        self.linear_q = ColumnLinear(h, width, config=dense, **common)
        self.linear_k = ColumnLinear(h, width, config=config, **common)
        self.linear_v = ColumnLinear(h, width, config=config, **common)
        self.linear_out = RowLinear(
            width,
            width,
            config=dense,
            init_method=no_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=groups.tp,
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Encoder output [n_local * P, 1, h] -> [n, 1 + P, D] on every TP rank: pooled, projected latents."""
        d, p = self.head_channels, self.patches
        query, _ = self.linear_q(self.norm_q(self.query))  # [1, 1, D / tp]
        key, _ = self.linear_k(self.norm_k(latents))  # [n * P, 1, D / tp]
        value, _ = self.linear_v(self.norm_v(latents))
        n, a = key.shape[0] // p, key.shape[-1] // d
        pooled = F.scaled_dot_product_attention(
            query.view(1, 1, a, d).transpose(1, 2).expand(n, -1, -1, -1),
            key.view(n, p, a, d).transpose(1, 2),
            value.view(n, p, a, d).transpose(1, 2),
        )  # [n, a, 1, d]
        together = torch.cat((pooled.transpose(1, 2).reshape(n, 1, a * d), value.view(n, p, a * d)), dim=1)
        out, _ = self.linear_out(together)  # one all-reduce for pool and projector
        return out
