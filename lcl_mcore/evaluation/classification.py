"""Image classification by frozen or full transfer, beside the same on random weights and on raw pixels.

Two protocols: `paper` trains the paper's attention probe with given settings; `chosen` runs several probes, each with
settings chosen on a validation part of the training images.

Shape legend
    n  images;  S  side in pixels;  P  patch tokens;  h  their width;  c  classes
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.errors import ConfigError, DataError, explain
from lcl_mcore.evaluation import attention_probe
from lcl_mcore.evaluation.attention_probe import (
    AttentionProbe,
    Batches,
    LabelledBatch,
    chosen_attention_probe,
    fit_classifier,
    outputs,
    top1,
)
from lcl_mcore.evaluation.classification_data import ClassificationDataset, open_splits, quoted
from lcl_mcore.evaluation.embedding_metrics import effective_rank
from lcl_mcore.evaluation.image_files import read_once
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.evaluation.probes import (
    LOGISTIC_CRITERION,
    LabelledFeatures,
    logistic_regression,
    nearest_neighbours,
    require_scikit_learn,
    seed_interval,
    test_scores,
)
from lcl_mcore.evaluation.transfer import (
    CRITERION,
    ImageEncoder,
    cached,
    convergence_warnings,
    encode,
    raw_patches,
    restored_weights,
    training_mode,
    vit,
)
from lcl_mcore.models.lcl import LclModel

CHUNK = 256
"""Images in one forward pass of a frozen encoder."""

TRAINING = ("batch_size", "lr", "weight_decay", "beta1", "beta2", "warmup", "epochs")
"""Settings of the paper's probe, of which those with chosen settings have no use."""

SMALL_SET = 100_000
"""Training images up to which settings are chosen, unless some are given."""

RANK_IMAGES = 5000
"""Test images, at most, that the effective rank is taken over."""

PIXEL_SIDE = 32
"""Pixels are averaged down to this side, at most, before probes of whole images see them."""


