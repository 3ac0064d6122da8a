"""Image bytes to uint8 pixels of the crop window. Interface, and the backend that needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.crop import Window
from lcl_mcore.data.dataset import ImageDamagedError
from lcl_mcore.data.images import ORIENTATION, BadImageError, open_image, upright_rgb

GREY = 128
SPARE = 3  # resolution kept for the resize when a JPEG is decoded at a reduced scale


@dataclass(frozen=True)
class Job:
    """One image to decode: how to get its bytes, its upright size, the part to show."""

    read: Callable[[], bytes]
    width: int
    height: int
    window: Window


class Decoder(Protocol):
    """Decodes images in any grouping: the result of one never depends on the others."""

    name: str

    def decode(self, jobs: Sequence[Job], side: int) -> tuple[Tensor, list[str]]:
        """uint8 [n, 3, side, side], and per image the reason of its failure ('' if none; then grey)."""

    def close(self) -> None:
        """Give back threads and device memory."""


def build_decoder(config: DataConfig) -> Decoder:
    """The back end that a configuration asks for; `auto` takes DALI only where it has a GPU."""
    if config.decode_backend == "cpu":
        return CpuDecoder(config.decode_threads)
    from lcl_mcore.data import dali

    if config.decode_backend == "dali" or (torch.cuda.is_available() and dali.installed()):
        return dali.DaliDecoder(config.decode_threads)
    return CpuDecoder(config.decode_threads)


class CpuDecoder:
    """libjpeg-turbo for ordinary JPEGs, Pillow for everything else; resized by torch's bicubic kernel."""

    name = "cpu"

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, jobs: Sequence[Job], side: int) -> tuple[Tensor, list[str]]:
        """All images, on the pool's threads."""
        pixels = torch.empty((len(jobs), 3, side, side), dtype=torch.uint8)
        reasons = list(self._pool.map(lambda i: _decode_into(pixels[i], jobs[i], side), range(len(jobs))))
        return pixels, reasons

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _decode_into(target: Tensor, job: Job, side: int) -> str:
    """Fill `target` [3, side, side]; grey and a reason if that fails."""
    try:
        target.copy_(decode_one(job.read(), job, side))
        return ""
    except (BadImageError, ImageDamagedError) as error:
        target.fill_(GREY)
        return str(error)


def decode_one(content: bytes, job: Job, side: int) -> Tensor:
    """The crop window of one image, resized bicubically with antialiasing to [3, side, side]."""
    image = open_image(content)
    turned = image.getexif().get(ORIENTATION, 1)
    size = image.size[::-1] if turned > 4 else image.size
    if size != (job.width, job.height):
        raise BadImageError("wrong size", f"{size}, the manifest says {(job.width, job.height)}")
    pixels = _fast_jpeg(content, job, side) if image.format == "JPEG" and turned == 1 else None
    if pixels is None:
        pixels = np.asarray(upright_rgb(image))
    if pixels.shape[:2] != (job.height, job.width):
        return _resize_part(pixels, job, side)
    window = job.window
    rows, columns = (
        slice(window.top, window.top + window.height),
        slice(window.left, window.left + window.width),
    )
    return resize(torch.from_numpy(np.array(pixels[rows, columns])), side)


def resize(pixels: Tensor, side: int) -> Tensor:
    """uint8 [h, w, 3] to [3, side, side], bicubic with antialiasing.

    For uint8 with interleaved colours torch has a vectorised kernel; it agrees with Pillow's.
    """
    planes = pixels.permute(2, 0, 1)[None]
    return functional.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)[0]


def _resize_part(pixels: NDArray[np.uint8], job: Job, side: int) -> Tensor:
    """The same from a image decoded at a reduced scale.

    The window's edges then lie between pixels, which Pillow's resize can do; rounding them to whole
    pixels would move the image by several levels of brightness.
    """
    scale = round(8 * pixels.shape[1] / job.width) / 8  # JPEG scales are n/8; sizes are rounded up
    left, top = job.window.left * scale, job.window.top * scale
    right = min(left + job.window.width * scale, pixels.shape[1])
    bottom = min(top + job.window.height * scale, pixels.shape[0])
    image = Image.fromarray(pixels)
    resized = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _fast_jpeg(content: bytes, job: Job, side: int) -> NDArray[np.uint8] | None:
    """libjpeg-turbo without detours, at a reduced scale if `SPARE` times the wanted resolution remains.

    None if the optional package is missing, or the file is in any way unusual: Pillow then decides.
    """
    try:
        import simplejpeg
    except ImportError:
        return None
    wide = math.ceil(job.width * SPARE * side / job.window.width)
    high = math.ceil(job.height * SPARE * side / job.window.height)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, "RGB", min_width=wide, min_height=high, min_factor=2
        )
    except ValueError:
        return None
    return pixels
