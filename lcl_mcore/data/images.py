"""Untrusted image files to upright 8-bit RGB, with the limits that keep a hostile file harmless."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 40_000_000
MAX_SIDE = 16_384
MAX_BYTES = 40 << 20
PILLOW_PIXELS = 2 * 89_478_485
"""Where Pillow itself refuses an image; also the limit in bytes of what is evaluated on."""
MAX_SCANS = 200
"""Of a JPEG, those of embedded previews included. Each scan can cost the time of a whole image."""
ORIENTATION = 0x0112
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
SMALL_GREYS = {"L;2": 85, "L;4": 17}  # values of 2 and 4 bits are spread over 0..255, the transparent one is not
JPEG = b"\xff\xd8"
APP1 = 0xE1  # where EXIF data and XMP stand
TURNING = re.compile(  # the tag in both byte orders, unless the one short number 1 follows; and XMP's, unless it is 1
    rb"\x01\x12(?!\0\x03\0\0\0\x01\0\x01)|\x12\x01(?!\x03\0\x01\0\0\0\x01\0)|(?<!/)tiff:Orientation(?!(?:=\"|>)1)"
)
START_OF_SCAN = b"\xff\xda"  # cannot stand inside a scan's data


class BadImageError(ValueError):
    """Content that is not an image, or an image beyond the limits. `reason` is a short code."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@contextmanager
def decoding() -> Iterator[None]:
    """The boundary to the image library: whatever it raises on hostile bytes becomes `BadImageError`."""
    try:
        yield
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError("oversized", str(error)) from None
    except UnidentifiedImageError:
        raise BadImageError("not an image") from None
    except OSError as error:
        raise BadImageError("undecodable", str(error)) from None
    except Exception as error:  # its parsers fail on malformed content in every way there is
        raise BadImageError("undecodable", f"{type(error).__name__} {error}") from None


def open_image(content: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> ImageFile.ImageFile:
    """Read the header only, and refuse what is too large before anything is decoded."""
    if not content:
        raise BadImageError("empty")
    if len(content) > max_bytes:
        raise BadImageError("too many bytes", f"{len(content)} > {max_bytes}")
    refuse_many_scans(content)
    with decoding():
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImageError("undecodable", "no pixels")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise BadImageError("oversized", f"{width} x {height}")
    return image


def open_photograph(content: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Like `open_image`, for images that somebody chose to evaluate on: large ones are used.

    A JPEG of more than `max_pixels` is decoded at 1/2, 1/4 or 1/8 of its size; other formats, which cannot be, may
    have as many pixels and bytes as Pillow lets pass.
    """
    if not content.startswith(JPEG):
        return open_image(content, max_pixels=PILLOW_PIXELS, max_bytes=PILLOW_PIXELS)
    refuse_many_scans(content)
    with decoding():
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(content))  # `Image.open` refuses by the size before reduction
    width, height = image.size
    for factor in (1, 2, 4, 8):
        if width * height <= max_pixels * factor**2 and max(width, height) <= MAX_SIDE * factor:
            image.draft(None, (width // factor, height // factor))
            return image
    raise BadImageError("oversized", f"{width} x {height}")


def refuse_many_scans(content: bytes) -> None:
    """Raise `BadImageError` for a JPEG that would take too long."""
    if not content.startswith(JPEG):
        return
    values = np.frombuffer(content, np.uint8)
    scans = np.count_nonzero((values[:-1] == START_OF_SCAN[0]) & (values[1:] == START_OF_SCAN[1]))
    if scans > MAX_SCANS:
        raise BadImageError("too many scans", f"{scans} > {MAX_SCANS}")


def upright_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Decode: first frame, turned as its EXIF data say, transparent parts white, 16 bits scaled to 8."""
    with decoding():
        wide = is_wide(image)
        if image.mode == "L" and "transparency" in image.info:
            image.info["transparency"] *= SMALL_GREYS.get(str(image.tile[0].args), 1)
        image.load()
        turned = ImageOps.exif_transpose(image)
        return _to_rgb(image if turned is None else turned, image, wide)


def orientation(image: Image.Image) -> int:
    """How its EXIF data say that an image is turned: 1 is upright, from 5 on its sides are exchanged."""
    with decoding():
        return int(image.getexif().get(ORIENTATION, 1))


def may_be_turned(content: bytes) -> bool:
    """Whether something in a JPEG's header, up to its first scan, could say that it is not upright."""
    at = len(JPEG)
    while content[at : at + 2] != START_OF_SCAN:
        if content[at : at + 1] != b"\xff" or len(content) < at + 4:
            return True
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4])
        if content[at + 1] == APP1 and TURNING.search(content, at, end):
            return True
        at = end
    return False


def is_wide(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not yet decoded has more than 8 bits per value in its file."""
    modes = [tile.args if isinstance(tile.args, str) else (tile.args or ("",))[0] for tile in image.tile]
    return any("16" in str(mode) for mode in modes)


def _to_rgb(image: Image.Image, source: Image.Image, wide: bool) -> Image.Image:
    """`source` is the image as it was opened, with its format and tags."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image, source)).convert("RGB")
    if "transparency" in image.info and image.mode == "RGB" and wide:
        raise BadImageError("undecodable", "a transparent colour of 16 bits")  # the low bits are gone by now
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, source: Image.Image) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits, scaled (not clipped) to 0..255 from the range that the file's format states."""
    tags = source.tag_v2 if isinstance(source, TiffImagePlugin.TiffImageFile) else {}
    (bits,) = tags.get(BITS_PER_SAMPLE, (16,))
    if not (image.mode.startswith("I;16") or (image.mode == "I" and source.format in ("PNG", "PPM"))) or bits > 16:
        raise BadImageError("undecodable", f"grey values of type {image.mode}, whose range nothing states")
    top = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    scaled = (np.minimum(values, top) * 255 + top // 2) // top
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        scaled = 255 - scaled
    if "transparency" in image.info:
        scaled[values == image.info["transparency"]] = 255
    return scaled.astype(np.uint8)
