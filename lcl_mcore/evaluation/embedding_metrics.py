"""What is computed from embeddings alone: recall at k, effective rank, mean cosine.

Shape legend
    n  images;  k  captions of all images;  D  width of an embedding
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcl_mcore.errors import NonFiniteError, explain


def require_finite(values: Tensor, what: str) -> Tensor:
    """The same values.

    Raises:
        NonFiniteError: NaN or infinity among them, which comparisons would take for the best or the worst of all.
    """
    bad = int((~torch.isfinite(values)).flatten(1).any(1).sum()) if values.numel() else 0
    if bad:
        remedy = "Evaluate an earlier checkpoint, or look where training went wrong."
        raise NonFiniteError(explain(what, f"{bad} of {len(values)} are not finite", remedy))
    return values


@dataclass(frozen=True)
class Recall:
    """Share of queries with a partner among the k nearest candidates, by k.

    Attributes:
        image_to_text: some caption of an image among its k nearest captions.
        text_to_image: the image of a caption among its k nearest images.
        images: number of images.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int

    def mean(self, k: int) -> float:
        """Mean of both directions."""
        return 0.5 * (self.image_to_text[k] + self.text_to_image[k])


def recall_at(image: Tensor, text: Tensor, ks: Sequence[int] = (1, 5), image_of_text: Tensor | None = None) -> Recall:
    """Recall at each k of `ks`; ties count against the query. NaN without images, or if a vector is not finite.

    Args:
        image: unit vectors [n, D] on the CPU.
        text: unit vectors [k, D] on the CPU.
        image_of_text: int64 [k], the image of each caption; None: caption i belongs to image i.
    """
    if not len(image) or not bool(torch.isfinite(image).all() and torch.isfinite(text).all()):
        return Recall(dict.fromkeys(ks, float("nan")), dict.fromkeys(ks, float("nan")), len(image))
    if image_of_text is None:
        image_of_text = torch.arange(len(text))
    similarity = image.double() @ text.double().T
    own = image_of_text[None] == torch.arange(len(image))[:, None]  # [n, k]
    if not bool(own.any(1).all() and own.any(0).all()):
        raise ValueError("every image needs a caption, and every caption an image")
    # Rank 0: no candidate of another image is as near as the nearest partner.
    nearest_caption = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    caption_rank = ((similarity >= nearest_caption) & ~own).sum(1)
    image_rank = ((similarity >= similarity.gather(0, image_of_text[None])) & ~own).sum(0)

    def share(rank: Tensor) -> dict[int, float]:
        return {k: float((rank < k).double().mean()) for k in ks}

    return Recall(share(caption_rank), share(image_rank), len(image))


def chance(candidates: int, k: int, right: int = 1) -> float:
    """Recall at k of a random order of candidates, `right` of which are right."""
    if k >= candidates:
        return 1.0
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)


def nearest(image: Tensor, text: Tensor, k: int) -> Tensor:
    """Indices of the k captions nearest to each image, nearest first: int64 [n, k]."""
    return (image @ text.T).topk(min(k, len(text)), dim=1).indices


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred vectors [n, D] (Roy and Vetterli, 2007).

    1 for vectors on a line, D for a round cloud; 0 if all vectors are equal.
    """
    x = require_finite(vectors, "vectors").double()
    values = torch.linalg.svdvals(x - x.mean(0))
    total = values.sum()
    if float(total) <= 1e-9 * float(x.abs().max().clamp(min=1e-300)) * len(x):
        return 0.0
    shares = values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine of two different unit vectors of [n, D]: 1 when they have collapsed to a point."""
    n = len(vectors)
    total = float(vectors.double().sum(0).square().sum())
    return (total - n) / max(n * (n - 1), 1)
