"""From the bytes of an image to uint8 pixels of its crop window, on the CPU.

Decoders work in any grouping: the pixels of one image never depend on the others. An image that cannot be used
becomes grey, with the reason beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lcl_mcore.data.crop import Window
from lcl_mcore.data.format import ImageDamagedError
from lcl_mcore.data.images import (
    JPEG,
    MAX_PIXELS,
    BadImageError,
    may_be_turned,
    open_image,
    orientation,
    refuse_many_scans,
    upright_rgb,
)

GREY = 128
MAX_EXTRA, NEAR = 24, 1 / 16
"""How many pixels of the result a reduced image may begin earlier, to begin so near a whole pixel."""


@dataclass(frozen=True)
class DecodeTask:
    """One image to decode: how to get its bytes, its upright size in pixels, the part to show."""

    read: Callable[[], bytes]
    width: int
    height: int
    window: Window


class Decoder(Protocol):
    """Decodes images in any grouping: the result of one never depends on the others."""

    name: str

    def decode(self, tasks: Sequence[DecodeTask], side: int) -> tuple[Tensor, list[str]]:
        """uint8 [n, 3, side, side], and per image the reason of its failure ('' if none; then grey)."""

    def close(self) -> None:
        """Give back threads and device memory."""


class CpuDecoder:
    """libjpeg-turbo for ordinary JPEGs, Pillow for everything else; resized by torch's bicubic kernel."""

    name = "cpu"

    def __init__(self, threads: int, device: torch.device) -> None:
        self._threads = threads
        self._pinned = device.type == "cuda"  # copies to the device then do not wait
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, tasks: Sequence[DecodeTask], side: int) -> tuple[Tensor, list[str]]:
        """All images, on the pool's threads, each into its place."""
        pixels = torch.empty((len(tasks), 3, side, side), dtype=torch.uint8, pin_memory=self._pinned)
        places = pixels.unbind()
        reasons = [""] * len(tasks)
        numbers = iter(range(len(tasks)))  # every thread takes the next one

        def work() -> None:
            for i in numbers:
                reasons[i] = _decode_into(places[i], tasks[i], side)

        for worker in [self._pool.submit(work) for _ in range(min(self._threads, len(tasks)))]:
            worker.result()
        return pixels, reasons

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _decode_into(target: Tensor, task: DecodeTask, side: int) -> str:
    """Fill `target` [3, side, side]; grey and a reason if that fails."""
    try:
        target.copy_(decode_one(task.read(), task, side))
        return ""
    except (BadImageError, ImageDamagedError) as error:
        target.fill_(GREY)
        return str(error)


def decode_one(content: bytes, task: DecodeTask, side: int) -> Tensor:
    """The crop window of one image, resized bicubically with antialiasing: uint8 [3, side, side].

    Raises:
        BadImageError: it cannot be decoded, or has another size than its manifest entry says.
    """
    window = task.window
    if is_ordinary_jpeg(content, task):
        reduction = reduction_for(window, side)
        try:
            if reduction is not None:
                return reduction.resize(_reduced_jpeg(content, task, reduction.eighths), side)
            return resize(simplejpeg.decode_jpeg(content, "RGB"), window, side)
        except ValueError:  # Pillow says what is wrong with it, or knows better
            pass
    return resize(_any_format(content, task), window, side)


def is_ordinary_jpeg(content: bytes, task: DecodeTask) -> bool:
    """Whether libjpeg-turbo alone shows it as it is meant: upright, of the size in the manifest."""
    if not content.startswith(JPEG):
        return False
    refuse_many_scans(content)
    if may_be_turned(content) and orientation(open_image(content)) != 1:
        return False
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return False
    return (width, height) == (task.width, task.height) and width * height <= MAX_PIXELS


def _reduced_jpeg(content: bytes, task: DecodeTask, eighths: int) -> NDArray[np.uint8]:
    """Decoded at `eighths`/8 of its size, rounded up."""
    height, width = math.ceil(task.height * eighths / 8), math.ceil(task.width * eighths / 8)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width, min_factor=2)
    return pixels


def _any_format(content: bytes, task: DecodeTask) -> NDArray[np.uint8]:
    """Pillow, with everything that a file may say of how it is shown."""
    image = open_image(content)
    size = image.size[::-1] if orientation(image) > 4 else image.size
    if size != (task.width, task.height):
        raise BadImageError("wrong size", f"{size}, the manifest says {(task.width, task.height)}")
    return np.array(upright_rgb(image))  # a copy, because Pillow's pixels are read-only


def resize(pixels: NDArray[np.uint8], window: Window, side: int) -> Tensor:
    """The window of uint8 [h, w, 3] as [3, side, side], bicubic with antialiasing.

    For uint8 with interleaved colours torch has a vectorised kernel; it agrees with Pillow's.
    """
    part = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    return functional.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)[0]


# --- JPEGs decoded at a reduced scale, which spares most of the inverse transform and of the resize ---


@dataclass(frozen=True)
class ReducedAxis:
    """Pixels `first` to `last` - 1 are resized by `factor`; the window begins behind `extra` pixels of the result."""

    first: int
    last: int
    extra: int
    factor: float


@dataclass(frozen=True)
class Reduction:
    """A scale at which a JPEG is decoded, and what its rows and columns then need."""

    eighths: int
    rows: ReducedAxis
    columns: ReducedAxis

    def resize(self, pixels: NDArray[np.uint8], side: int) -> Tensor:
        """Like `resize`, from the reduced image."""
        rows, columns = self.rows, self.columns
        above, left = max(-rows.first, 0), max(-columns.first, 0)
        part = pixels[rows.first + above : rows.last, columns.first + left : columns.last]
        if above or left:
            part = np.pad(part, ((above, 0), (left, 0), (0, 0)), "edge")
        planes = torch.from_numpy(part).permute(2, 0, 1)[None]
        factors = (rows.factor, columns.factor)
        resized = functional.interpolate(planes, scale_factor=factors, mode="bicubic", antialias=True)[0]
        return resized[:, rows.extra : rows.extra + side, columns.extra : columns.extra + side]


def reduction_for(window: Window, side: int) -> Reduction | None:
    """The smallest scale that leaves a pixel for each one shown; None if that is more than half the size."""
    least = math.ceil(8 * side / min(window.width, window.height))
    for eighths in range(least, 5):
        scale = eighths / 8
        rows = reduced_axis(window.top * scale, window.height * scale, side)
        columns = reduced_axis(window.left * scale, window.width * scale, side)
        if rows and columns:
            return Reduction(eighths, rows, columns)
    return None


def reduced_axis(begin: float, length: float, side: int) -> ReducedAxis | None:
    """One axis of a window whose edges lie between pixels.

    Whole pixels instead would move the image by several levels of brightness. torch can end between pixels, but must
    begin with a whole one: so the result begins earlier, where it comes near one. None if that is nowhere.
    """
    step = length / side
    for extra in range(MAX_EXTRA):
        first = round(begin - extra * step)
        if abs(begin - extra * step - first) <= NEAR:
            factor = (extra + side) / (begin + length - first) * (1 + 1e-12)  # torch rounds the number of pixels down
            return ReducedAxis(first, math.ceil(begin + length), extra, factor)
    return None
