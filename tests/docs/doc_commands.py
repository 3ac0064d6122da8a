"""What the documents tell a reader to type: commands, options, settings and links, as they stand in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
STARTS = (
    "python",
    "python3",
    "torchrun",
    "make",
    "sbatch",
    "srun",
    "scancel",
    "salloc",
    "pytest",
    "pip",
    "git",
    "bash",
    "sh",
    "docker",
    "enroot",
    "ruff",
    "mypy",
    "tensorboard",
    "apt-get",
    "curl",
    "wget",
    "conda",
    "uv",
    "cd",
)


@dataclass(frozen=True)
class Text:
    """One document, taken apart: lines of its blocks of code, and its pieces of `inline code`."""

    blocks: tuple[str, ...]
    inline: tuple[str, ...]


def take_apart(text: str) -> Text:
    """Blocks are fenced or indented by four columns; their lines are joined at a backslash, without comments."""
    blocks: list[str] = []
    prose: list[str] = []
    fenced, open_line, before = False, "", ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (not before.strip() or before.startswith("    "))):
            open_line = f"{open_line} {line.strip()}" if open_line else line.strip()
            if open_line.endswith("\\"):
                open_line = open_line[:-1].rstrip()
                continue
            blocks.append(re.sub(r"\s+#\s.*$", "", open_line))
            open_line = ""
        else:
            prose.append(line)
        before = line
    inline = re.findall(r"`([^`]+)`", "\n".join(prose))
    return Text(tuple(block for block in blocks if block), tuple(" ".join(code.split()) for code in inline))


def commands(text: Text) -> list[str]:
    """Everything that starts like a command and has at least one more word, without repeated blanks."""
    return [" ".join(line.split()) for line in (*text.blocks, *text.inline) if starts_like_a_command(line.split())]


def starts_like_a_command(words: list[str]) -> bool:
    """The first word, after settings of the environment, is a program; a lone name of a program is none."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    return len(words) > 1 and (words[0] in STARTS or words[0].startswith((".venv/bin/", "./")))


def options(text: Text) -> set[str]:
    """`--option` and `--section.option` of every piece of code."""
    code = "\n".join((*text.blocks, *text.inline))
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z][\w-]*)*", code))


def settings(text: Text) -> set[str]:
    """`section.name=value` and `section.name` of every piece of code that could be a setting of a run."""
    found = set()
    for code in (*text.blocks, *text.inline):
        for word in code.split():
            match = re.fullmatch(r"([a-z_]+(?:\.[a-z_0-9]+)+)(=\S+|:)?", word)
            if match:
                found.add(match[1])
    return found


def links(text: str) -> set[str]:
    """Targets inside the repository."""
    return {
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"[a-z]+:", target) and not target.startswith("#")
    }
