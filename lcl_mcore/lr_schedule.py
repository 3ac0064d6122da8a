"""Learning rate as a pure function of the step: nothing to save or restore."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, steps: int, warmup_steps: int, peak: float, floor: float = 0.0) -> float:
    """Rate of 0-based `step` of `steps`: linear warm-up to `peak`, then a cosine to `floor` (paper Table 7)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
