"""Property tests of the readers: sound input comes back byte for byte, and nothing else raises or vanishes."""

from __future__ import annotations

import codecs
import gzip
import html
import io
import json
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from corpora import image_bytes
from lcl_mcore.data.images import BadImageError, open_image, upright_rgb
from lcl_mcore.data.prepare import mmc4
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
from lcl_mcore.data.prepare.normalise import ImageLimits, normalise
from lcl_mcore.data.prepare.pairs import PairReader
from lcl_mcore.data.prepare.parquet import ParquetReader
from lcl_mcore.data.prepare.records import Dropped, RawDocument, Reader
from lcl_mcore.errors import DataError

BAD_FILE = (DataError, OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)  # the engine's boundary
COMMON = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(str.strip)
key_text = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=30)
keys = st.lists(
    key_text.filter(lambda key: not key.startswith(".") and key != "__MACOSX"), min_size=1, max_size=8, unique=True
)


@contextmanager
def written(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def outcomes(reader: Reader) -> list[RawDocument | Dropped]:
    """Everything in the input; images are read, so what they raise is seen too."""
    found = [item for file in reader.files() for part in reader.parts(file) for item in reader.documents(part)]
    for item in found:
        for image in item.images if isinstance(item, RawDocument) else ():
            try:
                image.read()
            except BadImageError:
                continue
    return found


def kept(found: list[RawDocument | Dropped]) -> list[RawDocument]:
    return [item for item in found if isinstance(item, RawDocument)]


def change(content: bytes, changes: list[tuple[float, int, int]]) -> bytes:
    """Overwrite, remove or insert bytes at some places (0..1)."""
    result = bytearray(content)
    for place, kind, value in changes:
        at = int(place * len(result))
        if kind == 0 and result:
            result[min(at, len(result) - 1)] = value
        elif kind == 1:
            del result[at : at + value]
        else:
            result[at:at] = bytes([value]) * (value % 7)
    return bytes(result)


changes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2), st.integers(0, 255)), min_size=1, max_size=6)


# --- tars ---


def tar_of(members: list[tuple[str, bytes]], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, encoding="utf-8") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@COMMON
@given(
    keys=keys,
    data=st.data(),
    form=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    joined=st.booleans(),
    end=st.integers(0, 4),
    packed=st.booleans(),
)
def test_sound_tars_come_back(
    keys: list[str], data: st.DataObject, form: int, joined: bool, end: int, packed: bool
) -> None:
    samples = {key: (data.draw(st.binary(max_size=700)), data.draw(plain_text)) for key in keys}
    members = [
        member
        for key, (content, text) in samples.items()
        for member in [(f"f/{key}.png", content), (f"f/{key}.TXT", text.encode())]
    ]
    middle = len(members) // 4 * 2 if joined else 0
    content = b""
    for part in (members[:middle], members[middle:]):
        raw = tar_of(part, form).rstrip(b"\0") if part else b""
        content += raw + bytes(-len(raw) % 512 + end * 512)
    with written("a.tar", gzip.compress(content) if packed else content) as folder:
        found = outcomes(PairReader(folder))
    assert [item for item in found if isinstance(item, Dropped)] == []
    assert [(item.texts[0], item.images[0].read()) for item in kept(found)] == [
        (text.strip(), content) for content, text in samples.values()
    ]


@COMMON
@given(number=st.integers(0, 12), changes=changes)
def test_damaged_tars_lose_no_more_than_what_was_hit(number: int, changes: list[tuple[float, int, int]]) -> None:
    members = [
        member for n in range(number) for member in [(f"{n}.jpg", bytes([n]) * 600), (f"{n}.txt", f"text {n}".encode())]
    ]
    sound = tar_of(members, tarfile.GNU_FORMAT)
    content = change(sound, changes)
    untouched = next((n for n, (a, b) in enumerate(zip(sound, content, strict=False)) if a != b), len(content))
    with written("a.tar", content) as folder:
        try:
            found = outcomes(PairReader(folder))
        except BAD_FILE:
            assert content[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")
            return
    whole = untouched // 2560  # a sample has two headers, 600 bytes in two blocks, and a caption in one
    assert [item.texts[0] for item in kept(found)][:whole] == [f"text {n}" for n in range(min(whole, number))]


@COMMON
@given(content=st.binary(max_size=3000))
def test_any_bytes_as_a_tar(content: bytes) -> None:
    with written("a.tar", content) as folder:
        try:
            outcomes(PairReader(folder))
        except BAD_FILE:
            return


# --- jsonl ---


def line_of(text: str, number: int) -> dict[str, Any]:
    info = {"image_name": f"{number}.jpg", "matched_text_index": 0, "matched_sim": 0.5}
    return {"text_list": [text], "image_info": [info], "url": text}


@COMMON
@given(
    texts=st.lists(plain_text, max_size=30),
    part_bytes=st.integers(1, 400),
    mark=st.booleans(),
    end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    ascii_only=st.booleans(),
    archive=st.booleans(),
)
def test_sound_lines_come_back_in_order(
    texts: list[str], part_bytes: int, mark: bool, end: bytes, ascii_only: bool, archive: bool
) -> None:
    rows = [json.dumps(line_of(text, n), ensure_ascii=ascii_only).encode() for n, text in enumerate(texts)]
    content = (codecs.BOM_UTF8 if mark else b"") + end.join(rows)
    if archive:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as packed:
            packed.writestr("a.jsonl", content)
        content = stream.getvalue()
    with pytest.MonkeyPatch.context() as patch, written("a.jsonl.zip" if archive else "a.jsonl", content) as folder:
        patch.setattr(mmc4, "PART_BYTES", part_bytes)
        found = outcomes(Mmc4Reader(folder))
    assert [item.texts for item in found if isinstance(item, RawDocument)] == [(text,) for text in texts]
    assert len(found) == len(texts)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
odd_entries = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("image_name", "matched_text_index", "matched_sim", "image_base64"), json_values)
)
odd_lines = st.fixed_dictionaries(
    {},
    optional={
        "text_list": st.lists(st.text(max_size=8), max_size=3) | json_values,
        "image_info": st.lists(odd_entries, max_size=3) | json_values,
        "url": json_values,
    },
)


