"""English names of the OpenMoji images, and which images are variants of one concept."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

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
