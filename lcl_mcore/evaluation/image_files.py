"""Image files to uint8 pixels of one size, decoded on threads; and which files of a folder are images.

Shape legend
    m  images of one call;  S  side in pixels
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lcl_mcore.data.crop import centre_window
from lcl_mcore.data.images import PILLOW_PIXELS, BadImageError, open_photograph, upright_rgb
from lcl_mcore.errors import DataError, explain
from lcl_mcore.untrusted import read_regular

Fetch = Callable[[Sequence[int]], Tensor]
"""indices -> uint8 RGB [m, 3, S, S], centre-cropped and resized."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir")


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden (`.ipynb_checkpoints`, `._a.jpg`) or an archiver's own."""
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in PurePosixPath(name).parts)


def is_image(name: str) -> bool:
    """Whether a file has the name of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def files_below(folder: Path, skipped: Counter[str]) -> Iterator[str]:
    """Paths of images below a folder, relative to it and sorted; links to folders are followed, each folder once.

    Args:
        skipped: files that are not used are counted here, by reason.
    """
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            path = os.path.relpath(os.path.join(root, name), folder)
            if is_hidden(path):
                skipped["hidden"] += 1
            elif not is_image(path):
                skipped["not an image by its name"] += 1
            else:
                yield path


def image_fetcher(read: Callable[[int], tuple[str, bytes]], image_size: int) -> Fetch:
    """Fetch images by index, decoding on threads.

    Args:
        read: index -> name for messages, and stored bytes.

    Returns:
        indices -> uint8 [m, 3, S, S]. An image that cannot be read or decoded raises a `DataError` that names it,
        since one that is skipped would falsify the scores.
    """
    pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="evaluation-decode")

    def one(index: int) -> Tensor:
        name, content = read(index)
        try:
            return _decode(content, image_size)
        except BadImageError as error:
            raise DataError(explain(name, f"cannot be decoded ({error})", "Repair or remove it.")) from None

    return lambda indices: torch.stack(list(pool.map(one, indices)))


def read_once(fetch: Fetch, count: int) -> None:
    """Decode all of a test split before anything is trained: a damaged image ends the command now, not after hours."""
    for start in range(0, count, 256):
        fetch(range(start, min(start + 256, count)))


def read_file(path: Path, limit: int = PILLOW_PIXELS) -> tuple[str, bytes]:
    """A file's name for messages, and its content, at most `limit` bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return str(path), read_regular(path, limit)
    except OSError as error:
        raise DataError(explain(path, f"cannot be read ({error.strerror})", "Repair or remove it.")) from None


def _decode(content: bytes, image_size: int) -> Tensor:
    """An image's centred square, uint8 [3, S, S]."""
    pixels = torch.from_numpy(np.array(upright_rgb(open_photograph(content))))
    window = centre_window(pixels.shape[1], pixels.shape[0])
    cut = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
    planes = cut.permute(2, 0, 1)[None]
    return functional.interpolate(planes, size=(image_size, image_size), mode="bicubic", antialias=True)[0]
