"""The paper's classifier on patch tokens (appendix A.2, after CAE): attention pool with one query, norm, linear layer.

Its training settings are given, as in the paper, or chosen on a validation part of the training images.

Shape legend
    n  images;  P  patch tokens;  h  their width;  c  classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.config.evaluation import ProbeConfig
from lcl_mcore.errors import NonFiniteError
from lcl_mcore.evaluation.embedding_metrics import require_finite
from lcl_mcore.evaluation.probes import test_scores, validation_part
from lcl_mcore.evaluation.transfer import Fit, fit_head
from lcl_mcore.rng import key63

LabelledBatch = tuple[Tensor, Tensor]
"""A classifier's input for n images, and their labels int64 [n]."""

Batches = Callable[[Tensor], LabelledBatch]
"""indices int64 [n] -> input and labels."""

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE_FACTOR, LOWEST_RATE, HIGHEST_RATE = 10**0.5, 1e-5, 0.2
FIRST_STEPS, MOST_STEPS, BATCH = 300, 19_200, 256
GAIN = 0.002
CRITERION = f"neither two nor four times the steps gained more than {GAIN:.1%} on the validation part"


class AttentionProbe(nn.Module):
    """tokens [n, P, h] -> logits [n, c]."""

    def __init__(self, width: int, heads: int, classes: int, seed: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(key63(seed, "probe"))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm_in(tokens)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return self.linear(self.norm_out(pooled[:, 0]))


def fit_classifier(
    forward: Callable[[Tensor], Tensor],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    batch: Batches,
    count: int,
    config: ProbeConfig,
    steps: int | None = None,
) -> Fit:
    """Train with cross-entropy.

    Args:
        forward: a batch's input -> logits [n, c].
        groups: parameters, and the factor on their learning rate.
        count: images in the training set.
        steps: None: those of `config.epochs`.
    """

    def backward(indices: Tensor, step: int) -> Tensor:
        inputs, labels = batch(indices)
        loss = F.cross_entropy(forward(inputs), labels)
        loss.backward()
        return loss.detach()

    steps = steps or max(1, round(config.epochs * count / min(config.batch_size, count)))
    return fit_head(backward, groups, count, steps, config)


@torch.no_grad()
def outputs(forward: Callable[[Tensor], Tensor], batch: Batches, count: int, size: int = 512) -> tuple[Tensor, Tensor]:
    """Logits [n, c] and labels [n] of all images, on the CPU."""
    logits, labels = [], []
    for indices in torch.arange(count).split(size):
        inputs, own = batch(indices)
        logits.append(forward(inputs).cpu())
        labels.append(own.cpu())
    return require_finite(torch.cat(logits), "a classifier's outputs"), torch.cat(labels)


def top1(forward: Callable[[Tensor], Tensor], batch: Batches, count: int, size: int = 512) -> float:
    """Share of images whose label has the highest logit."""
    logits, labels = outputs(forward, batch, count, size)
    return float((logits.argmax(1) == labels).double().mean())


def chosen_attention_probe(
    make: Callable[[], AttentionProbe], train: Batches, train_labels: Tensor, test: Batches, test_count: int, seed: int
) -> dict[str, Any]:
    """Rate and number of steps by validation accuracy, then trained on all training images.

    The rate is the best of `RATES` after `FIRST_STEPS`, the range being widened while the best is at its edge; the
    steps are doubled until that, and doubling them again, gains no more than `GAIN`.

    Args:
        make: a new probe, always the same.
        train_labels: int64 [n].
        test_count: number of test images.
    """
    fit, held = validation_part(train_labels, seed)
    config = ProbeConfig(batch_size=BATCH, warmup=0.1, seed=seed)
    tried: dict[tuple[float, int], float] = {}
    notes: list[str] = []

    def trained(rate: float, steps: int, indices: Tensor) -> AttentionProbe:
        probe = make()
        groups = [(list(probe.parameters()), 1.0)]
        fit_classifier(probe, groups, lambda i: train(indices[i]), len(indices), replace(config, lr=rate), steps)
        return probe

    def score(rate: float, steps: int) -> float:
        if (rate, steps) not in tried:
            try:
                tried[rate, steps] = top1(trained(rate, steps, fit), lambda i: train(held[i]), len(held))
            except NonFiniteError:  # this rate is too high: as bad as can be
                tried[rate, steps] = 0.0
        return tried[rate, steps]

    rate, steps, converged = RATES[1], 4 * FIRST_STEPS, False
    if len(held):
        rates, steps = sorted(RATES), FIRST_STEPS
        while True:
            rate = max(rates, key=lambda r: (score(r, FIRST_STEPS), -r))
            if rate == rates[-1] and rate * RATE_FACTOR <= HIGHEST_RATE:
                rates.append(rate * RATE_FACTOR)
            elif rate == rates[0] and rate / RATE_FACTOR >= LOWEST_RATE:
                rates.insert(0, rate / RATE_FACTOR)
            else:
                break
        if rate in (rates[0], rates[-1]):
            notes.append(f"the chosen rate {rate:.1g} is at the edge of what was tried")
        length, without_gain = steps, 0
        while length < MOST_STEPS and without_gain < 2:
            length *= 2
            gain = score(rate, length) - score(rate, steps)
            without_gain = 0 if gain > GAIN else without_gain + 1
            steps = length if gain > 0 else steps
        converged = without_gain == 2
        if not converged:
            notes.append(f"not converged after {length} steps: more would still raise it")
    else:
        notes.append("no class has two training images: rate and steps were not chosen")
    probe = trained(rate, steps, torch.arange(len(train_labels)))
    logits, labels = outputs(probe, test, test_count)
    return {
        **test_scores(logits, labels),
        "train_top1": top1(probe, train, len(train_labels)),
        "converged": converged,
        "chosen": {"lr": rate, "steps": steps, "batch_size": min(BATCH, len(train_labels))},
        "tried": [{"lr": r, "steps": s, "validation_top1": value} for (r, s), value in tried.items()],
        "warnings": notes,
    }
