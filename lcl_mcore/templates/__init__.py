"""Pages that people read (HTML, Markdown), from the templates in this folder.

Every value is escaped where it is put in: in a page of HTML as text or attribute, in Markdown as a code span (numbers
stay numbers). Templates have no way around this but the filters below.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import jinja2

IMAGE_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "svg": "image/svg+xml"}
_URL = re.compile(r"https://[^\s]+|data:image/(jpeg|png|webp|svg\+xml);base64,[A-Za-z0-9+/=]*", re.ASCII)
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class _Markdown(str):
    """Markdown of our own making."""


def data_url(content: bytes, codec: str) -> str:
    """An image as a URL.

    Args:
        codec: one of `IMAGE_TYPES`.
    """
    return f"data:{IMAGE_TYPES[codec]};base64,{base64.b64encode(content).decode()}"


def _url(value: str) -> str:
    """For attributes that hold a URL: what could run, or leave the page unseen, is refused."""
    if not _URL.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is no image and no https address")
    return value


def _code_span(value: object) -> _Markdown:
    """Text of one line that Markdown does not read: between more backticks than it has in a row."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + _longest_run(text))
    space = " " if text[:1] in ("", "`") or text[-1:] == "`" else ""
    return _Markdown(f"{ticks}{space}{text}{space}{ticks}")


def _cell(value: object) -> _Markdown:
    """A code span in a table, where a bar would end the cell."""
    return _Markdown(_code_span(value).replace("|", "\\|"))


def _fenced(value: str, language: str) -> _Markdown:
    """A block of code; its fence is longer than any in it."""
    fence = "`" * max(3, 1 + _longest_run(value))
    return _Markdown(f"{fence}{language}\n{value}\n{fence}")


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _in_markdown(value: Any) -> Any:
    return value if isinstance(value, _Markdown | int | float) else _code_span(value)


def _environment(**options: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lcl_mcore", "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {"url": _url, "cell": _cell, "fenced": _fenced}
    return environment


_HTML = _environment(autoescape=True)
_MARKDOWN = _environment(finalize=_in_markdown)


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder, `NAME.html.j2` or `NAME.md.j2`. What cannot be printed becomes U+FFFD.

    Raises:
        jinja2.UndefinedError: the template uses a value that was not given.
        ValueError: a URL in it is of another kind than `data:` or `https:`.
    """
    environment = _HTML if template.endswith(".html.j2") else _MARKDOWN
    return _UNPRINTABLE.sub("\ufffd", environment.get_template(template).render(**values))
