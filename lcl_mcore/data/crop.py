"""Which part of an image is shown: keyed windows for training, a centred square for evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcl_mcore.rng import KeyedRandom

ATTEMPTS = 10


@dataclass(frozen=True)
class Window:
    """A rectangle of whole pixels of the upright image."""

    left: int
    top: int
    width: int
    height: int


def random_window(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], random: KeyedRandom
) -> Window:
    """Random resized crop: a share of the area in `scale`, an aspect ratio in `ratio` (log-uniform).

    Follows the usual rule: a few attempts, then the largest centred window of an allowed ratio.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(ATTEMPTS):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Window(random.below(width - w + 1), random.below(height - h + 1), w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    return Window((width - w) // 2, (height - h) // 2, w, h)


def centre_window(width: int, height: int) -> Window:
    """The largest centred square: what resizing the shorter side and cropping the centre shows."""
    side = min(width, height)
    return Window((width - side) // 2, (height - side) // 2, side, side)
