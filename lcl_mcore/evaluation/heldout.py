"""What a run learned, on pairs it never saw: the numbers of a report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lcl_mcore.build import build_model
from lcl_mcore.checkpoint.manager import complete_checkpoints, load_weights
from lcl_mcore.config.data import SourceConfig
from lcl_mcore.config.files import read_config
from lcl_mcore.config.run import ParallelConfig, RunConfig
from lcl_mcore.data.tokenizer import Tokenizer, build_tokenizer
from lcl_mcore.distributed.context import start
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.evaluation.features import (
    PICTURES,
    PairFeatures,
    generation_loss,
    heldout_batches,
    pair_features,
)
from lcl_mcore.evaluation.retrieval import chance, recall_at
from lcl_mcore.models.init import initialize
from lcl_mcore.models.lcl import LclModel

KS = (1, 5)


@dataclass(frozen=True)
class HeldoutResult:
    """Numbers of the trained and of the untrained model, and the trained one's features."""

    summary: dict[str, Any]
    features: PairFeatures
    captions: tuple[str, ...]


def single_process_config(run: Path) -> RunConfig:
    """The run's configuration for evaluation in one process."""
    config = read_config(run / "config.yaml")
    precision = "bf16" if config.train.precision == "fp8" else config.train.precision
    train = replace(config.train, precision=precision, global_batch_size=config.train.micro_batch_size)
    return replace(config, parallel=ParallelConfig(), train=train)


def evaluate_run(run: Path, heldout: str) -> HeldoutResult:
    """Retrieval and generation loss of a run's newest checkpoint over a held-out source.

    Raises:
        CheckpointError: the run has no complete checkpoint.
    """
    config = single_process_config(run)
    checkpoints = complete_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise CheckpointError(
            explain(run, "has no complete checkpoint", "Train first, or give another folder.")
        )
    context = start(config, run)
    model = build_model(config, context)
    tokenizer = build_tokenizer(config.data.tokenizer)
    source = SourceConfig(path=heldout)

    initialize(model, config.model, config.train.seed, 0, 1)
    untrained = _retrieval(pair_features(model, heldout_batches(config, source, tokenizer, "text_first")))
    state = load_weights(checkpoints[-1], model)
    features = pair_features(model, heldout_batches(config, source, tokenizer, "text_first"))
    trained = _retrieval(features)
    count = trained["candidates"]
    summary = {
        "run": str(run),
        "steps": state.step,
        "images_seen": state.images_seen,
        "heldout": heldout,
        "candidates": count,
        "retrieval": {
            "trained": trained,
            "untrained": untrained,
            "chance": {f"R@{k}": chance(count, k) for k in KS},
        },
        "r5_over_chance": trained["R@5"] / chance(count, 5),
        "generation": _generation(config, model, source, tokenizer),
        "hardware": context.device.name,
    }
    return HeldoutResult(summary, features, _captions(config, source, tokenizer))


def _retrieval(features: PairFeatures) -> dict[str, Any]:
    recall = recall_at(features.image, features.text, KS)
    return {
        "candidates": recall.candidates,
        **{f"R@{k}": recall.mean(k) for k in KS},
        **{f"image_to_text_R@{k}": recall.image_to_text[k] for k in KS},
        **{f"text_to_image_R@{k}": recall.text_to_image[k] for k in KS},
    }


def _generation(
    config: RunConfig, model: LclModel, source: SourceConfig, tokenizer: Tokenizer
) -> dict[str, float]:
    """Nats per token of captions that follow their image."""
    return {
        name: generation_loss(
            model,
            heldout_batches(config, source, tokenizer, "image_first"),
            config.model.language.vocab_size,
            change,
        )
        for name, change in PICTURES.items()
    }


def _captions(config: RunConfig, source: SourceConfig, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The text before each image, in the order of `pair_features`."""
    found = []
    for batch in heldout_batches(config, source, tokenizer, "text_first"):
        ends = [0]
        for length in batch.lengths:
            ends.append(ends[-1] + length)
        for row in batch.context_positions.tolist():
            start = max(end for end in ends if end <= row)
            found.append(tokenizer.decode(batch.tokens[start:row].tolist()).strip())
    return tuple(found)
