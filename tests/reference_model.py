"""The LCL model once more, in plain single-process PyTorch: the oracle of the model's and trainer's tests.

Written from the paper and the description of the released code, with nothing from megatron or from
`lcl_mcore.models`. Parameters carry the names of the released checkpoint where it has them, so such a
checkpoint loads as it is; `load_lcl_state` and `reference_grads_as_lcl` translate to and from `LclModel`.

Shape legend
    t   packed positions;  n  images;  m  images with a context;  k  targets
    P   patches;  h  ViT width;  D  LM width;  a  heads;  d  channels per head
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.schema import LanguageConfig, ModelConfig, VisionConfig

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """Softmax attention written out. q [..., s, D], k and v [..., r, D], mask [s, r] -> [..., s, D]."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)  # [..., a, s, d]

    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


class Attention(nn.Module):
    """Self-attention with one stacked input matrix, rows ordered (q, k, v)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(attend(q, k, v, self.heads, mask))


class Gain(nn.Module):
    """Layer-scale: one learned factor per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, shape: VisionConfig | LanguageConfig, activation: str, layer_scale: bool) -> None:
        super().__init__()
        width, eps = shape.width, shape.norm_eps
        self.activation: Callable[[Tensor], Tensor] = F.relu if activation == "relu" else F.gelu
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = Attention(width, shape.heads)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, shape.mlp_width), "c_proj": nn.Linear(shape.mlp_width, width)}
        )
        self.ls_1 = Gain(width) if layer_scale else nn.Identity()
        self.ls_2 = Gain(width) if layer_scale else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), mask))
        return x + self.ls_2(self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x)))))


class Tower(nn.Module):
    """A stack of blocks under the released name `transformer.resblocks`."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """ViT without output projection."""

    def __init__(self, shape: VisionConfig) -> None:
        super().__init__()
        self.shape, width = shape, shape.width
        self.conv1 = nn.Conv2d(3, width, shape.patch_size, shape.patch_size, bias=False)
        if shape.class_token:
            self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(shape.tokens, width))
        self.ln_pre = nn.LayerNorm(width, shape.norm_eps) if shape.pre_norm else nn.Identity()
        self.transformer = Tower([Block(shape, "gelu", shape.layer_scale is not None) for _ in range(shape.layers)])
        self.ln_post = nn.LayerNorm(width, shape.norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, H, W] -> patch tokens [n, P, h]."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        if self.shape.class_token:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)
        x = self.ln_pre(x + self.positional_embedding)
        x = self.ln_post(self.transformer(x))
        return x[:, 1:] if self.shape.class_token else x


class PoolProject(nn.Module):
    """Attention pool with a learned query; its value path, patch by patch, is the projector."""

    def __init__(self, width: int, out: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query_token = nn.Parameter(torch.empty(1, 1, width))
        self.pooler: Any = nn.Module()
        for name in "qkv":
            setattr(self.pooler, f"norm1_{name}", nn.LayerNorm(width, eps))
        self.pooler.cross_attn = nn.Module()
        for name in "qkv":
            setattr(self.pooler.cross_attn, name, nn.Linear(width, out, bias=False))
            setattr(self.pooler.cross_attn, f"{name}_bias", nn.Parameter(torch.empty(out)))
        self.pooler.cross_attn.proj = nn.Linear(out, out, bias=False)

    def _map(self, name: str, x: Tensor) -> Tensor:
        attention = self.pooler.cross_attn
        normed = getattr(self.pooler, f"norm1_{name}")(x)
        return getattr(attention, name)(normed) + getattr(attention, f"{name}_bias")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patch tokens [n, P, h] -> pooled [n, D], projected [n, P, D]."""
        q, k, v = (self._map("q", self.query_token).expand(len(x), -1, -1), self._map("k", x), self._map("v", x))
        project = self.pooler.cross_attn.proj
        return project(attend(q, k, v, self.heads, None))[:, 0], project(v)


