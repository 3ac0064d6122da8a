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


# The standard decodes pages of these names by a wider encoding than Python's codec of that name.
WIDER = {"gbk": "gb18030", "x-user-defined": "windows-1252", "utf-16le": "utf-8", "utf-16be": "utf-8"}
WINDOWS_1252 = {byte: bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in range(0x80, 0xA0)}
"""Every byte has a meaning there, as in the standard."""


class EncodingError(ValueError):
    """A page is not in the encoding that it names."""


def decode_page(content: bytes) -> str:
    """The text of a page.

    Its encoding is that of a byte order mark, or else the one that `<meta>` or an XML declaration names. A page that
    names none is UTF-8, or else windows-1252.

    Raises:
        EncodingError: it is not in the encoding that it names.
    """
    mark, name = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", ""))
    name = name or _declared(content[:HEAD_BYTES])
    try:
        return _decode(content[len(mark) :], name or "utf-8")
    except UnicodeError as error:
        if not name:
            return _decode(content, "windows-1252")
        raise EncodingError(f"{name}: {error}"[:200]) from None


def _decode(content: bytes, name: str) -> str:
    if name == "windows-1252":
        return content.decode("latin-1").translate(WINDOWS_1252)
    return webencodings.lookup(name).codec_info.decode(content, "strict")[0]


def _declared(head: bytes) -> str:
    """The encoding that `<meta>` names, or else an XML declaration; empty if neither does."""
    page = _Head()
    parser: HTMLParser = HTMLParser(target=page, encoding="iso-8859-1")
    parser.feed(head)
    parser.close()
    xml = XML_DECLARATION.match(head)
    for label in [*page.labels, *([xml[1].decode("ascii", "replace")] if xml else [])]:
        encoding = webencodings.lookup(label)
        if encoding is not None:
            return WIDER.get(encoding.name, encoding.name)
    return ""


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
