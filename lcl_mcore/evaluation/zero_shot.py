"""Zero-shot classification: an image's vector against the context vectors of prompts with the class names.

Shape legend
    c  classes;  D  LM width
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.datasets import open_classification_dataset
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.evaluation.retrieval import image_embeds, text_embeds

TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.", "an image of the {}.")


def class_embeds(loaded: LoadedModel, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Mean of each class's prompt vectors, unit length: fp32 [c, D] on the CPU."""
    prompts = [template.replace("{}", name) for name in names for template in templates]
    vectors = text_embeds(loaded, prompts)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=-1)


def zero_shot(
    loaded: LoadedModel, data: Path, classnames: Path | None, templates: Path | None, limit: int
) -> dict[str, Any]:
    """Accuracy on the test split, and with random weights (which stay in the model).

    Args:
        classnames: a name per line, in the order of the classes; None: those of the data set.
        templates: a prompt per line with `{}` for the name; None: `TEMPLATES`.
        limit: test images used; 0: all.

    Raises:
        ConfigError: the file of class names does not fit the data set.
    """
    test = open_classification_dataset(data, "test", loaded.config.model.vision.image_size).subset(limit, 0)
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

    def scores() -> dict[str, float]:
        logits = image_embeds(loaded.model, test) @ class_embeds(loaded, names, prompts).T
        top = logits.topk(min(5, len(names)), dim=1).indices
        hits = top == test.labels[:, None]
        return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(1).double().mean())}

    result: dict[str, Any] = {
        **loaded.facts(),
        "task": "zeroshot",
        "data": str(data),
        "classes": len(names),
        "templates": list(prompts),
        "test_images": len(test),
        "trained": scores(),
        "chance": {"top1": 1 / len(names)},
    }
    reset_weights(loaded)
    majority = int(torch.bincount(test.labels).max()) / len(test)
    return {**result, "random_init": scores(), "largest_class": {"top1": majority}}