@settings(COMMON, max_examples=25)
@given(
    lines=st.lists(
        odd_lines.map(lambda line: json.dumps(line).encode())
        | st.binary(min_size=1, max_size=60).filter(lambda raw: b"\n" not in raw and bool(raw.strip())),
        max_size=12,
    ),
    part_bytes=st.integers(1, 200),
)
def test_every_line_is_kept_or_counted(lines: list[bytes], part_bytes: int) -> None:
    good = json.dumps(line_of("good", 0)).encode()
    with pytest.MonkeyPatch.context() as patch, written("a.jsonl", b"\n".join([good, *lines, good])) as folder:
        patch.setattr(mmc4, "PART_BYTES", part_bytes)
        found = outcomes(Mmc4Reader(folder))
    assert len(found) == len(lines) + 2
    assert [isinstance(item, RawDocument) for item in (found[0], found[-1])] == [True, True]


@COMMON
@given(changes=changes)
def test_damaged_zips_end_at_the_boundary(changes: list[tuple[float, int, int]]) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", "".join(json.dumps(line_of(f"text {n}", n)) + "\n" for n in range(20)))
    with written("a.jsonl.zip", change(stream.getvalue(), changes)) as folder:
        try:
            found = outcomes(Mmc4Reader(folder))
        except BAD_FILE:
            return
    assert len(found) in (1, 20)  # 1: under another name it is no .jsonl file


# --- parquet ---

place = st.tuples(plain_text, st.none()) | st.tuples(st.none(), plain_text)
any_place = st.tuples(st.none() | st.binary(max_size=8), st.none() | st.binary(max_size=8))


