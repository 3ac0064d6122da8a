"""Recall at k between images and texts, each row of one belonging to the same row of the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recall:
    """Share of queries whose partner is among the k nearest, by direction."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    candidates: int

    def mean(self, k: int) -> float:
        """Both directions together."""
        return 0.5 * (self.image_to_text[k] + self.text_to_image[k])


def recall_at(image: Tensor, text: Tensor, ks: tuple[int, ...] = (1, 5)) -> Recall:
    """image, text [n, D] unit vectors -> recall. Ties count against the query."""
    similarity = image.double() @ text.double().T
    return Recall(_direction(similarity, ks), _direction(similarity.T, ks), similarity.shape[0])


def _direction(similarity: Tensor, ks: tuple[int, ...]) -> dict[int, float]:
    own = similarity.diagonal()[:, None]
    others = ~torch.eye(len(similarity), dtype=torch.bool)
    rank = ((similarity >= own) & others).sum(1)  # 0: nothing else is as near
    return {k: float((rank < k).double().mean()) for k in ks}


def chance(candidates: int, k: int) -> float:
    """Recall of a random order."""
    return min(k / max(candidates, 1), 1.0)


def nearest(image: Tensor, text: Tensor, k: int) -> Tensor:
    """Indices of the k texts nearest to each image, [n, k]."""
    return (image @ text.T).topk(min(k, len(text)), dim=1).indices
