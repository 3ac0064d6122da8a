"""Untrusted JSON: bounded, finite, without duplicate keys; the only failure is `BadJsonError`."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_BYTES = 4 << 20


class BadJsonError(ValueError):
    """Text that is not JSON, or JSON that this project does not accept."""


def parse_json(data: bytes | str, *, max_bytes: int = MAX_BYTES) -> Any:
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


def parse_object(data: bytes | str, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
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
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\x00", "")


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
