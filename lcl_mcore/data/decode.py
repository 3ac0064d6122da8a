"""Picture bytes to uint8 pixels of the crop window. Interface, and the backend that needs no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcl_mcore.config.data import DataConfig
from lcl_mcore.data.crop import Window
from lcl_mcore.data.dataset import PictureDamagedError
from lcl_mcore.data.pictures import ORIENTATION, BadPictureError, open_picture, upright_rgb

GREY = 128
SPARE = 1


@dataclass(frozen=True)
class Job:
    """One picture to decode: how to get its bytes, its upright size, the part to show."""

    read: Callable[[], bytes]
    width: int
    height: int
    window: Window


class Decoder(Protocol):
    """Decodes pictures in any grouping: the result of one never depends on the others."""

    name: str

    def decode(self, jobs: Sequence[Job], side: int) -> tuple[Tensor, list[str]]:
        """uint8 [n, 3, side, side], and per picture the reason of its failure ('' if none; then grey)."""

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
    """Pillow: JPEGs are decoded at the smallest sufficient scale, then resized bicubically."""

    name = "cpu"

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, jobs: Sequence[Job], side: int) -> tuple[Tensor, list[str]]:
        """All pictures, on the pool's threads."""
        pixels = torch.empty((len(jobs), 3, side, side), dtype=torch.uint8)
        rows = pixels.numpy()
        reasons = list(self._pool.map(lambda i: _decode_into(rows[i], jobs[i], side), range(len(jobs))))
        return pixels, reasons

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _decode_into(target: np.ndarray, job: Job, side: int) -> str:
    """Fill `target` [3, side, side]; grey and a reason if that fails."""
    try:
        target[:] = decode_one(job.read(), job, side)
        return ""
    except (BadPictureError, PictureDamagedError) as error:
        target[:] = GREY
        return str(error)


def decode_one(content: bytes, job: Job, side: int) -> np.ndarray:
    """The crop window of one picture, resized to [3, side, side]."""
    picture = open_picture(content)
    turned = picture.getexif().get(ORIENTATION, 1) > 4
    size = picture.size[::-1] if turned else picture.size
    if size != (job.width, job.height):
        raise BadPictureError("wrong size", f"{size}, the manifest says {(job.width, job.height)}")
    window = job.window
    if picture.format == "JPEG" and not turned:
        # Ask for the smallest built-in scale at which the window still has `side` pixels each way.
        side_wanted = SPARE * side
        wanted = (
            math.ceil(job.width * side_wanted / window.width),
            math.ceil(job.height * side_wanted / window.height),
        )
        picture.draft(None, wanted)
    upright = upright_rgb(picture)
    scale = round(job.width / upright.width)  # exactly 1, 2, 4 or 8; sizes are rounded up
    box = (
        window.left / scale,
        window.top / scale,
        min((window.left + window.width) / scale, upright.width),
        min((window.top + window.height) / scale, upright.height),
    )
    resized = upright.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized).transpose(2, 0, 1)
