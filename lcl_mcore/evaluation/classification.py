"""Image classification by frozen or full transfer, beside the same on random weights and on raw pixels.

The classifier is the paper's (appendix A.2, after CAE): an attention pool with one query over the patch tokens, a norm
and a linear layer. The pool is new, not the one of pre-training.

Shape legend
    n  images;  S  side in pixels;  P  patch tokens;  h  their width;  c  classes
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.evaluation.classification_data import ClassificationDataset, open_splits, quoted
from lcl_mcore.evaluation.embedding_metrics import require_finite
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.evaluation.transfer import (
    CRITERION,
    Fit,
    ImageEncoder,
    cached,
    convergence_warnings,
    encode,
    fit_head,
    raw_patches,
    restored_weights,
    training_mode,
    vit,
)
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.rng import key63

CHUNK = 256
"""Images in one forward pass of a frozen encoder."""

LabelledBatch = tuple[Tensor, Tensor]
"""A classifier's input for n images, and their labels int64 [n]."""


class AttentionProbe(nn.Module):
    """tokens [n, P, h] -> logits [n, c]."""

    def __init__(self, width: int, heads: int, classes: int, seed: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(key63(seed, "probe"))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm_in(tokens)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return self.linear(self.norm_out(pooled[:, 0]))


class LinearPixelProbe(nn.Module):
    """The raw-pixel baseline that needs no positions: one linear layer over all pixels [n, ...] -> [n, c]."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def classify(loaded: LoadedModel, data: Path, config: ProbeConfig, baselines: bool = True) -> dict[str, Any]:
    """Transfer to a data set with labels; with `baselines`, the same from random weights and from pixels.

    The baselines leave `loaded.model` with random weights.
    """
    image_size, started = loaded.config.model.vision.image_size, time.perf_counter()
    train, test = open_splits(data, image_size)
    train, test = train.subset(config.train_limit, config.seed), test.subset(config.test_limit, config.seed)
    for line in describe(train, test):
        loaded.context.log(line)
    transfer = frozen_transfer if config.transfer == "frozen" else full_transfer
    result: dict[str, Any] = {
        **loaded.facts(),
        "task": f"classification, {config.transfer} transfer",
        "data": str(data),
        "classes": len(train.classes),
        "train_images": len(train),
        "test_images": len(test),
        "left_out": {"train": dict(train.left_out), "test": dict(test.left_out)},
        "classes_without_test_image": test.missing_classes(),
        "probe": to_dict(config),
        "converged_means": CRITERION,
        "trained": transfer(loaded.model, train, test, config),
    }
    if baselines:
        reset_weights(loaded)
        result["random_init"] = transfer(loaded.model, train, test, config)
        result["pixels"] = pixel_baselines(loaded.model, train, test, config)
    result["warnings"] = convergence_warnings(result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def describe(train: ClassificationDataset, test: ClassificationDataset) -> list[str]:
    """What a reader should know of a data set before the numbers: what is not used, what cannot be measured."""
    lines = [
        f"{name} images: {len(split)} used; left out: "
        + (", ".join(f"{count} {reason}" for reason, count in split.left_out.items()) or "none")
        for name, split in (("training", train), ("test", test))
    ]
    missing = test.missing_classes()
    if missing:
        lines.append(f"{len(missing)} of {len(test.classes)} classes have no test image: {quoted(missing)}")
    return lines


def frozen_transfer(
    model: LclModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig
) -> dict[str, Any]:
    """Attention probe on the patch tokens of the encoder as it is."""
    model.eval()
    vision, encoder = model.shape.vision, vit(model)
    probe = AttentionProbe(vision.width, vision.heads, len(train.classes), config.seed).to(encoder.device)
    return train_probe(probe, encoder, vision.patches, train, test, config)


def pixel_baselines(
    model: LclModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig
) -> dict[str, dict[str, Any]]:
    """The attention probe on raw patches, and a linear layer on all pixels."""
    patches, classes, encoder = model.shape.vision.patches, len(train.classes), raw_patches(model)
    same = AttentionProbe(encoder.width, 1, classes, config.seed).to(encoder.device)
    linear = LinearPixelProbe(patches * encoder.width, classes).to(encoder.device)
    return {
        "same_probe": train_probe(same, encoder, patches, train, test, config),
        "linear": train_probe(linear, encoder, patches, train, test, config),
    }


def full_transfer(
    model: LclModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig
) -> dict[str, Any]:
    """Fine-tune the encoder together with the probe, the learning rate decaying from block to block.

    The encoder has its weights back afterwards.
    """
    vision, shape, encoder = model.vision, model.shape.vision, vit(model, full=True)
    probe = AttentionProbe(shape.width, shape.heads, len(train.classes), config.seed).to(encoder.device)
    generator = torch.Generator().manual_seed(config.seed)

    def depth(name: str) -> int:
        """Blocks above a parameter."""
        parts = name.split(".")
        if parts[:2] == ["blocks", "layers"]:
            return shape.layers - int(parts[2])
        return 0 if name.startswith("norm_post") else shape.layers + 1

    groups = [(list(probe.parameters()), 1.0)]
    groups += [([p], config.layer_decay ** depth(name)) for name, p in vision.named_parameters()]

    def batches(data: ClassificationDataset, augmented: bool) -> Callable[[Tensor], LabelledBatch]:
        def batch(indices: Tensor) -> LabelledBatch:
            images = data.fetch(indices.tolist()).to(encoder.device)
            labels = data.labels[indices].to(encoder.device)
            return (augment(images, generator) if augmented else images), labels

        return batch

    seeds = itertools.count()

    def forward(images: Tensor) -> Tensor:
        return probe(encode(vision, images, next(seeds)))

    with restored_weights(vision):
        with training_mode(encoder):
            fit = fit_classifier(forward, groups, batches(train, augmented=True), len(train), config)
        train_scores = accuracy(forward, batches(train, augmented=False), len(train), batch_size=CHUNK)
        scores = accuracy(forward, batches(test, augmented=False), len(test), batch_size=CHUNK)
    return {**scores, "train_top1": train_scores["top1"], **fit.facts()}


def train_probe(
    probe: nn.Module,
    encoder: ImageEncoder,
    patches: int,
    train: ClassificationDataset,
    test: ClassificationDataset,
    config: ProbeConfig,
) -> dict[str, Any]:
    """Train a probe on a frozen encoder's features of `train`; accuracies on `test`."""

    def batches(data: ClassificationDataset) -> Callable[[Tensor], LabelledBatch]:
        @torch.no_grad()
        def features(indices: Tensor) -> Tensor:
            chunks = indices.split(CHUNK)
            return torch.cat([encoder.encode(data.fetch(i.tolist()).to(encoder.device), 0) for i in chunks])

        inputs = cached(features, len(data), patches * encoder.width, config.cache_mb, CHUNK)
        return lambda indices: (inputs(indices), data.labels[indices].to(encoder.device))

    seen, unseen = batches(train), batches(test)  # all images are read before anything is trained
    fit = fit_classifier(probe, [(list(probe.parameters()), 1.0)], seen, len(train), config)
    scores, train_scores = accuracy(probe, unseen, len(test)), accuracy(probe, seen, len(train))
    return {**scores, "train_top1": train_scores["top1"], **fit.facts()}


def fit_classifier(
    forward: Callable[[Tensor], Tensor],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    batch: Callable[[Tensor], LabelledBatch],
    count: int,
    config: ProbeConfig,
) -> Fit:
    """Train with cross-entropy.

    Args:
        forward: a batch's input -> logits [n, c].
        groups: parameters, and the factor on their learning rate.
        batch: indices int64 [n] -> input and labels.
        count: images in the training set.
    """

    def backward(indices: Tensor, step: int) -> Tensor:
        inputs, labels = batch(indices)
        loss = F.cross_entropy(forward(inputs), labels)
        loss.backward()
        return loss.detach()

    steps = max(1, round(config.epochs * count / min(config.batch_size, count)))
    return fit_head(backward, groups, count, steps, config)


@torch.no_grad()
def accuracy(
    forward: Callable[[Tensor], Tensor],
    batch: Callable[[Tensor], LabelledBatch],
    count: int,
    ks: tuple[int, ...] = (1, 5),
    batch_size: int = 512,
) -> dict[str, float]:
    """Share of images whose label is among the k highest logits."""
    hits = dict.fromkeys(ks, 0)
    for indices in torch.arange(count).split(batch_size):
        inputs, labels = batch(indices)
        logits = require_finite(forward(inputs), "a classifier's outputs")
        top = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
        for k in ks:
            hits[k] += int((top[:, :k] == labels[:, None]).any(1).sum())
    return {f"top{k}": hits[k] / count for k in ks}


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of 0.5 to 1 of the side, half of them mirrored: uint8 [n, 3, S, S] -> same."""
    n = len(images)
    scale = 0.5 + 0.5 * torch.rand(n, generator=generator)
    shift = (1 - scale)[:, None] * (2 * torch.rand(n, 2, generator=generator) - 1)
    mirror = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = nn.functional.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    moved = nn.functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).byte()
