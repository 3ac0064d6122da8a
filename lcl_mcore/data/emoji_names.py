"""English names of the OpenMoji pictures, and which pictures are variants of one concept."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

SKIN = {chr(c) for c in range(0x1F3FB, 0x1F400)}
HAIR = {chr(c) for c in range(0x1F9B0, 0x1F9B4)}
IGNORED = SKIN | HAIR | {"\u2640", "\u2642", "\ufe0f", "\u200d"}
PERSON = {chr(c): "\U0001f9d1" for c in (0x1F468, 0x1F469, 0x1F9D1, 0x1F466, 0x1F467, 0x1F9D2)}
PERSON |= {chr(c): "\U0001f9d3" for c in (0x1F474, 0x1F475, 0x1F9D3)}
GENDERED = re.compile(
    r"\b(men|man|male|women|woman|female|boys?|girls?|person|people|child|adults?|older|old)\b"
)
TONES = re.compile(r"\b(medium-light|medium-dark|light|medium|dark) skin tone\b,?")
LOOKS = re.compile(r"\b(red|curly|white|blond|no) hair\b|\bbald\b|\bbeard\b")
FLAG = re.compile("^[\U0001f1e6-\U0001f1ff]{2}$")


@dataclass(frozen=True)
class Emoji:
    """One picture: its file's name, captions (the first is the plain name), and concept."""

    code: str
    captions: tuple[str, ...]
    concept: str
    variant: bool


def named_pictures(folder: Path) -> list[Emoji]:
    """All pictures that have an English name, grouped into concepts, in a fixed order."""
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
    concepts = _concepts({code: (found[code], captions[code][0]) for code in found})
    return [
        Emoji(code, captions[code], concepts[code], any(c in found[code] for c in SKIN | HAIR))
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


def _concepts(named: dict[str, tuple[str, str]]) -> dict[str, str]:
    """One label per picture; equal for pictures with the same base code points or the same base name."""
    parent: dict[str, str] = {}

    def root(x: str) -> str:
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for code, (text, name) in named.items():
        base = "".join(PERSON.get(c, c) for c in text if c not in IGNORED)
        for other in (f"code {base}", f"name {_base_name(name)}"):
            parent[root(code)] = root(other)
    members: dict[str, list[str]] = defaultdict(list)
    for code in named:
        members[root(code)].append(code)
    return {code: min(group, key=lambda c: (len(c), c)) for group in members.values() for code in group}


def _base_name(name: str) -> str:
    """The name without skin tone, hair and gender."""
    for pattern in (TONES, LOOKS, GENDERED):
        name = pattern.sub(" ", name)
    words = [
        word
        for word in re.split(r"[^a-z0-9&#*+.'-]+", name)
        if word not in ("", "and", "with", "skin", "tone")
    ]
    return " ".join(words) or "person"
