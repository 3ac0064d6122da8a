"""Untrusted image files to upright 8-bit RGB, with the limits that keep a hostile file harmless."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 40_000_000
MAX_SIDE = 16_384
MAX_BYTES = 40 << 20
PILLOW_PIXELS = 2 * 89_478_485
"""Where Pillow itself refuses an image; also the limit in bytes of what is evaluated on."""
ORIENTATION = 0x0112


class BadImageError(ValueError):
    """Content that is not an image, or an image beyond the limits. `reason` is a short code."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def open_image(content: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Read the header only, and refuse what is too large before anything is decoded."""
    if not content:
        raise BadImageError("empty")
    if len(content) > max_bytes:
        raise BadImageError("too many bytes", f"{len(content)} > {max_bytes}")
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError("oversized", str(error)) from None
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, OverflowError) as error:
        raise BadImageError("undecodable", str(error)) from None
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImageError("undecodable", "no pixels")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadImageError("oversized", f"{width} x {height}")
    return image


def open_photograph(content: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Like `open_image`, for images that somebody chose to evaluate on: large ones are used.

    A JPEG of more than `max_pixels` is decoded at 1/2, 1/4 or 1/8 of its size; other formats, which cannot be, may
    have as many pixels and bytes as Pillow lets pass.
    """
    if content[:2] != b"\xff\xd8":
        return open_image(content, max_pixels=PILLOW_PIXELS, max_bytes=PILLOW_PIXELS)
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))  # `Image.open` refuses by the size before reduction
    except (OSError, SyntaxError, ValueError, struct.error, OverflowError, IndexError) as error:
        raise BadImageError("undecodable", str(error)) from None
    width, height = image.size
    for factor in (1, 2, 4, 8):
        if width * height <= max_pixels * factor**2 and max(width, height) <= MAX_SIDE * factor:
            image.draft(None, (width // factor, height // factor))
            return image
    raise BadImageError("oversized", f"{width} x {height}")


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode: first frame, turned as its EXIF data say, transparent parts white, 16 bits scaled to 8."""
    try:
        image.load()
        turned = ImageOps.exif_transpose(image)
        return _to_rgb(turned if turned is not None else image)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, OverflowError, EOFError) as error:
        raise BadImageError("undecodable", str(error)) from None
    except (IndexError, KeyError, TypeError, AttributeError, MemoryError) as error:
        # malformed metadata makes the library's parsers fail in these ways
        raise BadImageError("undecodable", f"{type(error).__name__} {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, scaled (not clipped) to 0..255."""
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("grey values that are not finite")
    top = 255.0 if values.max() <= 255.0 else 65535.0
    return np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
