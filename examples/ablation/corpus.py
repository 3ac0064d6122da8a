"""Interleaved documents for the ablation: pages of Debian's documentation packages, with the words near each image.

A page's text is far longer than what minutes on a CPU can read, so of the text between two images only the last
words are kept. Whole pages are held out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.prepare.normalise import ImageLimits
from lcl_mcore.data.prepare.records import Dropped, InputPart, RawDocument
from lcl_mcore.data.tokenizer import train_bpe
from lcl_mcore.rng import key64

WORDS = 24
SIDE = 96  # images are stored near the size that is trained on: decoding large ones would take most of the time
HELDOUT_SHARE = 10  # one page in so many
PACKAGES = ("python-skimage-doc", "python-sklearn-doc", "opencv-doc")


class NearbyWords(HtmlReader):
    """`HtmlReader` of one split, with short texts."""

    def __init__(self, source: Path, *, heldout: bool) -> None:
        super().__init__(source)
        self._heldout = heldout
        self._pages = [path for path in self._pages if self._wanted(str(path.relative_to(self._root)))]

    def _wanted(self, page: str) -> bool:
        """Of OpenCV only the tutorials: its other pages show class diagrams. Whole pages are on one side."""
        if "opencv" in page and "tutorial" not in page:
            return False
        return (key64("ablation", page) % HELDOUT_SHARE == 0) == self._heldout

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The pages of one part."""
        for found in super().documents(part):
            yield found if isinstance(found, Dropped) else shorten(found)

    def describe(self) -> dict[str, Any]:
        """Also the split and the number of words."""
        return {**super().describe(), "words": WORDS, "heldout": self._heldout}


def shorten(document: RawDocument) -> RawDocument:
    """Keep the last words before every image; an image right behind another keeps that place."""
    texts: list[str] = []
    images, previous = [], 0
    for image in sorted(document.images, key=lambda image: image.text_index):
        words = " ".join(document.texts[previous : image.text_index]).split()[-WORDS:]
        texts += [" ".join(words)] if words else []
        images.append(replace(image, text_index=len(texts)))
        previous = image.text_index
    words = " ".join(document.texts[previous:]).split()[:WORDS]
    texts += [" ".join(words)] if words else []
    return replace(document, texts=tuple(texts), images=tuple(images))


def build(pages: Path, output: Path, vocabulary: int) -> None:
    """`train/`, `heldout/` and `tokenizer.json` in `output`; what is done already is left alone."""
    options = PrepareOptions(limits=ImageLimits(min_side=32, shrink_to=SIDE), max_repeats=30)
    for name in ("train", "heldout"):
        prepare(NearbyWords(pages, heldout=name == "heldout"), output / name, options, workers=2, quiet=True)
    path = output / "tokenizer.json"
    if not path.exists():
        data = NativeDataset(str(output / "train"))
        texts = (text for i in range(len(data)) for text in data.document(i)[0].texts)
        part = path.with_suffix(".part")
        train_bpe(texts, vocabulary).save(part)
        part.replace(path)
        data.close()