class Text(nn.Module):
    """Causal LM without the output matrix."""

    def __init__(self, shape: LanguageConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.positional_embedding = nn.Parameter(torch.empty(shape.max_positions + shape.position_offset, shape.width))
        self.transformer = Tower([Block(shape, shape.activation, False) for _ in range(shape.layers)])
        self.ln_final = nn.LayerNorm(shape.width, shape.norm_eps)
        self.text_projection = nn.Parameter(torch.empty(shape.width, shape.width))


class ReferenceLcl(nn.Module):
    """LCL in either shape (OPT or CLIP-text), without drop-path and dropout. Parameters start undefined."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.shape, language = shape, shape.language
        self.visual = Visual(shape.vision)
        self.pool_project = PoolProject(shape.vision.width, language.width, shape.pool_heads, shape.vision.norm_eps)
        self.text = Text(language)
        head: list[nn.Module] = [nn.LayerNorm(language.width, language.norm_eps), nn.Identity()]
        if not language.separate_norms:
            head[0] = nn.Identity()
        if not language.tied_head:
            head[1] = nn.Linear(language.width, language.vocab_size, bias=False)
        self.lm_head = nn.Sequential(*head)
        self.logit_scale = nn.Parameter(torch.empty(()))

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [n, 3, H, W] -> pooled [n, D], projected latents [n, P, D]."""
        mean, std = MEAN.to(self.logit_scale), STD.to(self.logit_scale)
        return self.pool_project(self.visual((images.to(mean) / 255 - mean) / std))

    def read(self, batch: MicroBatch, latents: Tensor) -> Tensor:
        """Block-stack outputs [t, D], not normalised, of a micro-batch with `latents` at its images."""
        x = self.text.token_embedding(batch.tokens)
        for start, image in zip(batch.image_starts.tolist(), latents, strict=True):
            x = torch.cat((x[:start], image, x[start + len(image) :]))
        x = x + self.text.positional_embedding[batch.positions + self.shape.language.position_offset]
        segment = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        mask = (segment[:, None] == segment[None]).tril()
        return self.text.transformer(x, mask)

    def contexts(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[t, D], rows [m] -> context vectors [m, D], not normalised."""
        return self.text.ln_final(hidden[rows]) @ self.text.text_projection

    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """[t, D], rows [k] -> [k, V]."""
        x = hidden[rows]
        x = self.lm_head[0](x) if self.shape.language.separate_norms else self.text.ln_final(x)
        return x @ self.text.token_embedding.weight.T if self.shape.language.tied_head else self.lm_head[1](x)

    def losses(
        self,
        ranks: Sequence[MicroBatch | Sequence[MicroBatch]],
        mode: str = "global",
        *,
        mask_same_document: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Contrastive (halved, not weighted) and generation loss of a global batch.

        Args:
            ranks: what each data-parallel rank holds, one micro-batch or several.
            mode: "global", means over all images with a context and over all targets of the batch; "rank",
                means over the ranks' own means, leaving out ranks that have nothing to average.
            mask_same_document: pairs of one document are not each other's negatives.
        """
        images, contexts, groups, nll = [], [], [], []
        counts, tokens = [], []
        for held in ranks:
            rank_nll, rank_images = [], 0
            for batch in [held] if isinstance(held, MicroBatch) else held:
                pooled, latents = self.encode(batch.images)
                hidden = self.read(batch, latents)
                images.append(F.normalize(pooled[batch.context_images], dim=-1))
                contexts.append(F.normalize(self.contexts(hidden, batch.context_positions), dim=-1))
                groups.append(batch.group_ids)
                rank_images += len(batch.context_positions)
                logits = self.logits(hidden, batch.target_positions)
                rank_nll.append(F.cross_entropy(logits, batch.target_labels, reduction="none"))
            nll.append(torch.cat(rank_nll))
            counts.append(rank_images)
            tokens.append(len(nll[-1]))
        image, context = torch.cat(images), torch.cat(contexts)
        scores = self.logit_scale.exp() * image @ context.T
        if mask_same_document:
            group = torch.cat(groups)
            same = (group[:, None] == group[None]) & ~torch.eye(len(group), dtype=torch.bool)
            scores = scores.masked_fill(same, -torch.inf)
        own = scores.diagonal()
        per_image = (scores.logsumexp(1) - own + scores.logsumexp(0) - own) / 2
        return _mean(per_image, counts, mode), _mean(torch.cat(nll), tokens, mode)

    def load_lcl_state(self, state: dict[str, Tensor]) -> None:
        """Take the weights of an `LclModel`: full tensors (tensor-parallel size 1) by parameter name."""
        converted = {}
        for name, (theirs, kind) in _names(self).items():
            converted[name] = _FROM_LCL[kind](state[theirs].detach(), self.get_parameter(name).shape, self.shape)
        unused = set(state) - {theirs for theirs, _ in _names(self).values()}
        unused = {name for name in unused if not name.endswith("_extra_state")}
        assert not unused, f"not in the reference model: {sorted(unused)}"
        self.load_state_dict(converted)


def _mean(values: Tensor, counts: list[int], mode: str) -> Tensor:
    """Mean of all values, or mean over the non-empty parts of the part's mean; 0 if there are none."""
    if mode == "global":
        return values.sum() / max(len(values), 1)
    parts = [part.mean() for part in values.split(counts) if len(part)]
    return torch.stack(parts).mean() if parts else values.sum()


def reference_grads_as_lcl(reference: ReferenceLcl) -> dict[str, Tensor]:
    """Gradients by `LclModel`'s names and in its layout (full tensors); zeros where there is none."""
    result = {}
    for name, (theirs, kind) in _names(reference).items():
        parameter = reference.get_parameter(name)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        result[theirs] = _TO_LCL[kind](grad, reference.shape)
    return result


def worst_gradient(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative difference over all parameters, and which parameter has it.

    A difference is relative to the largest entry of that parameter's gradient. Shifting all keys by one
    vector changes no softmax, so the pool's key biases have gradient zero: what is left there is rounding,
    and it is measured against the largest gradient of all.
    """
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    largest = max(float(g.abs().max()) for g in theirs.values())
    worst = (0.0, "")
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        scale = max(float(expected.abs().max()), 1e-4 * largest)
        if name in ("pool.norm_k.bias", "pool.linear_k.bias"):
            scale = largest
        worst = max(worst, (float((ours[name] - expected).abs().max()) / max(scale, 1e-30), name))
    return worst


_BLOCK = {
    "ln_1": "input_layernorm",
    "ln_2": "pre_mlp_layernorm",
    "attn.out_proj": "self_attention.linear_proj",
    "mlp.c_fc": "mlp.linear_fc1",
    "mlp.c_proj": "mlp.linear_fc2",
}
_REST = {
    "visual.class_embedding": "vision.class_token",
    "visual.positional_embedding": "vision.position_embedding",
    "visual.ln_pre": "vision.norm_pre",
    "visual.ln_post": "vision.norm_post",
    "pool_project.query_token": "pool.query",
    "text.positional_embedding": "language.position_embedding",
    "text.ln_final": "language.norm_final",
    "text.text_projection": "language.context_projection",
    "lm_head.0": "language.norm_head",
    **{f"pool_project.pooler.norm1_{x}": f"pool.norm_{x}" for x in "qkv"},
    **{f"pool_project.pooler.cross_attn.{x}": f"pool.linear_{x}" for x in "qkv"},
    "pool_project.pooler.cross_attn.proj": "pool.linear_out",
}
_ODD = {
    "visual.conv1.weight": ("vision.patch_embedding", "conv"),
    "text.token_embedding.weight": ("language.token_embedding.weight", "vocab"),
    "lm_head.1.weight": ("language.head", "vocab"),
    "logit_scale": ("temperature.log_scale", "scalar"),
    **{f"pool_project.pooler.cross_attn.{x}_bias": (f"pool.linear_{x}.bias", "same") for x in "qkv"},
}


def _names(reference: ReferenceLcl) -> dict[str, tuple[str, str]]:
    """Our parameter name -> (`LclModel`'s name, how the layout differs)."""
    names = {}
    for name, _ in reference.named_parameters():
        stem, _, leaf = name.rpartition(".")
        if name in _ODD:
            names[name] = _ODD[name]
        elif ".resblocks." in name:
            tower, _, rest = name.partition(".transformer.resblocks.")
            index, _, place = rest.partition(".")
            layer = f"{ {'visual': 'vision', 'text': 'language'}[tower] }.blocks.layers.{index}"
            stem = place.rpartition(".")[0]
            if stem == "attn":
                kind = "vision_qkv" if tower == "visual" else "language_qkv"
                names[name] = (f"{layer}.self_attention.linear_qkv.{leaf.removeprefix('in_proj_')}", kind)
            elif stem in ("ls_1", "ls_2"):
                names[name] = (f"{layer}.{'self_attn' if stem == 'ls_1' else 'mlp'}_bda.gamma", "same")
            else:
                names[name] = (f"{layer}.{_BLOCK[stem]}.{leaf}", "same")
        else:
            names[name] = (_REST[name], "same") if name in _REST else (f"{_REST[stem]}.{leaf}", "same")
    return names


def _swap_qkv(x: Tensor, heads: int, to_lcl: bool) -> Tensor:
    """Rows ordered (q|k|v, head, d) <-> (head, q|k|v, d)."""
    split = x.unflatten(0, (3, heads, -1) if to_lcl else (heads, 3, -1))
    return split.transpose(0, 1).reshape(x.shape)


_FROM_LCL = {
    "same": lambda x, size, shape: x,
    "conv": lambda x, size, shape: x.view(size),
    "vocab": lambda x, size, shape: x[: size[0]],
    "scalar": lambda x, size, shape: x.view(()),
    "vision_qkv": lambda x, size, shape: _swap_qkv(x, shape.vision.heads, False),
    "language_qkv": lambda x, size, shape: _swap_qkv(x, shape.language.heads, False),
}
_TO_LCL = {
    "same": lambda x, shape: x,
    "conv": lambda x, shape: x.flatten(1),
    "vocab": lambda x, shape: F.pad(x, (0, 0, 0, shape.language.padded_vocab_size - len(x))),
    "scalar": lambda x, shape: x.view(1),
    "vision_qkv": lambda x, shape: _swap_qkv(x, shape.vision.heads, True),
    "language_qkv": lambda x, shape: _swap_qkv(x, shape.language.heads, True),
}
