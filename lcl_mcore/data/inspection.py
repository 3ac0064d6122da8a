"""A document as a page to look at, and the numbers of a data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from lcl_mcore.config.schema import DataConfig, SourceConfig
from lcl_mcore.data.format import Document, Members
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import SampleStream, span_from
from lcl_mcore.data.tokenized import MARKERS_PER_IMAGE, TokenizedDocument
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import KeyedRandom
from lcl_mcore.templates import data_url, render

SEQUENCES = 128  # packed for the statistics of a data set


class Inspector:
    """Tokenizes and packs the documents of one source as training does."""

    def __init__(self, config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, tokens_per_image: int) -> None:
        self._config = replace(config, sources=(source,))
        self._tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self._image_length = tokens_per_image + MARKERS_PER_IMAGE
        self._mixture = Mixture(self._config, tokenizer, tokens_per_image)
        self._data = self._mixture.datasets[source.label]

    def page(self, index: int, epoch: int = 0) -> str:
        """One document as HTML: images in place, tokens, `<BoI>` positions, what is skipped."""
        stored, members = self._data.document(index)
        document = self._mixture.document(SampleIndex(0, epoch, index))
        span = span_from(0, document, self._image_length) if document else None
        used = {segment.image for segment in span.segments} if span else set()
        tokens = span.length if span else 0
        return render(
            "document.html.j2",
            title=f"{self._data.name}/{members.shard}/{stored.key}",
            facts=f"{stored.kind}, {len(stored.texts)} texts, {len(stored.images)} images, {tokens} tokens",
            begin=span is not None and span.begin,
            segments=self._segments(document) if document else None,
            end=span is not None and span.end,
            skipped=[
                (self._image(stored, members, number), image.similarity)
                for number, image in enumerate(stored.images)
                if number not in used
            ],
            texts=stored.texts,
        )

    def statistics(self, sample: int = 1000) -> dict[str, Any]:
        """Counts of the whole set, and lengths and use over a keyed sample of documents."""
        total = len(self._data)
        chosen = range(total) if total <= sample else KeyedRandom("statistics").sample(total, sample)
        tokens: list[int] = []
        images: list[int] = []
        sides: list[int] = []
        kinds: Counter[str] = Counter()
        codecs: Counter[str] = Counter()
        unused = 0
        for index in chosen:
            stored, _ = self._data.document(index)
            kinds[stored.kind] += 1
            codecs.update(image.codec for image in stored.images)
            sides += [min(image.width, image.height) for image in stored.images]
            document = self._mixture.document(SampleIndex(0, 0, index))
            if document is None:
                unused += 1
                continue
            span = span_from(0, document, self._image_length)
            tokens.append(span.length)
            images.append(span.images)
        shown = ("documents", "images", "bytes", "fingerprint", "dropped_documents", "dropped_images")
        fill, per_sequence = self._packed() if tokens else (0.0, [])
        return {
            **{name: self._data.manifest.get(name) for name in shown},
            "sampled": len(chosen),
            "unused": unused,
            "kinds": dict(kinds),
            "codecs": dict(codecs),
            "tokens_per_document": _spread(tokens),
            "images_used_per_document": _spread(images),
            "shorter_side": _spread(sides),
            "longer_than_a_sequence": sum(size > self._config.sequence_length for size in tokens),
            "packing": self._mixture.documents_of(0).packings[0],
            "sequences_packed": len(per_sequence),
            "fill": round(fill, 4),
            "images_per_sequence": _spread(per_sequence),
        }

    def _packed(self) -> tuple[float, list[int]]:
        """Share of used tokens over the first sequences of one stream, and the images in each of them."""
        stream = SampleStream(self._config, self._mixture.documents_of(0), self._tokens_per_image)
        packed = [stream.next_sequence() for _ in range(SEQUENCES)]
        used = sum(span.length for sequence in packed for span in sequence)
        images = [sum(span.images for span in sequence) for sequence in packed]
        return used / (SEQUENCES * self._config.sequence_length), images

    def close(self) -> None:
        """Close the data set."""
        self._mixture.close()

    def _segments(self, document: TokenizedDocument) -> list[dict[str, Any]]:
        """What the page shows of each segment; `cut` is what lies beyond one sequence."""
        place = int(document.begin)
        shown = []
        for segment in document.segments:
            length = segment.length(self._image_length)
            is_image = segment.image >= 0
            shown.append(
                {
                    "first": place,
                    "length": length,
                    "cut": place + length > self._config.sequence_length,
                    "image": self._image(document.stored, document.members, segment.image) if is_image else None,
                    "tokens": [self._tokenizer.decode([i]) for i in segment.ids],
                }
            )
            place += length
        return shown

    def _image(self, stored: Document, members: Members, number: int) -> dict[str, str]:
        entry = stored.images[number]
        return {
            "source": data_url(self._data.image(stored, members, number, verify=False), entry.codec),
            "label": f"{entry.name} {entry.width} x {entry.height}",
        }


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {"mean": round(float(np.mean(values)), 1), "5%": low, "50%": middle, "95%": high, "max": max(values)}
