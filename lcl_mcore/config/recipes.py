"""Named recipes. `docs/paper.md` says where each number comes from and what the paper leaves open."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lcl_mcore.config.schema import (
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TokenizerConfig,
    TrainConfig,
    VisionConfig,
)
from lcl_mcore.errors import ConfigError, explain

# Paper section 4.1 and appendix A.1: drop-path 0.2 and layer-scale, whose initial value is not stated. CaiT, which the
# paper cites, uses 0.1 up to 18 blocks and 1e-5 up to 24; bf16 would not see 1e-5 beside the residual stream.
_STABLE: dict[str, Any] = {"drop_path": 0.2, "layer_scale": 0.1}
_PAPER_B16 = VisionConfig(**_STABLE)
_PAPER_L14 = VisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096, **_STABLE)
_VIT_H14 = VisionConfig(patch_size=14, width=1280, layers=32, heads=16, mlp_width=5120, **_STABLE)
_VIT_G14 = VisionConfig(patch_size=14, width=1408, layers=40, heads=16, mlp_width=6144, **_STABLE)
_OPT_125M = LanguageConfig(dropout=0.1)
_OPT_1_3B = LanguageConfig(width=2048, layers=24, heads=32, mlp_width=8192, dropout=0.1)
_OPT_6_7B = LanguageConfig(width=4096, layers=32, heads=32, mlp_width=16384, dropout=0.1)


def _clip_text(width: int, heads: int, positions: int) -> LanguageConfig:
    """The released code's LM: CLIP's text tower with its 49411-entry vocabulary."""
    return LanguageConfig(
        vocab_size=49411,
        width=width,
        layers=12,
        heads=heads,
        mlp_width=4 * width,
        activation="gelu",
        max_positions=positions,
        position_offset=0,
        tied_head=False,
        separate_norms=True,
        init="clip_text",
    )


def _paper(name: str, model: ModelConfig, steps: int, batch: int, lr: float) -> RunConfig:
    """Paper settings: sequences of 2048 tokens, AdamW (0.9, 0.95), weight decay 0.1, 2k warm-up, bf16."""
    return RunConfig(
        recipe=name,
        model=model,
        data=DataConfig(
            tokenizer=TokenizerConfig(kind="opt", path="facebook/opt-125m"), sequence_length=2048, packing="by_kind"
        ),
        optim=OptimConfig(lr=lr),
        train=TrainConfig(steps=steps, micro_batch_size="auto", global_batch_size=batch, precision="bf16"),
    )


def paper_l14() -> RunConfig:
    """ViT-L/14 + OPT-125M, LAION + MMC4, 64k images a step: 512 GPUs for 5 days in the paper."""
    # A full sequence holds about 5 images of 258 positions beside its text, so 12288 of them carry about 64k images.
    return _paper("paper-l14", ModelConfig(vision=_PAPER_L14, language=_OPT_125M), 200_000, 12_288, 3e-4)


def paper_b16() -> RunConfig:
    """ViT-B/16 + OPT-125M, the paper's ablation setting, 8k images a step."""
    # About 5 images of 198 positions a sequence.
    return _paper("paper-b16", ModelConfig(vision=_PAPER_B16, language=_OPT_125M), 250_000, 1_536, 3e-4)


def large_h14() -> RunConfig:
    """ViT-H/14 + OPT-1.3B: needs tensor parallelism on most GPUs."""
    model = ModelConfig(vision=_VIT_H14, language=_OPT_1_3B, pool_heads=32)
    config = _paper("large-h14", model, 200_000, 12_288, 2e-4)
    return replace(
        config,
        parallel=ParallelConfig(tensor_parallel_size=2, sequence_parallel=True),
        train=replace(config.train, micro_batch_size=2),
    )


def large_g14() -> RunConfig:
    """ViT-g/14 + OPT-6.7B: tensor parallelism within a node, activations recomputed."""
    model = ModelConfig(vision=_VIT_G14, language=_OPT_6_7B, pool_heads=32)
    config = _paper("large-g14", model, 200_000, 12_288, 1.2e-4)
    return replace(
        config,
        parallel=ParallelConfig(
            tensor_parallel_size=8, sequence_parallel=True, recompute_vision="full", recompute_language="full"
        ),
        train=replace(config.train, micro_batch_size=1),
    )


def _released(
    name: str, model: ModelConfig, *, length: int, lr: float, batch: int, micro: int, steps: int
) -> RunConfig:
    """The released code's defaults: AdamW (0.9, 0.98), weight decay 0.2, rank means, no packing, no clipping."""
    return RunConfig(
        recipe=name,
        model=model,
        data=DataConfig(
            tokenizer=TokenizerConfig(kind="clip", path="openai/clip-vit-base-patch16", cleaning="released"),
            sequence_length=length,
            packing="off",
            context_rule="index0",
        ),
        loss=LossConfig(averaging="rank"),
        optim=OptimConfig(lr=lr, beta2=0.98, weight_decay=0.2, eps=1e-6, clip_grad=0.0),
        train=TrainConfig(steps=steps, micro_batch_size=micro, global_batch_size=batch, precision="bf16"),
    )


