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

from lcl_mcore.evaluation.classification_data import open_test_split
from lcl_mcore.evaluation.embedding_metrics import require_finite
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.evaluation.prompts import TEMPLATES, prompt_names, read_templates
from lcl_mcore.evaluation.retrieval import image_embeds, text_embeds


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
        classnames: see `prompt_names`; None: the classes' own names.
        templates: a prompt per line, see `read_templates`; None: `TEMPLATES`.
        limit: test images used; 0: all.

    Raises:
        ConfigError: a file of names or prompts does not fit the data set or cannot be understood.
    """
    prompts = read_templates(templates) if templates else TEMPLATES
    test = open_test_split(data, loaded.config.model.vision.image_size).subset(limit, 0)
    names = prompt_names(classnames, test)

    def scores() -> dict[str, float]:
        logits = image_embeds(loaded.model, test) @ class_embeds(loaded, names, prompts).T
        top = require_finite(logits, "similarities").topk(min(5, len(names)), dim=1).indices
        hits = top == test.labels[:, None]
        return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(1).double().mean())}

    result: dict[str, Any] = {
        **loaded.facts(),
        "task": "zeroshot",
        "data": str(data),
        "classes": len(names),
        "names": list(names),
        "templates": list(prompts),
        "test_images": len(test),
        "skipped": dict(test.skipped),
        "classes_without_test_image": test.missing_classes(),
        "trained": scores(),
        "chance": {"top1": 1 / len(names), "top5": min(5 / len(names), 1.0)},
    }
    reset_weights(loaded)
    majority = int(torch.bincount(test.labels).max()) / len(test)
    return {**result, "random_init": scores(), "largest_class": {"top1": majority}}
