"""A document as it is stored: texts, images, and how the two belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lcl_mcore.data.untrusted_json import BadJsonError, clean_text

Kind = Literal["matched", "sequence", "pair"]
MAX_IMAGES = 1_000
MAX_TEXTS = 100_000


@dataclass(frozen=True)
class ImageEntry:
    """One stored image.

    name          the member's name after `KEY.`, for instance `0.jpg`
    text_index    matched: the text it belongs to; sequence: how many texts come before it; pair: 0
    similarity    matched: how well it fits that text (1 when unknown)
    """

    name: str
    width: int
    height: int
    codec: str
    sha256: str
    bytes: int
    text_index: int = 0
    similarity: float = 1.0


@dataclass(frozen=True)
class Document:
    """Texts and images of one document.

    matched   (MMC4) every image belongs to one of the texts
    sequence  (OBELICS) images stand between the texts
    pair      (LAION) one image; the texts are alternative captions of it
    """

    key: str
    kind: Kind
    texts: tuple[str, ...]
    images: tuple[ImageEntry, ...]

    def to_json(self, **more: Any) -> dict[str, Any]:
        """The object stored as `KEY.json`; field names follow MMC4 where it has one."""
        index_name = "matched_text_index" if self.kind == "matched" else "text_index"
        images = []
        for image in self.images:
            entry = {
                "image_name": image.name,
                "width": image.width,
                "height": image.height,
                "codec": image.codec,
                "sha256": image.sha256,
                "bytes": image.bytes,
                "verdict": "ok",
                index_name: image.text_index,
            }
            if self.kind == "matched":
                entry["matched_sim"] = round(image.similarity, 6)
            images.append(entry)
        return {"kind": self.kind, "text_list": list(self.texts), "image_info": images, **more}

    @staticmethod
    def from_json(key: str, data: dict[str, Any]) -> Document:
        """Check and read the object stored as `KEY.json`; `BadJsonError` says what is wrong."""
        kind: Any = data.get("kind")
        if kind not in get_args(Kind):
            raise BadJsonError(f"kind {kind!r} is not one of {get_args(Kind)}")
        texts, images = data.get("text_list"), data.get("image_info")
        if not isinstance(texts, list) or not isinstance(images, list):
            raise BadJsonError("text_list and image_info must be lists")
        if len(texts) > MAX_TEXTS or len(images) > MAX_IMAGES:
            raise BadJsonError(
                f"{len(texts)} texts and {len(images)} images, allowed {MAX_TEXTS} and {MAX_IMAGES}"
            )
        index_name = "matched_text_index" if kind == "matched" else "text_index"
        last = len(texts) if kind == "sequence" else max(len(texts) - 1, 0)
        entries = tuple(
            ImageEntry(
                name=_text(image, "image_name"),
                width=_whole(image, "width", 1, 1 << 20),
                height=_whole(image, "height", 1, 1 << 20),
                codec=_text(image, "codec"),
                sha256=_text(image, "sha256"),
                bytes=_whole(image, "bytes", 1, 1 << 30),
                text_index=_whole(image, index_name, 0, last),
                similarity=finite_number(image.get("matched_sim", 1.0)),
            )
            for image in images
        )
        return Document(key=key, kind=kind, texts=tuple(clean_text(text) for text in texts), images=entries)


def _whole(data: Any, name: str, low: int, high: int) -> int:
    value = data.get(name) if isinstance(data, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadJsonError(f"{name} = {value!r} is not an integer in {low}..{high}")
    return value


def _text(data: Any, name: str) -> str:
    return clean_text(data.get(name) if isinstance(data, dict) else None, max_chars=1_000)


def finite_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadJsonError(f"{value!r} is not a finite number")
    return float(value)
