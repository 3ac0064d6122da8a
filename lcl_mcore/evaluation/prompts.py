"""Class names and prompt templates from text files: understood exactly, or refused.

Every way in which two classes would silently get the same prompt, or a class the prompt of another, is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.classification_data import ClassificationDataset, quoted
from lcl_mcore.untrusted import read_regular

TEMPLATES = ("{}", "a photo of a {}.", "a picture of a {}.", "an image of the {}.")
"""Our own; published zero-shot figures use longer lists (CLIP has 80 for ImageNet), which `--templates` takes."""

MAX_BYTES = 16 << 20

NAMES = ("", "0", "c", "class", "classname", "class_name", "name", "label")
"""What may stand between the braces for the name; CLIP_benchmark writes {c}."""

BRACES = re.compile(r"\{([^{}]*)\}")
CODE = re.compile(r"lambda\b|^[furb]{0,2}(['\"]).*\1,?$")


def read_lines(path: Path) -> list[str]:
    """Lines with text in them, without white space around them.

    Raises:
        ConfigError: the file cannot be read, is not UTF-8, or has no such line.
    """
    try:
        lines = [line.strip() for line in read_regular(path, MAX_BYTES).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(explain(path, f"cannot be read ({reason})", "Give a text file.")) from None
    found = [line for line in lines if line]
    if not found:
        raise ConfigError(explain(path, "is empty", "Give one entry per line."))
    return found


def read_templates(path: Path) -> tuple[str, ...]:
    """Prompts with `{}` for the name, however the file writes that.

    Raises:
        ConfigError: a line has no placeholder, several different ones, an unknown one, or is program text.
    """
    return tuple(_template(path, number, line) for number, line in enumerate(read_lines(path), 1))


def _template(path: Path, number: int, line: str) -> str:
    where, remedy = f"{path}: prompt {number}, {line!r}", "Write {} or {c} where the class's name goes."
    if CODE.search(line):
        raise ConfigError(explain(where, "is program text", "Give the prompt alone, without quotes or lambda."))
    names = set(BRACES.findall(line))
    if not names:
        raise ConfigError(explain(where, "has no place for the name, so all classes would get one prompt", remedy))
    if len(names) > 1 or not names <= set(NAMES):
        rule = "has several placeholders" if len(names) > 1 else f"has the unknown placeholder {{{names.pop()}}}"
        raise ConfigError(explain(where, rule, remedy))
    return BRACES.sub("{}", line)


def prompt_names(path: Path | None, data: ClassificationDataset) -> tuple[str, ...]:
    """The name in the prompts of each class of a data set, in the order of its classes.

    A file may hold `CLASS<tab>NAME` lines in any order; the classes' own names in any order; or, for classes that are
    numbers or other codes, a name per line in their order (line n + 1 for the number n).

    Raises:
        ConfigError: the classes are numbers and there is no file; names and classes are not as many; a class is
            missing; lines are in an order that contradicts the classes' own names; two classes have one name.
    """
    if path is None:
        if data.numbered:
            rule = f"its classes are known by number only ({quoted(data.classes, 3)})"
            raise ConfigError(explain(data.name, rule, "Name them with --classnames, a name per line."))
        return data.classes
    lines = read_lines(path)
    if all("\t" in line for line in lines):
        names = _by_class(path, lines, data.classes)
    else:
        names = _in_order(path, lines, data)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        rule = f"several classes are called {quoted(twice)}, and would get the same prompts"
        raise ConfigError(explain(path, rule, "Give each class a name of its own."))
    return names


def _by_class(path: Path, lines: Sequence[str], classes: Sequence[str]) -> tuple[str, ...]:
    entries = [line.split("\t", 1) for line in lines]
    names = {key.strip(): name.strip() for key, name in entries}
    missing = [name for name in classes if name not in names]
    if missing or len(names) < len(entries):
        rule = f"does not name class {quoted(missing)}" if missing else "names a class twice"
        raise ConfigError(explain(path, rule, "Give one line CLASS<tab>NAME for each class."))
    return tuple(names[name] for name in classes)


def _in_order(path: Path, lines: Sequence[str], data: ClassificationDataset) -> tuple[str, ...]:
    places = [int(name) for name in data.classes] if data.numbered else list(range(len(data.classes)))
    count = max(places) + 1
    if len(lines) != count:
        rule = f"the data set has {count} classes"
        raise ConfigError(explain(f"{path}: {len(lines)} names", rule, "Give one name for each class."))
    if set(lines) == set(data.classes):
        return data.classes
    own = set(data.classes)
    moved = [line for line, name in zip(lines, data.classes, strict=False) if line in own and line != name]
    if moved and not data.numbered:
        rule = f"{quoted(moved)} is a class, but not the one in that line's place"
        raise ConfigError(explain(path, rule, "Write CLASS<tab>NAME lines, which may be in any order."))
    return tuple(lines[place] for place in places)
