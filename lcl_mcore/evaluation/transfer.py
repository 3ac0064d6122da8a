"""What retrieval and captioning share when they train new parts on an encoder with pairs.

Shape legend
    n  images;  S  side in pixels;  P  patch tokens;  h  their width
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.evaluation import PairsConfig
from lcl_mcore.config.model import ModelConfig
from lcl_mcore.config.run import single_process
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.captioned import CHUNK, CaptionDataset, TextRows
from lcl_mcore.evaluation.classify import encode
from lcl_mcore.evaluation.loading import LoadedModel, reset_weights
from lcl_mcore.models.attention import make_segments
from lcl_mcore.models.backends import choose_layers
from lcl_mcore.models.init import initialize
from lcl_mcore.models.language import EmbeddingInput, LanguageModel
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.stages import stage_of
from lcl_mcore.models.transformer_config import language_transformer_config
from lcl_mcore.models.vision import VisionEncoder, patchify
from lcl_mcore.rng import key_of


@dataclass(frozen=True)
class Encoder:
    """Images to patch tokens.

    width   h
    encode  uint8 [n, 3, S, S] and a seed for drop-path -> fp32 [n, P, h]
    device  where it computes
    module  what learns in full transfer; None: frozen
    """

    width: int
    encode: Callable[[Tensor, int], Tensor]
    device: torch.device
    module: nn.Module | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [] if self.module is None else list(self.module.parameters())


Arm = Callable[[Encoder], dict[str, Any]]
"""One transfer on one encoder: its numbers."""


def vit(model: LclModel, full: bool = False) -> Encoder:
    """The model's encoder with the weights that it has now."""
    vision = model.vision
    return Encoder(
        model.shape.vision.width,
        lambda images, seed: encode(vision, images, seed),
        vision.patch_embedding.device,
        vision if full else None,
    )


def raw_patches(model: LclModel) -> Encoder:
    """No encoder: normalised pixels of each patch."""
    vision, patch = model.vision, model.shape.vision.patch_size
    return Encoder(
        3 * patch**2,
        lambda images, seed: patchify(images, vision.pixel_mean, vision.pixel_std, patch),
        vision.patch_embedding.device,
    )


def token_source(encoder: Encoder, data: CaptionDataset, cache_mb: int) -> Callable[[Tensor, int], Tensor]:
    """indices int64 [n], seed -> patch tokens [n, P, h]; those of a frozen encoder from memory if they fit."""

    def tokens(indices: Tensor, seed: int) -> Tensor:
        return encoder.encode(data.fetch(indices.tolist()).to(encoder.device), seed)

    if encoder.module is not None:
        return tokens
    frozen = torch.no_grad()(tokens)
    if 4 * frozen(torch.zeros(1, dtype=torch.int64), 0).numel() * len(data) > cache_mb << 20:
        return frozen
    held = torch.cat([frozen(part, 0) for part in torch.arange(len(data)).split(CHUNK)])
    return lambda indices, seed: held[indices]


def draw_captions(data: CaptionDataset, indices: Tensor, seed: int) -> list[str]:
    """One caption of each image, drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(indices), generator=generator).tolist()
    options = [data.captions[index] for index in indices.tolist()]
    return [texts[int(u * len(texts))] for u, texts in zip(draws, options, strict=True)]


def step_seed(config: PairsConfig, step: int, part: int = 0) -> int:
    """Key of all draws of a step, or of a part of its batch."""
    return key_of(config.seed, "pairs", str(step), str(part))


class TransferHead(nn.Module):
    """New parts with the names that they have in an `LclModel`: an LM of the run's shape, in fp32, without dropout."""

    def __init__(self, shape: ModelConfig, context: Context) -> None:
        super().__init__()
        self.shape = replace(shape, language=replace(shape.language, dropout=0.0))
        self.config, self.device = single_process(self.shape), context.device.device
        self.groups = context.groups.megatron
        language, (backend, _) = self.shape.language, choose_layers(torch.float32)
        config = language_transformer_config(self.config, self.device)
        stage = stage_of((language.layers,), 0)
        self.language = LanguageModel(config, language, backend, self.groups, stage)

    def canonical_name(self, name: str) -> str:
        """What `initialize` asks of a model."""
        return name

    def draw(self, seed: int) -> None:
        """Random weights for every part that an `LclModel` has, too."""
        initialize(self, self.shape, seed, 0, 1)  # type: ignore[arg-type]  # asks for names and parameters only
        self.to(self.device)

    def forward_language(self, rows: TextRows, latents: Tensor, starts: Tensor) -> Tensor:
        """The LM's hidden states [t, D] over rows with latents [n, P, D] in the places from `starts` [n] on."""
        device = self.device
        segments = make_segments(rows.lengths, device, sequence_keys=tuple(range(len(rows.lengths))))
        given = EmbeddingInput(rows.tokens.to(device), rows.positions.to(device), latents, starts.to(device))
        return self.language(given, segments)


@contextmanager
def learning(encoder: Encoder) -> Iterator[None]:
    """The encoder in training mode, where it learns."""
    if encoder.module is not None:
        encoder.module.train()
    yield
    if encoder.module is not None:
        encoder.module.eval()


@contextmanager
def drop_path(vision: VisionEncoder, rate: float) -> Iterator[None]:
    """Stochastic depth that grows linearly to `rate` at the last block."""
    layers = list(vision.blocks.layers)
    branches = [branch for layer in layers for branch in (layer.self_attn_bda, layer.mlp_bda)]
    before = [branch.drop_path for branch in branches]
    for number, branch in enumerate(branches):
        branch.drop_path = rate * (number // 2) / max(len(layers) - 1, 1)
    try:
        yield
    finally:
        for branch, value in zip(branches, before, strict=True):
            branch.drop_path = value


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[None]:
    """Whatever is learned inside, the weights afterwards are those from before."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


def compare(
    opened: LoadedModel,
    train: CaptionDataset,
    test: CaptionDataset,
    config: PairsConfig,
    task: str,
    arm: Arm,
    baselines: bool,
) -> dict[str, Any]:
    """One transfer on the run's encoder, with random weights and, if it is frozen, on raw patches.

    The baselines leave `opened.model` with random weights.
    """
    started, model, full = time.perf_counter(), opened.model.float(), config.transfer == "full"
    model.eval()

    def measured(name: str, encoder: Encoder) -> dict[str, Any]:
        opened.context.log(f"{name}:")
        with weights_kept(model.vision):
            return arm(encoder)

    result: dict[str, Any] = {
        **opened.facts(),
        "task": f"{task}, {config.transfer} transfer",
        "transfer": config.transfer,
        "train_data": train.name,
        "train_images": len(train),
        "data": test.name,
        "images": len(test),
        "training": to_dict(config),
        "trained": measured("trained", vit(model, full)),
    }
    if baselines:
        reset_weights(opened)
        result["random_init"] = measured("random_init", vit(model, full))
        if not full:
            result["pixels"] = measured("pixels", raw_patches(model))
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def check_apart(train: CaptionDataset, test: CaptionDataset, same_file: bool) -> None:
    """Refuse to test on what was trained on.

    Raises:
        ConfigError: both are the same split of the same file.
    """
    if same_file and train.captions[0] == test.captions[0]:
        raise ConfigError(
            explain(
                f"--train {train.name}",
                "training pairs must not be the test pairs",
                "Give another data set, or another --train-split of the same file.",
            )
        )
