"""Four numbers that tell what an encoder learned; what the ablation compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.config.data import SourceConfig
from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.evaluation.classify import frozen
from lcl_mcore.evaluation.features import PICTURES, generation_loss, heldout_batches, pair_features
from lcl_mcore.evaluation.labelled import open_classification_dataset
from lcl_mcore.evaluation.loading import LoadedModel
from lcl_mcore.evaluation.retrieval import chance, recall_at


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred vectors [n, D] (Roy and Vetterli, 2007).

    1 for vectors on a line, D for a round cloud; 0 if all vectors are equal.
    """
    x = vectors.double()
    values = torch.linalg.svdvals(x - x.mean(0))
    total = values.sum()
    if float(total) <= 1e-9 * float(x.abs().max().clamp(min=1e-300)) * len(x):
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def heldout_numbers(opened: LoadedModel, tokenizer: Tokenizer, source: SourceConfig) -> dict[str, Any]:
    """Retrieval between images and what precedes them, ranks of the vectors, and the price of wrong images."""
    config, model = opened.config, opened.model
    features = pair_features(model, heldout_batches(config, source, tokenizer, "text_first"))
    recall = recall_at(features.image, features.text, (1, 5, 10))
    losses = {
        name: generation_loss(
            model,
            heldout_batches(config, source, tokenizer, "image_first"),
            config.model.language.vocab_size,
            PICTURES[name],
        )
        for name in ("right", "shuffled")
    }
    return {
        "images": recall.candidates,
        "retrieval_R@1": recall.mean(1),
        "retrieval_R@5": recall.mean(5),
        "retrieval_R@10": recall.mean(10),
        "chance_R@5": chance(recall.candidates, 5),
        "effective_rank": effective_rank(features.image),
        "mean_cosine": _mean_cosine(features.image),
        "generation_loss": losses["right"],
        "shuffle_gap": losses["shuffled"] - losses["right"],
    }


def _mean_cosine(vectors: Tensor) -> float:
    """Mean cosine of two different images' unit vectors [n, D]: 1 when they have collapsed to a point."""
    n = len(vectors)
    total = float(vectors.double().sum(0).square().sum())
    return (total - n) / max(n * (n - 1), 1)


def overview(opened: LoadedModel, heldout: str, labelled: Path, probe: ProbeConfig) -> dict[str, Any]:
    """Frozen-transfer accuracy on `labelled`, and the numbers on held-out documents at `heldout`."""
    side = opened.config.model.vision.image_size
    train = open_classification_dataset(labelled, "train", side).subset(probe.train_limit, probe.seed)
    test = open_classification_dataset(labelled, "test", side).subset(probe.test_limit, probe.seed)
    opened.model.float()
    numbers = heldout_numbers(opened, opened.tokenizer(), SourceConfig(path=heldout, max_images=1000))
    return {**opened.facts(), "frozen_accuracy": frozen(opened.model, train, test, probe)["top1"], **numbers}
