"""OBELICS and OmniCorpus: parquet rows with alternating texts and images.

An image is a URL, downloaded before, or Hugging Face's struct of `bytes` and `path` with the image in it. A downloaded
one is looked up in the image folder by `sha256(url)`, with or without an extension and in a folder of its first two
letters or not; or by its last path part. `images.csv` (url,file) beside the images overrides both.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcl_mcore.data.format import MAX_TEXTS
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare.input_files import images_beside, input_files, read_image
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
from lcl_mcore.errors import DataError, explain
from lcl_mcore.optional_packages import installed
from lcl_mcore.untrusted import BadJsonError, clean_text, open_regular

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import parquet

END_OF_DOCUMENT = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif")
ROWS_PER_BATCH = 256
ROWS_WITH_IMAGES = 16
WANTED = "images (a list of URLs, or of structs of bytes and path) and texts (a list of strings)"
DUPLICATE_COUNTS = ("d_hash_dup_count", "p_hash_dup_count")


class ParquetReader:
    """Sequence documents; `max_duplicates` uses OmniCorpus's own count of an image's copies."""

    def __init__(self, source: Path, images: Path | None = None, *, max_duplicates: int = 0) -> None:
        if not installed("pyarrow", "pyarrow.parquet", "pyarrow").usable:
            raise DataError(explain("parquet input", "needs pyarrow", "pip install pyarrow."))
        self._files = input_files(source, ".parquet")
        self.image_root = images_beside(source, images)
        self._max_duplicates = max_duplicates
        self._table: dict[str, str] | None = None

    def describe(self) -> dict[str, Any]:
        """The format and the duplicate rule."""
        return {"format": "parquet", "max_duplicates": self._max_duplicates}

    def files(self) -> Sequence[InputFile]:
        """The parquet files."""
        return self._files

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """The row groups."""
        (path,) = file.paths
        with _opened(path) as opened:
            self._columns(opened)
            rows = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        return [InputPart((path, number), max(count, 1)) for number, count in enumerate(rows)]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """The documents of one row group. `END_OF_DOCUMENT...` inside a text begins a new document."""
        path, group = part.where
        number = 0
        with _opened(path) as opened:
            columns = self._columns(opened)
            rows = ROWS_PER_BATCH if _is_text(opened.schema_arrow.field("images").type.value_type) else ROWS_WITH_IMAGES
            for batch in _batches(opened, group, columns, rows):
                for place in range(batch.num_rows):
                    row = batch.slice(place, 1)
                    yield from documents_of(
                        f"row {number} of row group {group}",
                        lambda row=row: self._row(row),  # type: ignore[misc]
                    )
                    number += 1

    def _columns(self, opened: parquet.ParquetFile) -> list[str]:
        """The columns to read; refuses a file that has others."""
        schema = opened.schema_arrow
        found = {name: schema.field(name).type for name in dict.fromkeys(schema.names)}
        images, texts = (_value_type(found.get(name)) for name in ("images", "texts"))
        if images is None or texts is None or not _is_text(texts) or not (_is_text(images) or _is_image(images)):
            listed = ", ".join(f"{name}: {kind}" for name, kind in found.items())[:500]
            raise DataError(f"has the columns {listed}; wanted are {WANTED}. Rename or convert them.")
        return ["images", "texts", *(["metadata"] if self._max_duplicates and "metadata" in found else [])]

    def _row(self, batch: pyarrow.RecordBatch) -> list[RawDocument]:
        try:
            (row,) = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise BadRecordError("text is not UTF-8", str(error)) from None
        urls, texts = row["images"], row["texts"]
        if urls is None or texts is None or len(urls) != len(texts):
            raise BadRecordError("images and texts differ in length")
        if len(texts) > MAX_TEXTS:
            raise BadRecordError("too many texts or images", f"{len(texts)} places")
        copies = self._copies(row.get("metadata"), urls)
        documents: list[RawDocument] = []
        made: list[str] = []
        images: list[RawImage] = []

        def close() -> None:
            nonlocal made, images
            if made or images:
                documents.append(RawDocument("sequence", tuple(made), tuple(images)))
            made, images = [], []

        for url, text, count in zip(urls, texts, copies, strict=True):
            if url is not None and text is not None:
                raise BadRecordError("a place holds not just one of image and text")
            if text is None:
                images.append(self._image(url, len(made), count))
                continue
            try:
                first, *others = clean_text(text).split(END_OF_DOCUMENT)
            except BadJsonError as error:
                raise BadRecordError("bad text", str(error)) from None
            made += [first.strip()] if first.strip() else []
            for piece in others:
                close()
                made += [piece.strip()] if piece.strip() else []
        close()
        return documents

    def _copies(self, details: Any, urls: list[Any]) -> list[float]:
        """How often the image at each place was found elsewhere; 0 where it is not known."""
        if not self._max_duplicates or not isinstance(details, list):
            return [0] * len(urls)
        if len(details) == sum(url is not None for url in urls) != len(urls):  # one for each image, not for each place
            given = iter(details)
            details = [None if url is None else next(given) for url in urls]
        if len(details) != len(urls):
            raise BadRecordError("metadata fits neither the places nor the images", f"{len(details)} entries")
        return [_most_copies(detail) for detail in details]

    def _image(self, found: Any, place: int, copies: float) -> RawImage:
        """The image at one place: a URL, a struct of bytes and path, or nothing."""
        content, url = (found.get("bytes"), found.get("path")) if isinstance(found, dict) else (None, found)
        if not url and not content:
            return bad_image("a place holds neither image nor text")
        try:
            url = clean_text(url.decode() if isinstance(url, bytes) else url or "")
        except ValueError as error:
            return bad_image("bad address", str(error)[:500])
        if copies > self._max_duplicates:
            return bad_image("over-repeated", f"{copies:.0f} copies", url[:500])
        read = partial(bytes, content) if content else partial(self._read, url)
        return RawImage(read, place, source=url[:500])

    def _read(self, url: str) -> bytes:
        for name in self._names(url):
            try:
                return read_image(self.image_root, name)
            except BadImageError as error:
                if error.reason != "missing file":
                    raise
        raise BadImageError("missing file")

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
            path = self.image_root / "images.csv"
            self._table = {}
            if path.exists():
                with open_regular(path) as binary, io.TextIOWrapper(binary, "utf-8-sig", "replace", newline="") as text:
                    table = csv.reader(text)
                    try:
                        self._table = {row[0]: row[1] for row in table if len(row) == 2}
                    except csv.Error as error:
                        message = explain(f"{path}, line {table.line_num}", f"is no CSV: {error}", "Write it again.")
                        raise DataError(message) from None
        return self._table


@contextmanager
def _opened(path: Path) -> Iterator[parquet.ParquetFile]:
    """A parquet file. `DataError`: it is none."""
    import pyarrow
    from pyarrow import parquet

    with open_regular(path) as stream:
        try:
            opened = parquet.ParquetFile(stream, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"is not a readable parquet file: {_first_line(error)}. Download it again.") from error
        with opened:
            yield opened


def _batches(opened: parquet.ParquetFile, group: int, columns: list[str], rows: int) -> Iterator[pyarrow.RecordBatch]:
    """The rows of one row group. `DataError`: it is damaged."""
    import pyarrow

    batches = opened.iter_batches(rows, row_groups=[group], columns=columns)
    done = 0
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            rule = f"is damaged behind row {done}: {_first_line(error)}"
            raise DataError(explain(f"row group {group}", rule, "Download the file again.")) from error
        if batch is None:
            return
        yield batch
        done += batch.num_rows


def _value_type(kind: Any) -> Any:
    """Of what a column's lists are made; None if it has no lists."""
    from pyarrow import types

    if kind is None or not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return None
    value = kind.value_type
    return value.value_type if types.is_dictionary(value) else value


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    )


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _most_copies(detail: Any) -> float:
    counts = [detail.get(name) for name in DUPLICATE_COUNTS] if isinstance(detail, dict) else []
    return max((count for count in counts if isinstance(count, int | float) and math.isfinite(count)), default=0)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
