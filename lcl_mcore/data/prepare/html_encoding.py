"""The text of an HTML page of unknown encoding, by the rules of the WHATWG Encoding and HTML standards."""

from __future__ import annotations

import codecs
import re

import webencodings
from lxml.etree import HTMLParser

HEAD_BYTES = 64 << 10
"""At the beginning of a page, where it may name its encoding."""
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16le"), (codecs.BOM_UTF16_BE, "utf-16be"))
XML_DECLARATION = re.compile(rb"""\s*<\?xml[^>]{0,100}\sencoding\s*=\s*["']([\w.:-]{1,40})["']""")
CONTENT_CHARSET = re.compile(r"""charset\s*=\s*["']?([^\s;"']+)""", re.IGNORECASE)


class EncodingError(ValueError):
    """A page is not in the encoding that it names."""


def decode_page(content: bytes) -> str:
    """The text of a page.

    Its encoding is that of a byte order mark, or else the one that `<meta>` or an XML declaration names. A page that
    names none is UTF-8, or else windows-1252.

    Raises:
        EncodingError: it is not in the encoding that it names.
    """
    mark, encoding = next(((m, webencodings.lookup(name)) for m, name in MARKS if content.startswith(m)), (b"", None))
    encoding = encoding or _declared(content[:HEAD_BYTES])
    try:
        return (encoding or webencodings.UTF8).codec_info.decode(content[len(mark) :], "strict")[0]
    except UnicodeDecodeError as error:
        if encoding is None:
            return content.decode("cp1252", "replace")
        raise EncodingError(f"{encoding.name}, {error.reason} at byte {error.start}") from None


def _declared(head: bytes) -> webencodings.Encoding | None:
    """The encoding that `<meta>` names, or else an XML declaration."""
    page = _Head()
    parser: HTMLParser = HTMLParser(target=page, encoding="iso-8859-1")
    parser.feed(head)
    parser.close()
    xml = XML_DECLARATION.match(head)
    for label in [*page.labels, *([xml[1].decode("ascii", "replace")] if xml else [])]:
        encoding = webencodings.lookup(label)
        if encoding is not None:
            # The declaration was read as ASCII, so it cannot be UTF-16.
            return webencodings.UTF8 if encoding.name.startswith("utf-16") else encoding
    return None


class _Head:
    """Collects the encodings that `<meta>` elements name."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag != "meta":
            return
        if "charset" in attributes:
            self.labels.append(attributes["charset"])
        elif attributes.get("http-equiv", "").lower() == "content-type":
            named = CONTENT_CHARSET.search(attributes.get("content", ""))
            self.labels += [named[1]] if named else []

    def close(self) -> None:
        """The parser asks for it; nothing is left to do."""