def released_b16_laion() -> RunConfig:
    """`LCL_ViT-B-16_laion`: ViT-B/16 + CLIP-text LM on image-text pairs, sequences of 280 tokens."""
    model = ModelConfig(vision=VisionConfig(), language=_clip_text(768, 12, 280))
    return _released("released-b16-laion", model, length=280, lr=5e-4, batch=8192, micro=32, steps=1_590_000)


def released_b32_laion() -> RunConfig:
    """`LCL_ViT-B-32_laion`: ViT-B/32 + CLIP-text LM of width 512 on pairs, sequences of 128 tokens."""
    model = ModelConfig(vision=VisionConfig(patch_size=32), language=_clip_text(512, 8, 128), pool_heads=8)
    return _released("released-b32-laion", model, length=128, lr=5e-4, batch=8192, micro=64, steps=1_590_000)


def released_b32_mmc4() -> RunConfig:
    """`LCL_ViT-B-32_mmc4`: the same on MMC4 documents, sequences of 2048 tokens, one document each."""
    model = ModelConfig(vision=VisionConfig(patch_size=32), language=_clip_text(512, 8, 2048), pool_heads=8)
    return _released("released-b32-mmc4", model, length=2048, lr=3e-4, batch=2048, micro=4, steps=250_000)


def demo() -> RunConfig:
    """Five minutes on two CPU cores: OpenMoji images at 64 px, captions, about ten pairs a sequence.

    The contrastive weight is 1 instead of the paper's 0.1: 80 images a step give the encoder far less
    contrastive signal than 64k, and minutes must do. docs/experiments.md has what was tried.
    """
    return RunConfig(
        recipe="demo",
        model=ModelConfig(
            vision=VisionConfig(image_size=64, width=128, layers=6, heads=4, mlp_width=512, class_token=False),
            language=LanguageConfig(vocab_size=2048, width=128, layers=2, heads=4, mlp_width=512, max_positions=256),
            pool_heads=4,
        ),
        data=DataConfig(tokenizer=TokenizerConfig(kind="file"), sequence_length=256),
        loss=LossConfig(contrastive_weight=1.0),
        optim=OptimConfig(lr=1e-3, warmup_steps=40),
        train=TrainConfig(steps=850, micro_batch_size=4, global_batch_size=8),
        checkpoint=CheckpointConfig(every=200),
        log=LogConfig(every=50),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "paper-l14": paper_l14,
    "paper-b16": paper_b16,
    "large-h14": large_h14,
    "large-g14": large_g14,
    "released-b16-laion": released_b16_laion,
    "released-b32-laion": released_b32_laion,
    "released-b32-mmc4": released_b32_mmc4,
    "demo": demo,
}


def released_for(model: ModelConfig) -> RunConfig:
    """The released code's rules for a model of its architecture: the recipe of this shape if there is one.

    Another shape gets the recipe for documents where its positions hold six images, else the one for pairs.
    """
    recipes = (released_b16_laion(), released_b32_laion(), released_b32_mmc4())
    same = next((recipe for recipe in recipes if recipe.model == model), None)
    if same is not None:
        return same
    positions = model.language.max_positions
    nearest = recipes[2 if positions > 6 * model.vision.patches else 0]
    return replace(nearest, recipe="imported", model=model, data=replace(nearest.data, sequence_length=positions))


# How the documents of every source are used where that differs from the defaults of `SourceConfig`.
_RELEASED_SOURCES = {
    "min_images": 1,
    "image_choice": "first",
    "one_image_per_text": True,
    "cut_rule": "tokens",
    "ends": "released",
}
_PAPER_SOURCES = {"min_images": 1}


def with_source_options(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration's nested dict in which each source has the options of its recipe where it has none of its own."""
    recipe, data = str(tree.get("recipe", "")), tree.get("data")
    options: dict[str, Any] = {}
    if recipe.startswith("released-") or recipe == "imported":
        options = _RELEASED_SOURCES
    elif recipe.startswith(("paper-", "large-")):
        options = _PAPER_SOURCES
    if not isinstance(data, dict) or not isinstance(data.get("sources"), list | tuple):
        return tree
    sources = [options | source if isinstance(source, dict) else source for source in data["sources"]]
    return tree | {"data": data | {"sources": sources}}


def load_recipe(name: str) -> RunConfig:
    """The configuration of a recipe.

    Raises:
        ConfigError: no recipe has that name.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ConfigError(
            explain(f"recipe = {name}", "no recipe has this name", f"{hint}Recipes: {', '.join(RECIPES)}.")
        )
    return RECIPES[name]()
