"""Files and texts that others wrote: regular files alone, of bounded size, parsed within bounds.

What is wrong with a file is an `OSError` whose `strerror` says it; what is wrong with its text a `ValueError`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import yaml

MAX_YAML_BYTES = 256 << 10
MAX_YAML_VALUES = 100_000
"""Values of a YAML text with every alias written out."""
MAX_YAML_DEPTH = 32
MAX_NUMBER = 1000
_TEXT = "tag:yaml.org,2002:str"


# --- files ---


def open_regular(path: Path | str, flags: int = os.O_RDONLY) -> BinaryIO:
    """Open a regular file: unbuffered for writing, else buffered. Never waits for the other end of a pipe.

    Raises:
        OSError: there is none, or something else is in its place.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except ValueError as error:  # a NUL in the path
        raise FileNotFoundError(errno.ENOENT, str(error), str(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    writing = flags & (os.O_WRONLY | os.O_RDWR)
    return os.fdopen(descriptor, "r+b" if writing else "rb", buffering=0 if writing else -1)  # type: ignore[return-value]


def read_regular(path: Path | str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: there is none, it cannot be read, or it is longer.
    """
    with open_regular(path) as file:
        content = b"" if os.fstat(file.fileno()).st_size > limit else file.read(limit + 1)
        if len(content) > limit or (not content and os.fstat(file.fileno()).st_size):
            size = os.fstat(file.fileno()).st_size
            raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are read", str(path))
    return content


# --- YAML ---


class BadYamlError(ValueError):
    """Text that is not YAML, or YAML that this project does not accept.

    Attributes:
        line: where, counted from 1; None if nobody knows.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


def parse_yaml(text: bytes | str) -> Any:
    """The value of one YAML text of plain values, lists and mappings.

    Raises:
        BadYamlError: it is too long or deep, has a key twice, or aliases that multiply or contain themselves.
    """
    import yaml

    if len(text) > MAX_YAML_BYTES:
        raise BadYamlError(f"has {len(text)} bytes, at most {MAX_YAML_BYTES} are read")
    try:
        loader = yaml.SafeLoader(text.decode("utf-8") if isinstance(text, bytes) else text)
        root = loader.get_single_node()
        if root is None:
            return None
        _measure(root, {}, set())
        return loader.construct_document(root)
    except BadYamlError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise BadYamlError("is not YAML", mark.line + 1 if mark else None) from None
    except RecursionError:
        raise BadYamlError("is nested too deeply") from None
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise BadYamlError(f"is not YAML ({error})") from None  # the library's converters, on `!!bool x` or 4999-99-99


def _measure(node: yaml.Node, done: dict[yaml.Node, tuple[int, int]], inside: set[yaml.Node]) -> tuple[int, int]:
    """Number of values below a node with all aliases written out, and their depth."""
    import yaml

    if node in done:
        return done[node]
    line = node.start_mark.line + 1
    if node in inside:
        raise BadYamlError("has an alias that contains itself", line)
    if isinstance(node, yaml.ScalarNode) and node.tag != _TEXT and len(node.value) > MAX_NUMBER:
        raise BadYamlError(f"has a number of {len(node.value)} characters", line)
    inside.add(node)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise BadYamlError("has a key that is not a plain value", key.start_mark.line + 1)
            if (key.tag, key.value) in seen:
                raise BadYamlError(f"has the key {key.value[:80]!r} twice in one mapping", key.start_mark.line + 1)
            seen.add((key.tag, key.value))
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    below = [_measure(child, done, inside) for child in children]
    values, depth = 1 + sum(v for v, _ in below), 1 + max((d for _, d in below), default=0)
    if values > MAX_YAML_VALUES:
        raise BadYamlError(f"has more than {MAX_YAML_VALUES} values with its aliases written out", line)
    if depth > MAX_YAML_DEPTH:
        raise BadYamlError(f"is nested more than {MAX_YAML_DEPTH} deep", line)
    inside.remove(node)
    done[node] = values, depth
    return done[node]