@COMMON
@given(rows=st.lists(st.lists(place, min_size=1, max_size=6), min_size=1, max_size=6), group=st.integers(1, 4))
def test_sound_rows_come_back(rows: list[list[tuple[str | None, str | None]]], group: int) -> None:
    table = pyarrow.table(
        {
            "images": pyarrow.array([[url for url, _ in row] for row in rows], pyarrow.list_(pyarrow.string())),
            "texts": pyarrow.array([[text for _, text in row] for row in rows], pyarrow.list_(pyarrow.string())),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        parquet.write_table(table, Path(folder) / "a.parquet", row_group_size=group)
        found = outcomes(ParquetReader(Path(folder)))
    assert [item.texts for item in kept(found)] == [tuple(t.strip() for _, t in row if t is not None) for row in rows]
    assert [[(image.source, image.text_index) for image in item.images] for item in kept(found)] == [
        [(url, sum(text is not None for _, text in row[:n])) for n, (url, _) in enumerate(row) if url is not None]
        for row in rows
    ]


@COMMON
@given(rows=st.lists(st.none() | st.lists(any_place, max_size=4), max_size=6), shorter=st.booleans())
def test_every_row_is_kept_or_counted(
    rows: list[list[tuple[bytes | None, bytes | None]] | None], shorter: bool
) -> None:
    def column(which: int) -> pyarrow.Array:
        cells = [None if row is None else [p[which] for p in row[which * shorter :]] for row in rows]
        raw = pyarrow.array(cells, pyarrow.list_(pyarrow.binary()))
        return pyarrow.ListArray.from_arrays(raw.offsets, raw.values.view(pyarrow.string()), mask=raw.is_null())

    with tempfile.TemporaryDirectory() as folder:
        parquet.write_table(pyarrow.table({"images": column(0), "texts": column(1)}), Path(folder) / "a.parquet")
        found = outcomes(ParquetReader(Path(folder)))
    assert len(found) == len(rows)


@COMMON
@given(changes=changes)
def test_damaged_parquet_ends_at_the_boundary(changes: list[tuple[float, int, int]]) -> None:
    columns = {
        "images": pyarrow.array([[None, "u"]] * 30, pyarrow.list_(pyarrow.string())),
        "texts": pyarrow.array([[f"text {n}", None] for n in range(30)], pyarrow.list_(pyarrow.string())),
    }
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, row_group_size=10)
    with written("a.parquet", change(stream.getvalue(), changes)) as folder:
        try:
            outcomes(ParquetReader(folder))
        except BAD_FILE:
            return


# --- pages ---

ENCODINGS = {
    "utf-8": "utf-8",
    "windows-1251": "cp1251",
    "euc-jp": "euc_jp",
    "gbk": "gb18030",
    "iso-8859-7": "iso8859_7",
}
words = st.text(st.sampled_from("abcdefghij &<>\"'é€жЖωΩ日本中文 \t\n"), min_size=1, max_size=30)


@COMMON
@given(
    blocks=st.lists(st.tuples(st.sampled_from(["p", "li", "td", "div", "h2"]), words, st.booleans()), max_size=8),
    label=st.sampled_from(sorted(ENCODINGS)),
    closed=st.booleans(),
)
def test_pages_come_back(blocks: list[tuple[str, str, bool]], label: str, closed: bool) -> None:
    page, texts, images = f"<meta charset='{label}'>", [], []
    for n, (tag, text, image) in enumerate(blocks):
        text = text.encode(ENCODINGS[label], "ignore").decode(ENCODINGS[label])
        inner = html.escape(text) + (f"<img src='{n}.png'>" if image else "")
        around = {"li": ("<ul>", "</ul>"), "td": ("<table><tr>", "</table>")}.get(tag, ("", ""))
        end = f"</{tag}>" if closed or tag in ("div", "h2") else ""
        page += f"{around[0]}<{tag}>{inner}{end}{around[1]}"
        texts += [" ".join(text.split())] if text.strip() else []
        images += [(len(texts), f"{n}.png")] if image else []
    page += f"<p>{'word ' * 30}<img src=last.png>"
    with written("a.html", page.encode(ENCODINGS[label])) as folder:
        (item,) = outcomes(HtmlReader(folder))
    assert isinstance(item, RawDocument)
    assert item.texts[:-1] == tuple(texts)
    assert [(image.text_index, image.source) for image in item.images[:-1]] == images


TAGS = (
    "< > </ <! <!-- --> <? ]]> & ; = \" ' / <p <p> </p> <li> </ul> <td> <table> <nav> </nav> <svg> <script> </script> "
    "<style> <title> <img src= <img/> src=a.png charset= <meta class=nav %00 &#x0; &#xD800; &amp <plaintext> <b> </b>"
)
soup = st.lists(st.sampled_from(TAGS.split()) | st.text(max_size=4), max_size=40).map(" ".join)


@COMMON
@given(page=soup, head=st.sampled_from([b"", codecs.BOM_UTF16_BE, codecs.BOM_UTF8, b"<meta charset=utf-7>"]))
def test_any_soup_is_a_page_or_counted(page: str, head: bytes) -> None:
    with written("a.html", head + page.encode("utf-8", "surrogatepass")) as folder:
        assert len(outcomes(HtmlReader(folder, min_words=0))) == 1


# --- images ---

SMALL = ImageLimits(min_side=1)
SEEDS = {
    **{
        container: image_bytes(3, 40, 30, container)
        for container in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
    },
    "AVIF": image_bytes(3, 40, 30, "AVIF"),
}


@settings(COMMON, max_examples=300)
@given(container=st.sampled_from(sorted(SEEDS)), changes=changes)
def test_damaged_images_are_drops(container: str, changes: list[tuple[float, int, int]]) -> None:
    try:
        content, codec, width, height = normalise(change(SEEDS[container], changes), SMALL)
    except BadImageError:
        return
    shown = upright_rgb(open_image(content))
    assert (shown.mode, shown.size, codec in ("jpg", "png", "webp")) == ("RGB", (width, height), True)


@COMMON
@given(
    values=st.lists(st.integers(0, 65535), min_size=4, max_size=4),
    container=st.sampled_from(["PNG", "TIFF", "PPM"]),
    dark=st.booleans(),
)
def test_sixteen_bits_keep_their_brightness(values: list[int], container: str, dark: bool) -> None:
    """Whatever the largest value is."""
    values = [value // 300 if dark else value for value in values]
    image = Image.fromarray(np.array(values, dtype=np.uint16).reshape(2, 2))
    stream = io.BytesIO()
    image.save(stream, container)
    pixels = np.asarray(upright_rgb(open_image(stream.getvalue())))[..., 0].reshape(-1)
    assert np.abs(pixels - np.array(values) / 257).max() <= 0.51
