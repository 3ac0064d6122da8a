"""Files and texts that others wrote: regular files alone, of bounded size, parsed within bounds.

What is wrong with a file is an `OSError` whose `strerror` says it; what is wrong with its text a `ValueError`.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    import yaml

MAX_JSON_BYTES = 4 << 20
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


def skip_hole(stream: IO[bytes], position: int, multiple: int = 1) -> int:
    """Go to the next stored byte: what a sparse file does not hold is zeros, and a terabyte of it takes no time.

    Args:
        position: where the stream is.
        multiple: it goes to a multiple of this, or stays.

    Returns:
        Where it is now; unchanged for anything but a file whose file system knows its holes.
    """
    if not (isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO)):
        return position
    descriptor = stream.fileno()
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        stored = os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            return position
        stored = os.fstat(descriptor).st_size  # nothing but a hole
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)  # where the stream believes it to be
    return stream.seek(max(position, stored // multiple * multiple))


def read_regular(path: Path | str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: there is none, it cannot be read, or it is longer.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else file.read(size + 1)  # room is taken for as much as is asked for
        while size < len(content) <= limit and (more := file.read(1 << 16)):  # files of the system say 0 bytes
            content += more
        if max(size, len(content)) > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are read", str(path))
    return content


# --- JSON ---


class BadJsonError(ValueError):
    """Text that is not JSON, or JSON that this project does not accept."""


def parse_json(data: bytes | str, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value of one JSON text. NaN and infinities, double keys and deep nesting are refused."""
    if len(data) > max_bytes:
        raise BadJsonError(f"{len(data)} bytes of JSON, at most {max_bytes} are accepted")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_duplicates
        )
    except BadJsonError:
        raise
    except RecursionError:
        raise BadJsonError("nested too deeply") from None
    except ValueError as error:
        raise BadJsonError(str(error)) from None


def parse_object(data: bytes | str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Like `parse_json`, and the value must be an object."""
    value = parse_json(data, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise BadJsonError(f"an object is expected, found {type(value).__name__}")
    return value


def clean_text(value: object, *, max_chars: int = 1 << 20) -> str:
    """A string that can be stored and encoded: lone surrogates become U+FFFD, NUL vanishes."""
    if not isinstance(value, str):
        raise BadJsonError(f"a text is expected, found {type(value).__name__}")
    if len(value) > max_chars:
        raise BadJsonError(f"a text of {len(value)} characters, at most {max_chars} are accepted")
    if not value.isascii():
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value.replace("\x00", "")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # 1e999
        raise BadJsonError(f"{text[:40]} is not a finite number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise BadJsonError(f"{name} is not a JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadJsonError("a key stands twice in one object")
    return result


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


# --- pickles ---

MAX_PICKLE_DEPTH = 50
MAX_PICKLE_STEPS = 1 << 20
_GROWS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")


def require_shallow_pickle(data: bytes) -> None:
    """Refuse a pickle whose values are nested so deeply that hashing or comparing one would end the process.

    Nothing in it is built. Depth is counted where a value is made; a container that grows later is not hashable.

    Raises:
        ValueError: nested more than `MAX_PICKLE_DEPTH` deep, more than `MAX_PICKLE_STEPS` instructions, or damaged.
    """
    import pickletools

    mark = -1
    stack: list[int] = []
    memo: dict[int, int] = {}
    try:
        argument: Any
        for step, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if step > MAX_PICKLE_STEPS:
                raise ValueError(f"a pickle of more than {MAX_PICKLE_STEPS} instructions")
            name = operation.name
            if name == "MARK":
                stack.append(mark)
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])
            elif name == "DUP":
                stack.append(stack[-1])
            else:
                *items, last = [*_taken(stack, [part.name for part in operation.stack_before], mark), 0]
                if name in _GROWS:  # what grows was taken last
                    last = items.pop()
                made = len(operation.stack_after)
                stack += [max(last, 1 + max(items, default=0))] * made
                if made and stack[-1] > MAX_PICKLE_DEPTH:
                    raise ValueError(f"a pickle nested more than {MAX_PICKLE_DEPTH} deep")
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"a damaged pickle ({type(error).__name__} {error})") from None


def _taken(stack: list[int], before: list[str], mark: int) -> list[int]:
    """Take from the stack what an instruction takes: depths of values."""
    taken = []
    if "mark" in before:
        while (depth := stack.pop()) != mark:
            taken.append(depth)
        before = before[: before.index("mark")]
    return taken + [stack.pop() for _ in before]