class LinearPixelProbe(nn.Module):
    """The raw-pixel baseline that needs no positions: one linear layer over all pixels [n, ...] -> [n, c]."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


# --- the command


def classify(loaded: LoadedModel, data: Path, config: ProbeConfig, baselines: bool = True) -> dict[str, Any]:
    """Transfer to a data set with labels; with `baselines`, the same from random weights and from pixels.

    The baselines leave `loaded.model` with random weights.
    """
    image_size, started = loaded.config.model.vision.image_size, time.perf_counter()
    train, test = open_splits(data, image_size)
    train, test = train.subset(config.train_limit, config.seed), test.subset(config.test_limit, config.seed)
    if len(train.labels.unique()) < 2:
        raise DataError(explain(data, "its training images are of one class", "Give two classes at least."))
    chosen = protocol(config, len(train)) == "chosen"
    for line in describe(train, test):
        loaded.context.log(line)
    scores = (
        chosen_probes(loaded, train, test, config, baselines)
        if chosen
        else given_probe(loaded, train, test, config, baselines)
    )
    return {
        **loaded.facts(),
        "task": f"classification, {config.transfer} transfer" + (", chosen probes" if chosen else ""),
        "data": str(data),
        "classes": len(train.classes),
        "train_images": len(train),
        "test_images": len(test),
        "skipped": {"train": dict(train.skipped), "test": dict(test.skipped)},
        "classes_without_training_image": train.missing_classes(),
        "classes_without_test_image": test.missing_classes(),
        "probe": {name: value for name, value in to_dict(config).items() if not chosen or name not in TRAINING},
        **scores,
        "seconds": round(time.perf_counter() - started, 1),
    }


def protocol(config: ProbeConfig, train_images: int) -> str:
    """Which of the two protocols `config` asks for: `chosen` or `paper`.

    Raises:
        ConfigError: settings are both given and to be chosen, or asked of a protocol that has no use for them.
    """
    defaults = ProbeConfig()
    given = [f"--{name.replace('_', '-')}" for name in TRAINING if getattr(config, name) != getattr(defaults, name)]
    if config.probe == "chosen":
        if config.transfer == "full":
            raise ConfigError(explain("--probe chosen", "is for frozen encoders", "Remove --transfer full."))
        if given:
            remedy = f"Leave it out, or use --probe paper with {given[0]}."
            raise ConfigError(explain(f"{given[0]} with --probe chosen", "is chosen by validation", remedy))
        return "chosen"
    auto = config.probe == "auto" and config.transfer == "frozen" and not given
    if auto and train_images <= SMALL_SET:
        return "chosen"
    if config.seeds > 1:
        raise ConfigError(explain(f"--seeds {config.seeds}", "needs --probe chosen", "Repeat with --seed instead."))
    return "paper"


def describe(train: ClassificationDataset, test: ClassificationDataset) -> list[str]:
    """What a reader should know of a data set before the numbers: what is not used, what cannot be measured."""
    lines = [
        f"{name} images: {len(split)} used; skipped: "
        + (", ".join(f"{count} {reason}" for reason, count in split.skipped.items()) or "none")
        for name, split in (("training", train), ("test", test))
    ]
    for name, split in (("training", train), ("test", test)):
        missing = split.missing_classes()
        if missing:
            lines.append(f"{len(missing)} of {len(split.classes)} classes have no {name} image: {quoted(missing)}")
    return lines


# --- probes with chosen settings


@dataclass(frozen=True)
class FrozenImages:
    """What a frozen encoder makes of one split.

    Attributes:
        tokens: indices -> patch tokens fp32 [n, P, h], and labels.
        vectors: by name, one vector per image.
        labels: int64 [n] on the CPU.
    """

    tokens: Batches
    vectors: Mapping[str, LabelledFeatures]
    labels: Tensor


def chosen_probes(
    loaded: LoadedModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig, baselines: bool
) -> dict[str, Any]:
    """Logistic regression, nearest neighbours and attention probe for the run's encoder and its baselines.

    Every seed draws another validation part, another order and initial head, and other random weights for the baseline.
    """
    require_scikit_learn()
    model, log, vision = loaded.model.eval(), loaded.context.log, loaded.config.model.vision
    seeds = range(config.seed, config.seed + config.seeds)

    def evaluated(name: str, encoder: ImageEncoder, heads: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
        log(f"{name}: features of {len(train) + len(test)} images")
        gib = 4 * vision.patches * encoder.width * len(train) / 2**30
        if 1024 * gib > config.cache_mb:
            log(f"{name}: patch tokens of {gib:.1f} GiB exceed --cache-mb {config.cache_mb}: computed in every step")
        fit, unseen = without_repeated_channels(
            freeze(encoder, train, config.cache_mb), freeze(encoder, test, config.cache_mb)
        )
        found = []
        for seed in seeds:
            log(f"{name}: probes, seed {seed}")
            found.append(run_probes(fit, unseen, encoder.width, heads, len(train.classes), seed))
        return found

    runs = {"trained": evaluated("trained", with_pool(model), vision.heads, seeds)}
    if baselines:
        runs["random_init"] = []
        for number, seed in enumerate(seeds):
            reset_weights(loaded, number)
            runs["random_init"] += evaluated("random_init", with_pool(model), vision.heads, [seed])
        runs["pixels"] = evaluated("pixels", with_pixels(model), 1, seeds)
    results = {name: summarise(found) for name, found in runs.items()}
    return {
        **results,
        "converged_means": {"logistic regression": LOGISTIC_CRITERION, "attention probe": attention_probe.CRITERION},
        "warnings": [
            f"{name}, {probe}: {line}"
            for name, found in results.items()
            for probe, numbers in found["probes"].items()
            for line in numbers["warnings"]
        ],
    }


def with_pool(model: LclModel) -> ImageEncoder:
    """The ViT, with the vectors that its pre-trained pool makes of its tokens."""

    def pooled(tokens: Tensor) -> Tensor:
        return model.pool(tokens.reshape(-1, 1, tokens.shape[-1]))[:, 0].float()

    return dataclasses.replace(vit(model), vectors={"mean tokens": lambda tokens: tokens.mean(1), "pooled": pooled})


def with_pixels(model: LclModel) -> ImageEncoder:
    """Raw patches, with the whole image's pixels as its vector."""
    vision = model.shape.vision
    grid, patch = vision.image_size // vision.patch_size, vision.patch_size

    def pixels(tokens: Tensor) -> Tensor:
        planes = tokens.view(-1, grid, grid, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
        image = planes.reshape(-1, 3, grid * patch, grid * patch) * model.vision.pixel_std + model.vision.pixel_mean
        if image.shape[-1] > PIXEL_SIDE:
            image = F.adaptive_avg_pool2d(image, PIXEL_SIDE)
        return image.flatten(1)

    return dataclasses.replace(raw_patches(model), vectors={"pixels": pixels})


@torch.no_grad()
def freeze(encoder: ImageEncoder, data: ClassificationDataset, cache_mb: int) -> FrozenImages:
    """Tokens of a split, in memory if they fit, and its vectors."""

    def computed(indices: Tensor) -> Tensor:
        chunks = [encoder.encode(data.fetch(i.tolist()).to(encoder.device), 0) for i in indices.split(CHUNK)]
        return torch.cat(chunks)

    def images(indices: Tensor) -> Tensor:
        with torch.no_grad():
            return computed(indices)

    size = images(torch.zeros(1, dtype=torch.int64)).numel()
    tokens = cached(images, len(data), size, cache_mb, CHUNK)
    parts: dict[str, list[Tensor]] = {name: [] for name in encoder.vectors}
    for indices in torch.arange(len(data)).split(CHUNK):
        held = tokens(indices)
        for name, make in encoder.vectors.items():
            parts[name].append(make(held).cpu())
    vectors = {name: LabelledFeatures(torch.cat(part), data.labels) for name, part in parts.items()}
    labels = data.labels.to(encoder.device)
    return FrozenImages(lambda indices: (tokens(indices), labels[indices]), vectors, data.labels)


def without_repeated_channels(*splits: FrozenImages) -> tuple[FrozenImages, ...]:
    """The same, with one channel of pixels instead of three where every image is grey."""
    if "pixels" not in splits[0].vectors:
        return splits
    thirds = [split.vectors["pixels"].vectors.chunk(3, dim=1) for split in splits]
    if any(float((channel - third[0]).abs().max()) > 1e-4 for third in thirds for channel in third):
        return splits
    return tuple(
        dataclasses.replace(split, vectors={"pixels": LabelledFeatures(third[0].contiguous(), split.labels)})
        for split, third in zip(splits, thirds, strict=True)
    )


def run_probes(
    train: FrozenImages, test: FrozenImages, width: int, heads: int, classes: int, seed: int
) -> dict[str, Any]:
    """All probes of one encoder, and the effective rank of its vectors."""
    probes: dict[str, dict[str, Any]] = {}
    for name, vectors in train.vectors.items():
        probes[f"logistic regression, {name}"] = logistic_regression(vectors, test.vectors[name], classes, seed)
        probes[f"nearest neighbours, {name}"] = nearest_neighbours(vectors, test.vectors[name], classes, seed)
    inputs, _ = train.tokens(torch.zeros(1, dtype=torch.int64))

    def make() -> AttentionProbe:
        return AttentionProbe(width, heads, classes, seed).to(inputs.device)

    probes["attention probe, tokens"] = chosen_attention_probe(
        make, train.tokens, train.labels, test.tokens, len(test.labels), seed
    )
    some = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:RANK_IMAGES]
    ranks = {name: effective_rank(F.normalize(held.vectors[some], dim=1)) for name, held in test.vectors.items()}
    return {"probes": probes, "effective_rank": ranks}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One seed as it is; of several the means, with a 95 % interval of the mean over the seeds."""
    if len(runs) == 1:
        return runs[0]
    probes = {}
    for name in runs[0]["probes"]:
        own = [run["probes"][name] for run in runs]
        values = [numbers["top1"] for numbers in own]
        probes[name] = {
            **own[0],
            "top1": sum(values) / len(values),
            "top1_interval": own[values.index(sorted(values)[len(values) // 2])]["top1_interval"],
            "seed_interval": list(seed_interval(values)),
            "train_top1": sum(numbers["train_top1"] for numbers in own) / len(own),
            "seeds": own,
            "warnings": [f"seed {i}: {line}" for i, numbers in enumerate(own) for line in numbers["warnings"]],
        }
        if "converged" in own[0]:
            probes[name]["converged"] = all(numbers["converged"] for numbers in own)
    ranks = {name: sum(run["effective_rank"][name] for run in runs) / len(runs) for name in runs[0]["effective_rank"]}
    return {"probes": probes, "effective_rank": ranks}


def probe_table(result: Mapping[str, Any]) -> list[str]:
    """The numbers of `chosen_probes` in at most 100 columns."""
    several = result["probe"]["seeds"] > 1
    interval, title = ("seed_interval", "95 %, seeds") if several else ("top1_interval", "95 %, images")
    lines = [f"{'':<12}{'':<32}{'test':>6}  {title:<14}{'train':>7}  conv.  chosen"]
    for name in ("trained", "random_init", "pixels"):
        for probe, numbers in result.get(name, {}).get("probes", {}).items():
            low, high = numbers[interval]
            state = {True: "yes", False: "NO", None: ""}[numbers.get("converged")]
            lines.append(
                f"{name:<12}{probe:<32}{numbers['top1']:>6.3f}  {low:.3f} to {high:.3f}{numbers['train_top1']:>7.3f}"
                f"  {state:<5}  {_chosen(numbers['chosen'])}"
            )
            name = ""
    for name in ("trained", "random_init", "pixels"):
        ranks = ", ".join(f"{key} {value:.1f}" for key, value in result.get(name, {}).get("effective_rank", {}).items())
        if ranks:
            lines.append(f"effective rank, {name}: {ranks}")
    return lines


def _chosen(settings: Mapping[str, float]) -> str:
    if "lr" in settings:
        return f"lr {settings['lr']:.1e} x {settings['steps']}"
    return f"k {settings['k']}" if "k" in settings else f"penalty {settings['penalty']:.0e}"


# --- the probe with given settings


def given_probe(
    loaded: LoadedModel, train: ClassificationDataset, test: ClassificationDataset, config: ProbeConfig, baselines: bool
) -> dict[str, Any]:
    """The attention probe, trained as `config` says, on the run's encoder and its baselines."""
    transfer = frozen_transfer if config.transfer == "frozen" else full_transfer
    result: dict[str, Any] = {"converged_means": CRITERION, "trained": transfer(loaded.model, train, test, config)}
    if baselines:
        reset_weights(loaded)
        result["random_init"] = transfer(loaded.model, train, test, config)
        result["pixels"] = pixel_baselines(loaded.model, train, test, config)
    result["warnings"] = convergence_warnings(result)
    return result


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

    read_once(test.fetch, len(test))
    with restored_weights(vision):
        with training_mode(encoder):
            fit = fit_classifier(forward, groups, batches(train, augmented=True), len(train), config)
        scores = test_scores(*outputs(forward, batches(test, augmented=False), len(test), CHUNK))
        train_top1 = top1(forward, batches(train, augmented=False), len(train), CHUNK)
    return {**scores, "train_top1": train_top1, **fit.facts()}


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
    scores = test_scores(*outputs(probe, unseen, len(test)))
    return {**scores, "train_top1": top1(probe, seen, len(train)), **fit.facts()}


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
