"""Learning rate as a pure function of the step: nothing to save or restore."""

from __future__ import annotations

import math

from lcl_mcore.config.run import OptimConfig


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Rate of 0-based `step`: linear warm-up to `lr`, then a cosine to `min_lr` (paper Table 7)."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
