"""OBELICS and OmniCorpus: parquet rows with alternating texts and image URLs, images downloaded before.

A downloaded image is looked up in the image folder by `sha256(url)`, with or without an extension and
in a folder of its first two letters or not; or by its last path part. `images.csv` (url,file) beside the
images overrides both.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.input_files import input_files, read_image
from lcl_mcore.data.prepare.records import Dropped, InputFile, InputPart, RawDocument, RawImage
from lcl_mcore.data.untrusted_json import BadJsonError, clean_text
from lcl_mcore.errors import DataError, explain
from lcl_mcore.optional_packages import installed

END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")
ROWS_PER_BATCH = 256


class ParquetReader:
    """Sequence documents; `max_duplicates` uses OmniCorpus's own count of an image's copies."""

    def __init__(self, source: Path, images: Path | None = None, *, max_duplicates: int = 0) -> None:
        if not installed("pyarrow", "pyarrow.parquet", "pyarrow").usable:
            raise DataError(explain("parquet input", "needs pyarrow", "pip install pyarrow."))
        self._files = input_files(source, ".parquet")
        self._images = images or (source if source.is_dir() else source.parent) / "images"
        self._max_duplicates = max_duplicates
        self._table: dict[str, str] | None = None

    @property
    def image_root(self) -> Path | None:
        """The folder with the downloaded images."""
        return self._images

    def describe(self) -> dict[str, Any]:
        """The format and the duplicate rule."""
        return {"format": "parquet", "max_duplicates": self._max_duplicates}

    def files(self) -> Sequence[InputFile]:
        """The parquet files."""
        return self._files

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """The row groups."""
        import pyarrow
        import pyarrow.parquet as parquet

        (path,) = file.paths
        try:
            metadata = parquet.read_metadata(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"is not a readable parquet file: {error} Download it again.") from error
        return [
            InputPart((str(path), group), max(metadata.row_group(group).num_rows, 1))
            for group in range(metadata.num_row_groups)
        ]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The documents of one row group. `END_OF_DOCUMENT...` inside a text begins a new document."""
        import pyarrow.parquet as parquet

        path, group = part.where
        with parquet.ParquetFile(path) as file:
            names = [name for name in ("images", "texts", "metadata") if name in file.schema_arrow.names]
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=names):
                for row in batch.to_pylist():
                    yield from self._row(row)

    def _row(self, row: dict[str, Any]) -> Iterator[RawDocument | Dropped]:
        urls, texts = row.get("images"), row.get("texts")
        if not isinstance(urls, list) or not isinstance(texts, list) or len(urls) != len(texts):
            yield Dropped("images and texts differ in length")
            return
        details = row.get("metadata") if isinstance(row.get("metadata"), list) else None
        made_texts: list[str] = []
        images: list[RawImage] = []
        try:
            for place, (url, text) in enumerate(zip(urls, texts, strict=True)):
                if (url is None) == (text is None):
                    yield Dropped("a place holds not just one of image and text")
                    return
                if url is not None:
                    read = partial(self._read, clean_text(url), details[place] if details else None)
                    images.append(RawImage(read, len(made_texts), source=url[:500]))
                    continue
                pieces = clean_text(text).split(END_OF_DOCUMENT)
                for last, piece in [*((False, p) for p in pieces[:-1]), (True, pieces[-1])]:
                    if piece.strip():
                        made_texts.append(piece.strip())
                    if not last and (made_texts or images):
                        yield RawDocument("sequence", tuple(made_texts), tuple(images))
                        made_texts, images = [], []
        except BadJsonError:
            yield Dropped("bad text")
            return
        if made_texts or images:
            yield RawDocument("sequence", tuple(made_texts), tuple(images))

    def _read(self, url: str, detail: Any) -> bytes:
        if self._max_duplicates and isinstance(detail, dict):
            copies = max(int(detail.get(name) or 0) for name in ("d_hash_dup_count", "p_hash_dup_count"))
            if copies > self._max_duplicates:
                raise BadImageError("over-repeated", f"{copies} copies")
        for name in self._names(url):
            try:
                return read_image(self._images, name)
            except BadImageError as error:
                if error.reason != "missing file":
                    raise
        raise BadImageError("missing file", url[:200])

    def _names(self, url: str) -> Iterator[str]:
        """Where the image of a URL may lie."""
        listed = self._listed().get(url)
        if listed is not None:
            yield listed
            return
        digest = hashlib.sha256(url.encode()).hexdigest()
        for extension in EXTENSIONS:
            yield digest + extension
            yield f"{digest[:2]}/{digest}{extension}"
        last = url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
        if last and last not in (".", ".."):
            yield last

    def _listed(self) -> dict[str, str]:
        if self._table is None:
            path = self._images / "images.csv"
            self._table = {}
            if path.is_file():
                with path.open(newline="", encoding="utf-8", errors="replace") as stream:
                    self._table = {row[0]: row[1] for row in csv.reader(stream) if len(row) == 2}
        return self._table
