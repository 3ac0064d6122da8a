"""One image as found to one image as stored, or the reason why it is dropped."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from PIL import Image, ImageFile

from lcl_mcore.data.format import ImageEntry
from lcl_mcore.data.images import MAX_PIXELS, BadImageError, decoding, is_wide, open_image, orientation, upright_rgb

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ImageLimits:
    """What an image must be to be kept. `shrink_to`: shorter side after shrinking (0: as it is)."""

    max_pixels: int = MAX_PIXELS
    min_side: int = 64
    max_aspect: float = 20.0
    shrink_to: int = 0


def normalise(content: bytes, limits: ImageLimits) -> tuple[bytes, str, int, int]:
    """Stored bytes, codec, width, height. Decodes once; `BadImageError` names the reason of a drop.

    Plain 8-bit RGB and grey images keep their bytes. Others (palette, alpha, 16 bits, CMYK, turned by
    EXIF, animated, other containers) are stored as what they show: JPEGs as JPEG, the rest as PNG.
    """
    image = open_image(content, max_pixels=limits.max_pixels)
    width, height = image.size
    if min(width, height) < limits.min_side:
        raise BadImageError("too small", f"{width} x {height}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadImageError("too narrow", f"{width} x {height}")
    container = image.format or ""
    plain = container in KEPT_FORMATS and image.mode in ("RGB", "L") and _is_plain(image)
    shrink = limits.shrink_to and min(width, height) > limits.shrink_to
    upright = upright_rgb(image)
    if plain and not shrink:
        return content, KEPT_FORMATS[container], width, height
    if shrink:
        factor = limits.shrink_to / min(upright.size)
        size = (round(upright.width * factor), round(upright.height * factor))
        upright = upright.resize(size, Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    if container in ("JPEG", "MPO"):
        upright.save(stored, "JPEG", quality=95, subsampling=0)
        return stored.getvalue(), "jpg", *upright.size
    upright.save(stored, "PNG")
    return stored.getvalue(), "png", *upright.size


def entry_for(number: int, stored: tuple[bytes, str, int, int], text_index: int, similarity: float) -> ImageEntry:
    """The manifest entry of a stored image."""
    content, codec, width, height = stored
    return ImageEntry(
        name=f"{number}.{codec}",
        width=width,
        height=height,
        codec=codec,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        text_index=text_index,
        similarity=similarity,
    )


def _is_plain(image: ImageFile.ImageFile) -> bool:
    """Nothing but one upright opaque frame of 8 bits."""
    if "transparency" in image.info or is_wide(image):
        return False
    try:
        with decoding():
            return getattr(image, "n_frames", 1) == 1 and orientation(image) == 1
    except BadImageError:
        return False  # broken metadata: store without it
