"""Image classification by frozen or full transfer, beside the same probe on untrained features and on pixels."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.evaluation.labelled import ClassificationDataset, open_classification_dataset
from lcl_mcore.evaluation.loading import LoadedModel, reset_weights
from lcl_mcore.evaluation.probe import AttentionProbe, Batch, PixelProbe, accuracy, fit
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.vision import VisionEncoder, patchify

CHUNK = 256  # images per forward pass of a frozen encoder


def encode(vision: VisionEncoder, images: Tensor, seed: int = 0) -> Tensor:
    """uint8 [n, 3, S, S] on the encoder's device -> patch tokens fp32 [n, P, h]; `seed` keys drop-path."""
    tokens = vision(images, torch.arange(len(images), device=images.device), seed)
    return tokens.view(len(images), -1, tokens.shape[-1]).float()


@torch.no_grad()
def frozen_tokens(vision: VisionEncoder, data: ClassificationDataset) -> Callable[[Tensor], Tensor]:
    """indices -> patch tokens of these images, computed now."""
    device = vision.patch_embedding.device

    def tokens(indices: Tensor) -> Tensor:
        parts = [encode(vision, data.fetch(part.tolist()).to(device)) for part in indices.split(CHUNK)]
        return torch.cat(parts)

    return torch.no_grad()(tokens)


def batches(
    tokens: Callable[[Tensor], Tensor], data: ClassificationDataset, width: int, cache_mb: int
) -> Callable[[Tensor], Batch]:
    """Batches of features `width` numbers each, from memory where they fit into `cache_mb`."""
    if 4 * width * len(data) > cache_mb << 20:
        return lambda indices: (inputs := tokens(indices), data.labels[indices].to(inputs.device))
    held = torch.cat([tokens(part) for part in torch.arange(len(data)).split(CHUNK)])
    labels = data.labels.to(held.device)
    return lambda indices: (held[indices], labels[indices])


def probe_features(
    tokens: Callable[[ClassificationDataset], Callable[[Tensor], Tensor]],
    model: nn.Module,
    train: ClassificationDataset,
    test: ClassificationDataset,
    width: int,
    config: ProbeConfig,
) -> dict[str, float]:
    """Train `model` on features of `train` and report accuracies on `test`."""
    learn = batches(tokens(train), train, width, config.cache_mb)
    loss = fit(model, [(list(model.parameters()), 1.0)], learn, len(train), config)
    held = batches(tokens(test), test, width, config.cache_mb)
    return {**accuracy(model, held, len(test)), "train_loss": loss}


def _attention(
    model: LclModel, classes: int, config: ProbeConfig, width: int | None = None
) -> AttentionProbe:
    vision = model.shape.vision
    heads = vision.heads if width is None else 1
    probe = AttentionProbe(width or vision.width, heads, classes, config.seed)
    return probe.to(model.vision.patch_embedding.device)


def frozen(
    model: LclModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig
) -> dict[str, float]:
    """Attention probe on the patch tokens of the encoder as it is."""
    model.eval()
    shape = model.shape.vision
    probe = _attention(model, len(train.classes), config)
    return probe_features(
        lambda data: frozen_tokens(model.vision, data),
        probe,
        train,
        test,
        shape.patches * shape.width,
        config,
    )


def pixels(
    model: LclModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig
) -> dict[str, dict[str, float]]:
    """The attention probe on raw patches, and a linear layer on all pixels."""
    shape, vision = model.shape.vision, model.vision
    width = 3 * shape.patch_size**2

    def patches(data: ClassificationDataset) -> Callable[[Tensor], Tensor]:
        device = vision.patch_embedding.device
        return lambda indices: patchify(
            data.fetch(indices.tolist()).to(device), vision.pixel_mean, vision.pixel_std, shape.patch_size
        )

    classes, size = len(train.classes), shape.patches * width
    linear = PixelProbe(size, classes).to(vision.patch_embedding.device)
    return {
        "same_probe": probe_features(
            patches, _attention(model, classes, config, width), train, test, size, config
        ),
        "linear": probe_features(patches, linear, train, test, size, config),
    }


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of 0.5 to 1 of the side, half of them mirrored: uint8 [n, 3, S, S] -> same."""
    n = len(images)
    scale = 0.5 + 0.5 * torch.rand(n, generator=generator)
    shift = (1 - scale)[:, None] * (2 * torch.rand(n, 2, generator=generator) - 1)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = nn.functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.round().clamp(0, 255).byte()


def full(
    model: LclModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig
) -> dict[str, float]:
    """Fine-tune the encoder together with the probe, the learning rate decaying from block to block.

    The encoder has its weights back afterwards.
    """
    vision = model.vision
    before = [parameter.detach().clone() for parameter in vision.parameters()]
    device, shape = vision.patch_embedding.device, model.shape.vision
    probe = _attention(model, len(train.classes), config)
    generator = torch.Generator().manual_seed(config.seed)

    def depth(name: str) -> int:
        """Blocks above a parameter."""
        parts = name.split(".")
        if parts[:2] == ["blocks", "layers"]:
            return shape.layers - int(parts[2])
        return 0 if name.startswith("norm_post") else shape.layers + 1

    groups = [(list(probe.parameters()), 1.0)]
    groups += [([p], config.layer_decay ** depth(name)) for name, p in vision.named_parameters()]

    def images(data: ClassificationDataset, augment: bool) -> Callable[[Tensor], Batch]:
        def batch(indices: Tensor) -> Batch:
            found = data.fetch(indices.tolist()).to(device)
            return (_augment(found, generator) if augment else found), data.labels[indices].to(device)

        return batch

    seeds = itertools.count()

    def forward(found: Tensor) -> Tensor:
        return probe(encode(vision, found, next(seeds)))

    vision.train()
    loss = fit(forward, groups, images(train, augment=True), len(train), config)
    vision.eval()
    result = {**accuracy(forward, images(test, augment=False), len(test), size=CHUNK), "train_loss": loss}
    with torch.no_grad():
        for parameter, value in zip(vision.parameters(), before, strict=True):
            parameter.copy_(value)
    return result


def classify(opened: LoadedModel, data: Path, config: ProbeConfig, baselines: bool = True) -> dict[str, Any]:
    """Transfer to a labelled data set; with `baselines`, the same from random weights and from pixels.

    The baselines leave `opened.model` with random weights.
    """
    side, started = opened.config.model.vision.image_size, time.perf_counter()
    train = open_classification_dataset(data, "train", side).subset(config.train_limit, config.seed)
    test = open_classification_dataset(data, "test", side).subset(config.test_limit, config.seed)
    run = frozen if config.transfer == "frozen" else full
    opened.model.float()
    result: dict[str, Any] = {
        **opened.facts(),
        "task": f"classification, {config.transfer} transfer",
        "data": str(data),
        "classes": len(train.classes),
        "train_images": len(train),
        "test_images": len(test),
        "probe": to_dict(config),
        "trained": run(opened.model, train, test, config),
    }
    if baselines:
        reset_weights(opened)
        result["random_init"] = run(opened.model, train, test, config)
        result["pixels"] = pixels(opened.model, train, test, config)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result
