"""A document as a page to look at, and the numbers of a data set."""

from __future__ import annotations

import base64
import html
from collections import Counter
from typing import Any

import numpy as np

from lcl_mcore.config.schema import DataConfig, SourceConfig
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import Packer, chunk_from
from lcl_mcore.data.sample_stream import SampleStream, StreamState
from lcl_mcore.data.tokenized import TokenizedDocument
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.rng import KeyedRandom

ROWS = 128  # packed for the statistics of a data set
STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto} .cut{opacity:.35}
.t{border-bottom:1px dotted #aaa} .m{background:#dde;border-radius:3px;padding:0 .3em;font-size:80%}
img{max-width:20em;max-height:16em;display:block;margin:.4em 0} .n{color:#888;font-size:75%}"""


class Inspector:
    """Lays documents of one source out as training does."""

    def __init__(
        self, config: DataConfig, source: SourceConfig, tokenizer: Tokenizer, image_tokens: int
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._image_size = image_tokens + 2
        self._mix = Mixture(
            DataConfig(**{**config.__dict__, "sources": (source,)}),
            tokenizer,
            tokens_per_image=image_tokens,
            lanes=1,
            seed=0,
        )
        self._data = self._mix.datasets[source.label]

    def page(self, index: int, epoch: int = 0) -> str:
        """One document as HTML: images in place, tokens, `<BoI>` positions, what is left out."""
        stored, members = self._data.document(index)
        laid = self._mix.document(SampleIndex(0, epoch, index))
        used = {p.image for p in laid.pieces if p.image >= 0} if laid else set()
        parts = self._pieces(laid) if laid else ["<p>This document is not used under these settings.</p>"]
        left_out = [
            f"<div class=cut>{self._image(stored, members, i)}similarity {image.similarity:.3f}</div>"
            for i, image in enumerate(stored.images)
            if i not in used
        ]
        size = chunk_from(0, laid, self._image_size).size if laid else 0
        title = html.escape(f"{self._data.name}/{members.shard}/{stored.key}")
        facts = f"{stored.kind}, {len(stored.texts)} texts, {len(stored.images)} images, {size} tokens"
        rest = f"<h2>Left out</h2>{''.join(left_out)}" if left_out else ""
        texts = "".join(f"<p class=cut>{html.escape(text)}</p>" for text in stored.texts)
        return (
            f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
            f"<p>{facts}</p>{''.join(parts)}{rest}<h2>All texts as stored</h2>{texts}"
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
            laid = self._mix.document(SampleIndex(0, 0, index))
            if laid is None:
                unused += 1
                continue
            tokens.append(chunk_from(0, laid, self._image_size).size)
            images.append(sum(piece.image >= 0 for piece in laid.pieces))
        shown = ("documents", "images", "bytes", "fingerprint", "dropped_documents", "dropped_images")
        fill, per_row = self._packed() if tokens else (0.0, [])
        return {
            **{name: self._data.manifest.get(name) for name in shown},
            "sampled": len(chosen),
            "unused": unused,
            "kinds": dict(kinds),
            "codecs": dict(codecs),
            "tokens_per_document": _spread(tokens),
            "images_used_per_document": _spread(images),
            "shorter_side": _spread(sides),
            "longer_than_a_row": sum(size > self._config.sequence_length for size in tokens),
            "packing": self._config.packing,
            "rows_packed": len(per_row),
            "fill": round(fill, 4),
            "images_per_row": _spread(per_row),
        }

    def _packed(self) -> tuple[float, list[int]]:
        """Share of used tokens over the first rows of one lane, and the images in each of them."""
        config = self._config
        packer = Packer(config.sequence_length, self._image_size, config.min_fill, config.balance_images)
        lane = SampleStream(
            self._mix.lane(0),
            packer,
            packing=config.packing,
            block_rows=config.packing_rows,
            state=StreamState(),
        )
        rows = [lane.next_sequence() for _ in range(ROWS)]
        used = sum(chunk.size for row in rows for chunk in row)
        return used / (ROWS * config.sequence_length), [sum(chunk.images for chunk in row) for row in rows]

    def close(self) -> None:
        """Close the data set."""
        self._mix.close()

    def _pieces(self, laid: TokenizedDocument) -> list[str]:
        place = int(laid.begin)
        row = self._config.sequence_length
        parts = ["<span class=m>begin</span> "] if laid.begin else []
        for piece in laid.pieces:
            size = piece.size(self._image_size)
            cut = " class=cut" if place + size > row else ""
            if piece.image >= 0:
                mark = f"<span class=m>&lt;BoI&gt; at {place}</span>"
                image = self._image(laid.document, laid.members, piece.image)
                parts.append(f"<div{cut}>{mark}{image}<span class=n>{size} tokens</span></div>")
            else:
                words = (html.escape(self._tokenizer.decode([i])) for i in piece.ids)
                text = "".join(f"<span class=t>{word}</span>" for word in words)
                parts.append(f"<p{cut}>{text} <span class=n>{place}..{place + size - 1}</span></p>")
            place += size
        return [*parts, " <span class=m>end</span>"] if laid.end else parts

    def _image(self, document: Any, members: Any, number: int) -> str:
        entry = document.images[number]
        content = base64.b64encode(self._data.image(document, members, number, verify=False)).decode()
        kind = "jpeg" if entry.codec == "jpg" else entry.codec
        label = html.escape(f"{entry.name} {entry.width} x {entry.height}")
        return f"<img src='data:image/{kind};base64,{content}' title='{label}' alt='{label}'>"


def _spread(values: list[int]) -> dict[str, float]:
    if not values:
        return {}
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {
        "mean": round(float(np.mean(values)), 1),
        "5%": low,
        "50%": middle,
        "95%": high,
        "max": max(values),
    }
