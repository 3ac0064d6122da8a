"""Probes on frozen features that have converged, with settings chosen on a validation part of the training images.

Logistic regression is scikit-learn's, as in CLIP's linear probes (Radford et al. 2021, appendix A.3: L-BFGS, the
penalty chosen on a validation split). Nearest neighbours vote as in DINO (Caron et al. 2021, after Wu et al. 2018).

Shape legend
    n  images;  d  width of a feature;  c  classes
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.embedding_metrics import require_finite
from lcl_mcore.optional_packages import installed
from lcl_mcore.rng import key63

VALIDATION_SHARE, MOST_VALIDATION_IMAGES = 0.2, 10_000
PENALTIES = tuple(10.0**exponent for exponent in range(0, -10, -1))
"""Factors on half the squared weights, beside the mean loss. At 1 the weights are about the differences of the class
means; each smaller one starts from the weights of the one before."""
PATIENCE = 3
"""Penalties beyond the best one that are tried without a gain."""
TOLERANCE, ITERATIONS = 1e-4, 5000
LOGISTIC_CRITERION = (
    f"L-BFGS: no component of the mean loss's gradient above {TOLERANCE} within {ITERATIONS} iterations (scikit-learn)"
)
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 10, 0.07
LEFT_OUT_IMAGES = 10_000
"""Training images, at most, whose own neighbours are asked for the training accuracy of nearest neighbours."""


@dataclass(frozen=True)
class LabelledFeatures:
    """One feature vector per image.

    Attributes:
        vectors: fp32 [n, d] on the CPU.
        labels: int64 [n].
    """

    vectors: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> LabelledFeatures:
        """The images of some indices."""
        return LabelledFeatures(self.vectors[indices], self.labels[indices])


# --- intervals


def wilson_interval(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of independent images (Wilson 1927)."""
    share, spread = hits / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean over seeds, by Student's t; needs two at least."""
    from scipy.stats import t  # comes with scikit-learn

    n, mean = len(values), sum(values) / len(values)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def test_scores(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """top1 with its interval, and top5, of logits [n, c]."""
    top = require_finite(logits, "a classifier's outputs").topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    first = int(hits[:, 0].sum())
    return {
        "top1": first / len(labels),
        "top1_interval": list(wilson_interval(first, len(labels))),
        "top5": float(hits.any(1).double().mean()),
    }


# --- the validation part


def validation_part(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to fit and to validate on: a share of every class that has more than one image, drawn with the seed.

    No image is left to validate on if no class has two.
    """
    generator = torch.Generator().manual_seed(key63(seed, "validation"))
    share = min(VALIDATION_SHARE, MOST_VALIDATION_IMAGES / len(labels))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        count = 0 if len(own) == 1 else max(int(share * len(own)), 1)
        held[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


# --- logistic regression


def require_scikit_learn() -> None:
    """Fail before any work.

    Raises:
        ConfigError: scikit-learn is missing.
    """
    if not installed("scikit-learn", "sklearn", "scikit-learn").usable:
        remedy = "pip install 'lcl-mcore[evaluation]', or use --probe paper."
        raise ConfigError(explain("converged probes", "need scikit-learn", remedy))


def standardise(fit: Tensor, *others: Tensor) -> list[Tensor]:
    """[n, d] -> the same with mean 0 and deviation 1 in the first set; features that never change become 0."""
    mean, deviation = fit.double().mean(0), fit.double().std(0, correction=0)
    tiny = deviation <= 1e-12 + 1e-6 * mean.abs()
    scale = torch.where(tiny, 0.0, 1 / deviation.masked_fill(tiny, 1.0))
    return [((x - mean.float()) * scale.float()) for x in (fit, *others)]


def logistic_regression(train: LabelledFeatures, test: LabelledFeatures, classes: int, seed: int) -> dict[str, Any]:
    """Multinomial, on standardised features: the penalty is chosen on a validation part, then all images are fitted."""
    fit_indices, held_indices = validation_part(train.labels, seed)
    notes: list[str] = []
    tried: dict[float, float] = {}
    chosen = 1 / len(train)
    if len(held_indices):
        fit, held = train.select(fit_indices), train.select(held_indices)
        model = _Logistic(classes)
        x, y = standardise(fit.vectors, held.vectors)
        for number, penalty in enumerate(PENALTIES):
            model.fit(x, fit.labels, penalty)
            tried[penalty] = float((model.logits(y).argmax(1) == held.labels).double().mean())
            chosen = max(tried, key=lambda p: (tried[p], p))
            waited = number - PENALTIES.index(chosen)
            if waited >= PATIENCE and tried[chosen] > 1.5 * chance_of(held.labels):
                break
        if chosen in (PENALTIES[0], PENALTIES[-1]):
            notes.append(f"the chosen penalty {chosen:.0e} is at the edge of what was tried")
    else:
        notes.append(f"no class has two training images: the penalty {chosen:.1g} was not chosen")
    final = _Logistic(classes)
    x, y = standardise(train.vectors, test.vectors)
    converged, iterations = final.fit(x, train.labels, chosen)
    if not converged:
        notes.append(f"not converged after {iterations} iterations: more would still change it")
    return {
        **test_scores(final.logits(y), test.labels),
        "train_top1": float((final.logits(x).argmax(1) == train.labels).double().mean()),
        "converged": converged,
        "iterations": iterations,
        "chosen": {"penalty": chosen},
        "tried": [{"penalty": penalty, "validation_top1": value} for penalty, value in tried.items()],
        "warnings": notes,
    }


def chance_of(labels: Tensor) -> float:
    """Share of the most frequent label: what features that say nothing reach."""
    return float(labels.bincount().max()) / len(labels)


class _Logistic:
    """scikit-learn's estimator, with logits for all classes, those without a training image included."""

    def __init__(self, classes: int) -> None:
        from sklearn.linear_model import LogisticRegression

        self.classes = classes
        self.model = LogisticRegression(tol=TOLERANCE, max_iter=ITERATIONS, warm_start=True)

    def fit(self, x: Tensor, labels: Tensor, penalty: float) -> tuple[bool, int]:
        """Whether it converged, and after how many iterations."""
        from sklearn.exceptions import ConvergenceWarning

        self.model.set_params(C=1 / (penalty * len(labels)))  # scikit-learn sums the loss over the images
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            self.model.fit(require_finite(x, "features").numpy(), labels.numpy())
        return not any(issubclass(w.category, ConvergenceWarning) for w in caught), int(self.model.n_iter_.max())

    def logits(self, x: Tensor) -> Tensor:
        """[n, d] -> fp32 [n, c]."""
        found = torch.from_numpy(self.model.decision_function(x.numpy())).float()
        if found.dim() == 1:  # two classes: the second's margin
            found = torch.stack((-found, found), 1)
        logits = torch.full((len(x), self.classes), torch.finfo(torch.float32).min)
        logits[:, torch.from_numpy(self.model.classes_)] = found
        return logits


# --- nearest neighbours


def nearest_neighbours(train: LabelledFeatures, test: LabelledFeatures, classes: int, seed: int) -> dict[str, Any]:
    """The most similar training images by cosine vote with weight exp(cosine / temperature).

    Nothing is fitted; the training accuracy is that of training images which do not vote for themselves.
    """
    known = F.normalize(require_finite(train.vectors, "features"), dim=1)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(key63(seed, "neighbours")))
    own = order[:LEFT_OUT_IMAGES]
    unseen = F.normalize(require_finite(test.vectors, "features"), dim=1)
    left = _votes(known, train.labels, known[own], classes, own)
    return {
        **test_scores(_votes(known, train.labels, unseen, classes, None), test.labels),
        "train_top1": float((left.argmax(1) == train.labels[own]).double().mean()),
        "chosen": {"k": min(NEIGHBOURS, len(train)), "temperature": NEIGHBOUR_TEMPERATURE},
        "warnings": [],
    }


def _votes(known: Tensor, labels: Tensor, queries: Tensor, classes: int, own: Tensor | None) -> Tensor:
    """Votes [n, c] of the neighbours of `queries`, which are the images `own` of `known` if they are among them."""
    votes = torch.zeros(len(queries), classes)
    count = min(NEIGHBOURS, len(known) - (own is not None))
    for part in torch.arange(len(queries)).split(512):
        similarity = queries[part] @ known.T
        if own is not None:
            similarity[torch.arange(len(part)), own[part]] = -torch.inf
        cosine, index = similarity.topk(count, dim=1)
        votes[part] = votes[part].scatter_add(1, labels[index], (cosine / NEIGHBOUR_TEMPERATURE).exp())
    return votes
