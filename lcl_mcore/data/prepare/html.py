"""A tree of HTML pages with images beside them: documentation, a saved site, a book."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lxml.etree import HTMLParser, LxmlError

from lcl_mcore.data.format import MAX_IMAGES, MAX_TEXTS
from lcl_mcore.data.prepare.html_encoding import EncodingError, decode_page
from lcl_mcore.data.prepare.input_files import inputs, is_system_file, read_image
from lcl_mcore.data.prepare.records import (
    BadRecordError,
    Dropped,
    InputFile,
    InputPart,
    RawDocument,
    RawImage,
    bad_image,
    documents_of,
)
from lcl_mcore.untrusted import clean_text, read_regular

PAGES_PER_FILE = 40
MAX_PAGE_BYTES = 16 << 20
MAX_DEPTH = 512
"""Of open elements, as in browsers. An end tag may cost the parser time for each of them."""
MAX_TEXT = 1 << 20
SKIPPED = re.compile(
    "script|style|nav|header|footer|aside|noscript|template|form|svg|title|textarea|iframe|noembed|noframes"
)
SKIPPED_CLASSES = re.compile(
    r"(^|[\s_-])(nav|navbar|navpath|sidebar|sphinxsidebar|toc|toctree|menu|breadcrumbs?|footer|header|related|"
    r"headerlink|titlearea|search\w*)($|[\s_-])",
    re.IGNORECASE,
)
BLOCKS = re.compile(
    "p|div|section|article|main|body|h[1-6]|li|ul|ol|dl|dt|dd|table|tr|td|th|caption|pre|blockquote|figure|"
    "figcaption|br|hr"
)
ENDED_BY = {
    "p": re.compile(
        "address|article|aside|blockquote|center|details|dialog|dir|div|dl|fieldset|figcaption|figure|footer|form|"
        "h[1-6]|header|hgroup|hr|main|menu|nav|ol|p|pre|search|section|table|ul"
    ),
    "li": re.compile("li"),
    **dict.fromkeys(("dt", "dd"), re.compile("dt|dd")),
    **dict.fromkeys(("td", "th"), re.compile("td|th|tr|thead|tbody|tfoot")),
    "tr": re.compile("tr|thead|tbody|tfoot"),
    **dict.fromkeys(("thead", "tbody", "tfoot"), re.compile("thead|tbody|tfoot")),
}
"""Elements whose end tag may be omitted, and the start tags that end them ("Optional tags" in the HTML standard).

The parser knows fewer of them, and an element that hides its content must not hide what follows it.
"""
LISTS_AND_TABLES = re.compile("ul|ol|menu|dl|table|template|object|button")  # inside, nothing ends what is outside
MARKS = ("class", "id", "role")  # attributes that say what an element is for


class HtmlReader:
    """Sequence documents: paragraphs and images in page order, without navigation."""

    def __init__(self, source: Path, *, min_words: int = 20) -> None:
        source = Path(os.path.realpath(source))
        self._root = source if source.is_dir() else source.parent
        self.image_root = self._root  # the images lie beside the pages
        self._pages = inputs(source, ".html", ".htm", ".xhtml")
        self._min_words = min_words

    def describe(self) -> dict[str, Any]:
        """The format and the shortest page."""
        return {"format": "html", "min_words": self._min_words}

    def files(self) -> Sequence[InputFile]:
        """Some pages each, named after the first."""
        groups = [self._pages[n : n + PAGES_PER_FILE] for n in range(0, len(self._pages), PAGES_PER_FILE)]
        return [InputFile(group[0].relative_to(self._root).as_posix(), tuple(group)) for group in groups]

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """All its pages."""
        return [InputPart(file.paths, len(file.paths))]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The pages of one part that have images."""
        for path in part.where:
            yield from documents_of(self._name(path), lambda path=path: [self._page(path)])  # type: ignore[misc]

    def images(self, part: InputPart) -> Iterator[Sequence[RawImage]]:
        """All images of each page, in navigation and headers too."""
        for path in part.where:
            try:
                content = self._content(path)
            except BadRecordError:
                continue
            yield self._images(path, [*content.images, *content.hidden_images[:MAX_IMAGES]])

    def _name(self, path: Path) -> str:
        return clean_text(path.relative_to(self._root).as_posix())

    def _page(self, path: Path) -> RawDocument:
        content = self._content(path)
        if sum(len(text.split()) for text in content.texts) < self._min_words:
            raise BadRecordError("too few words")
        if not content.images:
            raise BadRecordError("no image on the page")
        images = self._images(path, content.images)
        return RawDocument("sequence", tuple(content.texts), images, {"page": self._name(path)})

    def _content(self, path: Path) -> _Content:
        """What one page shows."""
        if is_system_file(self._name(path)):
            raise BadRecordError("system file")
        if path.is_symlink():
            raise BadRecordError("page is a link")
        page = _Page()
        try:
            page.feed(decode_page(read_regular(path, MAX_PAGE_BYTES)))
            page.close()
        except LxmlError as error:
            raise BadRecordError("page cannot be parsed", str(error)) from None
        except OSError as error:
            raise BadRecordError("page cannot be read", str(error.strerror)) from None
        except EncodingError as error:
            raise BadRecordError("not in the encoding that it names", str(error)) from None
        content = page.content
        if len(content.texts) > MAX_TEXTS or len(content.images) > MAX_IMAGES:
            raise BadRecordError("too many texts or images")
        return content

    def _images(self, path: Path, found: Sequence[tuple[int, str]]) -> tuple[RawImage, ...]:
        """The images that lie beside the pages; nothing is ever fetched."""
        return tuple(self._image(path, place, address) for place, address in found)

    def _image(self, path: Path, place: int, address: str) -> RawImage:
        source = address[:500]
        try:
            address_parts = urlsplit(address.strip().replace("\\", "/"))  # as browsers do
            if address_parts.scheme or address_parts.netloc:
                return bad_image("not beside the page", source=source)
            local = os.path.realpath(path.parent / unquote(address_parts.path))
        except (ValueError, OSError) as error:
            return bad_image("not an address", str(error), source)
        # A path that begins above the root is for `read_image` to refuse.
        return RawImage(partial(read_image, self._root, os.path.relpath(local, self._root)), place, source=source)


