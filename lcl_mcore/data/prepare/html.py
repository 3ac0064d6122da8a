"""A tree of HTML pages with images beside them: documentation, a saved site, a book."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lcl_mcore.data.prepare.input_files import inputs, read_image
from lcl_mcore.data.prepare.records import Dropped, InputFile, InputPart, RawDocument, RawImage
from lcl_mcore.data.untrusted_json import clean_text

PAGES_PER_FILE = 40
MAX_PAGE_BYTES = 16 << 20
SKIPPED = re.compile("script|style|nav|header|footer|aside|noscript|template|form|svg|title")
SKIPPED_CLASSES = re.compile(
    r"(^|[\s_-])(nav|navbar|navpath|sidebar|sphinxsidebar|toc|toctree|menu|breadcrumbs?|footer|header|related|"
    r"headerlink|titlearea|search\w*)($|[\s_-])",
    re.IGNORECASE,
)
BLOCKS = re.compile(
    "p|div|section|article|main|body|h[1-6]|li|ul|ol|dl|dt|dd|table|tr|td|th|caption|pre|blockquote|figure|"
    "figcaption|br|hr"
)
# Possessive, and ending at the next "<": time grows with the page's length only.
IMAGE_TAG = re.compile(r"""<img\b(?:[^<>"']++|"[^"<]{0,4096}+"|'[^'<]{0,4096}+'){0,64}+>""", re.IGNORECASE)
VOID = re.compile("br|hr|img|input|meta|link|area|base|col|embed|source|track|wbr")


class HtmlReader:
    """Sequence documents: paragraphs and images in page order, without navigation."""

    def __init__(self, source: Path, *, min_words: int = 20) -> None:
        source = source.resolve()
        self._root = source if source.is_dir() else source.parent
        self._pages = inputs(source, ".html", ".htm", ".xhtml")
        self._min_words = min_words

    @property
    def image_root(self) -> Path | None:
        """The images lie beside the pages."""
        return self._root

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
            yield self._page(path)

    def images(self, part: InputPart) -> Iterator[Sequence[RawImage]]:
        """All images of each page, in navigation and headers too, without reading the page in full."""
        for path in part.where:
            if not path.is_symlink() and path.stat().st_size <= MAX_PAGE_BYTES:
                page = _Page()
                for tag in IMAGE_TAG.findall(path.read_bytes().decode("utf-8", "replace")):
                    page.feed(tag)
                    page.reset()  # whatever a broken tag left open
                yield self._images(path, page)

    def _page(self, path: Path) -> RawDocument | Dropped:
        if path.is_symlink() or path.stat().st_size > MAX_PAGE_BYTES:
            return Dropped("page is a link or too large")
        page = _Page()
        page.feed(path.read_bytes().decode("utf-8", "replace"))
        page.close()
        page.end_text()
        if sum(len(text.split()) for text in page.texts) < self._min_words:
            return Dropped("too few words")
        images = self._images(path, page)
        if not images:
            return Dropped("no image on the page")
        where = path.relative_to(self._root).as_posix()
        return RawDocument("sequence", tuple(page.texts), images, {"page": clean_text(where)})

    def _images(self, path: Path, page: _Page) -> tuple[RawImage, ...]:
        """The images that lie beside the pages; nothing is ever fetched."""
        images = []
        for place, address in page.images:
            try:
                address_parts = urlsplit(address)
            except ValueError:  # not an address at all
                continue
            if address_parts.scheme or address_parts.netloc:
                continue
            local = (path.parent / unquote(address_parts.path)).resolve() if "\0" not in address_parts.path else path
            name = str(local.relative_to(self._root)) if local.is_relative_to(self._root) else "../outside"
            images.append(RawImage(partial(read_image, self._root, name), place, source=address[:500]))
        return tuple(images)


class _Page(HTMLParser):
    """Collects texts and images; an image's place is the number of texts before it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.images: list[tuple[int, str]] = []
        self._words: list[str] = []
        self._open: list[tuple[str, bool]] = []  # tag, and whether it hides its content

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A block ends the running text; an image ends it and takes its place."""
        values = {name: value or "" for name, value in attrs}
        if BLOCKS.fullmatch(tag):
            self.end_text()
        if tag == "img" and values.get("src") and not self._hidden:
            self.end_text()
            self.images.append((len(self.texts), values["src"]))
        if VOID.fullmatch(tag):
            return
        marks = f"{values.get('class', '')} {values.get('id', '')} {values.get('role', '')}"
        hides = bool(SKIPPED.fullmatch(tag)) or bool(SKIPPED_CLASSES.search(marks))
        self._open.append((tag, self._hidden or hides))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`<img/>` and the like."""
        self.handle_starttag(tag, attrs)
        if not VOID.fullmatch(tag):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost open element of that name, and what was left open inside it."""
        if BLOCKS.fullmatch(tag):
            self.end_text()
        for i in reversed(range(len(self._open))):
            if self._open[i][0] == tag:
                del self._open[i:]
                break

    def handle_data(self, data: str) -> None:
        """Text that is shown."""
        if not self._hidden:
            self._words.append(data)

    def end_text(self) -> None:
        """The running text becomes one of the document's texts."""
        text = " ".join("".join(self._words).replace("¶", " ").split())
        self._words = []
        if text:
            self.texts.append(clean_text(text[: 1 << 20]))

    @property
    def _hidden(self) -> bool:
        return bool(self._open) and self._open[-1][1]
