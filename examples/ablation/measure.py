#!/usr/bin/env python
"""The numbers of one run of the ablation into RUN/measured.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.evaluation import ProbeConfig

if TYPE_CHECKING:
    from lcl_mcore.evaluation.load import LoadedModel


def measure(loaded: LoadedModel, heldout: str, labelled: Path, probe: ProbeConfig) -> dict[str, Any]:
    """Accuracy of a frozen probe on `labelled`, and what the model makes of held-out documents."""
    from lcl_mcore.evaluation.classification import frozen_transfer
    from lcl_mcore.evaluation.classification_data import open_splits
    from lcl_mcore.evaluation.embedding_metrics import chance, effective_rank, mean_cosine, recall_at
    from lcl_mcore.evaluation.heldout import generation_losses, heldout_batches, heldout_source, pair_embeds

    image_size = loaded.config.model.vision.image_size
    train, test = open_splits(labelled, image_size)
    train, test = train.subset(probe.train_limit, probe.seed), test.subset(probe.test_limit, probe.seed)
    loaded.model.float()
    source, tokenizer = heldout_source(heldout), loaded.tokenizer()
    batches = heldout_batches(loaded.config, loaded.context, source, tokenizer, "text_first")
    embeds = pair_embeds(loaded.model, batches)
    recall = recall_at(embeds.image, embeds.text, (1, 5, 10))
    losses = generation_losses(loaded, source, tokenizer, ("right", "shuffled"))
    return {
        **loaded.facts(),
        "frozen_accuracy": frozen_transfer(loaded.model, train, test, probe)["top1"],
        "images": recall.images,
        "retrieval_R@1": recall.mean(1),
        "retrieval_R@5": recall.mean(5),
        "retrieval_R@10": recall.mean(10),
        "chance_R@5": chance(recall.images, 5),
        "effective_rank": effective_rank(embeds.image),
        "mean_cosine": mean_cosine(embeds.image),
        "generation_loss": losses["right"],
        "shuffle_gap": losses["shuffled"] - losses["right"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--labelled", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--untrained", action="store_true", help="also the weights that the run started from")
    flags = parser.parse_args()

    from lcl_mcore.evaluation.load import open_model, reset_weights

    # The same images for every run; small sets want a higher rate than the paper's 8192 images a step.
    probe = ProbeConfig(epochs=flags.epochs, batch_size=250, lr=1e-3, train_limit=flags.images, test_limit=flags.images)
    loaded = open_model(flags.run)
    result = {"trained": measure(loaded, flags.heldout, flags.labelled, probe)}
    if flags.untrained:
        reset_weights(loaded)
        result["untrained"] = measure(loaded, flags.heldout, flags.labelled, probe)
    (flags.run / "measured.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
