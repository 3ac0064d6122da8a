"""A classifier trained on an encoder's patch tokens: attention pool with one query, norm, linear layer.

The probe of the paper (appendix A.2, after CAE): the pool is new, not the one of pre-training.

Shape legend
    n  images;  P  patch tokens;  h  their width;  c  classes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.config.evaluation import FitConfig, ProbeConfig
from lcl_mcore.errors import NonFiniteError, explain
from lcl_mcore.rng import key_of

Batch = tuple[Tensor, Tensor]
"""What the model takes for n images, and their labels int64 [n]."""


class AttentionProbe(nn.Module):
    """tokens [n, P, h] -> logits [n, c]."""

    def __init__(self, width: int, heads: int, classes: int, seed: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.linear = nn.Linear(width, classes)
        generator = torch.Generator().manual_seed(key_of(seed, "probe"))
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm_in(tokens)
        pooled, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return self.linear(self.norm_out(pooled[:, 0]))


class PixelProbe(nn.Module):
    """The raw-pixel baseline that needs no positions: one linear layer over all pixels [n, ...] -> [n, c]."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Factor on the peak: linear warm-up over this share of the steps, then cosine to 0."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def fit_head(
    backward: Callable[[Tensor, int], Tensor],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    count: int,
    steps: int,
    config: FitConfig,
    note: Callable[[str], None] = lambda line: None,
) -> float:
    """AdamW over random batches; every sample is used once before any is used again.

    Args:
        backward: indices int64 [batch], step -> their loss, detached; adds its gradient to the parameters.
        groups: parameters, and the factor on their learning rate.
        count: samples in the training set.
        note: told the loss ten times.

    Returns:
        Mean loss of the last tenth of the steps, nats.

    Raises:
        NonFiniteError: the loss diverged.
    """
    size = min(config.batch_size, count)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "factor": factor} for parameters, factor in groups if len(parameters)],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    generator = torch.Generator().manual_seed(key_of(config.seed, "order"))
    order, late = torch.empty(0, dtype=torch.int64), []
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        indices, order = order[:size], order[size:]
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["factor"] * learning_rate(step, steps, config.warmup)
        optimizer.zero_grad(set_to_none=True)
        loss = backward(indices, step)
        optimizer.step()
        if step >= min(0.9 * steps, steps - 1):
            late.append(loss)
        if (step + 1) % max(steps // 10, 1) == 0:
            note(f"step {step + 1} of {steps}: loss {float(loss):.4f}")
    mean = float(torch.stack(late).mean())
    if not math.isfinite(mean):
        raise NonFiniteError(
            explain(f"mean loss {mean}", "training has diverged", "Lower --lr, or raise --warmup.")
        )
    return mean


def fit(
    forward: Callable[[Tensor], Tensor],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    batch: Callable[[Tensor], Batch],
    count: int,
    config: ProbeConfig,
) -> float:
    """Train with cross-entropy.

    Args:
        forward: a batch's input -> logits [n, c].
        groups: parameters, and the factor on their learning rate.
        batch: indices int64 [n] -> input and labels.
        count: images in the training set.

    Returns:
        Mean loss of the last tenth of the steps, nats.
    """

    def backward(indices: Tensor, step: int) -> Tensor:
        inputs, labels = batch(indices)
        loss = F.cross_entropy(forward(inputs), labels)
        loss.backward()
        return loss.detach()

    steps = max(1, round(config.epochs * count / min(config.batch_size, count)))
    return fit_head(backward, groups, count, steps, config)


@torch.no_grad()
def accuracy(
    forward: Callable[[Tensor], Tensor],
    batch: Callable[[Tensor], Batch],
    count: int,
    ks: tuple[int, ...] = (1, 5),
    size: int = 512,
) -> dict[str, float]:
    """Share of images whose label is among the k highest logits."""
    hits = dict.fromkeys(ks, 0)
    for indices in torch.arange(count).split(size):
        inputs, labels = batch(indices)
        logits = forward(inputs)
        top = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
        for k in ks:
            hits[k] += int((top[:, :k] == labels[:, None]).any(1).sum())
    return {f"top{k}": hits[k] / count for k in ks}
