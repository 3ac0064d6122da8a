"""Zero-shot classification: a image's vector against the context vectors of prompts with the class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.captioned import image_vectors, text_vectors
from lcl_mcore.evaluation.labelled import open_classification_dataset
from lcl_mcore.evaluation.loading import LoadedModel, reset_weights

TEMPLATES = ("{}", "a photo of a {}.", "a image of a {}.", "an image of the {}.")


def class_vectors(opened: LoadedModel, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Mean of a class's prompt vectors, unit length: fp32 [c, D]."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = text_vectors(opened, opened.tokenizer(), prompts)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=-1)


def zeroshot(
    opened: LoadedModel, data: Path, classnames: Path | None, templates: Path | None, limit: int
) -> dict[str, Any]:
    """Accuracy on the test split, and with random weights (left in the model).

    Raises:
        ConfigError: the file of class names does not fit the data set.
    """
    test = open_classification_dataset(data, "test", opened.config.model.vision.image_size).subset(limit, 0)
    names = tuple(classnames.read_text("utf-8").splitlines()) if classnames else test.classes
    if len(names) != len(test.classes):
        raise ConfigError(
            explain(
                f"{classnames}: {len(names)} names",
                f"the data set has {len(test.classes)} classes",
                "Give one name per line, in the order of the classes.",
            )
        )
    prompts = tuple(templates.read_text("utf-8").splitlines()) if templates else TEMPLATES
    opened.model.float()

    def numbers() -> dict[str, float]:
        logits = image_vectors(opened.model, test) @ class_vectors(opened, names, prompts).T
        top = logits.topk(min(5, len(names)), dim=1).indices
        hits = top == test.labels[:, None]
        return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(1).double().mean())}

    result: dict[str, Any] = {
        **opened.facts(),
        "task": "zeroshot",
        "data": str(data),
        "classes": len(names),
        "templates": list(prompts),
        "test_images": len(test),
        "trained": numbers(),
        "chance": {"top1": 1 / len(names)},
    }
    reset_weights(opened)
    majority = int(torch.bincount(test.labels).max()) / len(test)
    return {**result, "random_init": numbers(), "largest_class": {"top1": majority}}