class _Page(HTMLParser):
    """A parser that collects what a page shows.

    Attributes:
        content: texts and images; complete after `close`.
    """

    def __init__(self) -> None:
        self.content = _Content()
        super().__init__(target=self.content, encoding="utf-8", huge_tree=True)


class _Content:
    """Texts and images of a page; an image's place is the number of texts before it.

    Attributes:
        texts: what is shown, block by block.
        images: place and address of each image that is shown.
        hidden_images: the same of images in navigation, headers and the like.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.images: list[tuple[int, str]] = []
        self.hidden_images: list[tuple[int, str]] = []
        self._words: list[str] = []
        self._depth = 0
        self._hiding: tuple[str, int] | None = None  # tag and depth of the outermost element that hides its content
        self._inner = 0  # lists and tables that are open inside it

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """A block ends the running text; an image ends it and takes its place.

        Raises:
            BadRecordError: elements are nested too deeply.
        """
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BadRecordError("nested too deeply", f"over {MAX_DEPTH} elements")
        if BLOCKS.fullmatch(tag):
            self._end_text()
        if self._hiding is not None and not self._inner:
            ended_by = ENDED_BY.get(self._hiding[0])
            if ended_by is not None and ended_by.fullmatch(tag):
                self._hiding = None
        if tag == "img" and attributes.get("src"):
            if self._hiding is None:
                self._end_text()
            (self.images if self._hiding is None else self.hidden_images).append((len(self.texts), attributes["src"]))
        if self._hiding is not None:
            self._inner += bool(LISTS_AND_TABLES.fullmatch(tag))
        elif SKIPPED.fullmatch(tag) or (
            attributes and SKIPPED_CLASSES.search(" ".join(attributes.get(name, "") for name in MARKS))
        ):
            self._hiding, self._inner = (tag, self._depth), 0

    def end(self, tag: str) -> None:
        """The innermost open element ends. The parser ends every element, also where the page does not."""
        if BLOCKS.fullmatch(tag):
            self._end_text()
        if self._hiding is not None:
            if self._depth == self._hiding[1]:
                self._hiding = None
            else:
                self._inner -= bool(LISTS_AND_TABLES.fullmatch(tag))
        self._depth -= 1

    def data(self, text: str) -> None:
        """Text that is shown."""
        if self._hiding is None:
            self._words.append(text)

    def close(self) -> None:
        """The page ends."""
        self._end_text()

    def _end_text(self) -> None:
        """The running text becomes one of the document's texts, or several if it is very long."""
        if not self._words:
            return
        text = " ".join("".join(self._words).replace("¶", " ").split())
        self._words = []
        for start in range(0, len(text), MAX_TEXT):
            self.texts.append(clean_text(text[start : start + MAX_TEXT]))
