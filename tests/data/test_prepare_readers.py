"""What the readers of public formats find in odd but sound input, and what they say about the rest."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import os
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from corpora import image_bytes
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.prepare import mmc4, tar
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.prepare.input_files import inputs, is_system_file, lines
from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
from lcl_mcore.data.prepare.pairs import PairReader
from lcl_mcore.data.prepare.parquet import ParquetReader
from lcl_mcore.data.prepare.records import Dropped, RawDocument, Reader
from lcl_mcore.errors import DataError

WORDS = "word " * 30


def found(reader: Reader) -> list[RawDocument | Dropped]:
    return [item for file in reader.files() for part in reader.parts(file) for item in reader.documents(part)]


def documents(reader: Reader) -> list[RawDocument]:
    return [item for item in found(reader) if isinstance(item, RawDocument)]


def dropped(reader: Reader) -> list[str]:
    return [item.reason for item in found(reader) if isinstance(item, Dropped)]


def bad_images(document: RawDocument) -> list[str]:
    reasons = []
    for image in document.images:
        try:
            image.read()
        except BadImageError as error:
            reasons.append(error.reason)
    return reasons


def tar_bytes(members: list[tuple[str, bytes]], **options: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def pair(key: str, number: int = 0) -> list[tuple[str, bytes]]:
    return [(f"{key}.jpg", image_bytes(number)), (f"{key}.txt", f"caption of {key}".encode())]


def pairs_in(folder: Path, content: bytes) -> PairReader:
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(content)
    return PairReader(folder)


def captions(reader: PairReader) -> list[str]:
    return [document.texts[0].removeprefix("caption of ") for document in documents(reader)]


# --- pairs ---


def test_dots_in_keys_and_members_of_other_kinds(tmp_path: Path) -> None:
    extra = [("b.2024.cls", b"7"), ("b.2024.mask.png", image_bytes(9, container="PNG"))]
    members = pair("a.1") + pair("b.2024")[:1] + extra + pair("b.2024")[1:] + pair("c")
    reader = pairs_in(tmp_path, tar_bytes(members))
    assert captions(reader) == ["a.1", "b.2024", "c"]
    assert dropped(reader) == ["no caption"]  # of the mask


@pytest.mark.parametrize("end", [0, 512, 1024, 20 * 512])
def test_joined_tars_and_any_mark_of_the_end(tmp_path: Path, end: int, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (tar_bytes(pair("0") + pair(key)).rstrip(b"\0") for key in ("1", "2"))
    first, second = (content + bytes(-len(content) % 512 + end) for content in (first, second))
    reader = pairs_in(tmp_path, first + second)
    assert captions(reader) == (["0", "1", "0", "2"] if end else ["0", "1", "2"])
    assert dropped(reader) == ([] if end else ["a key stands twice"])  # a tar ends at its mark, and keys belong to it
    assert ("may be cut" in caplog.text) == (end == 0)


def test_the_last_padding_may_be_missing(tmp_path: Path) -> None:
    reader = pairs_in(tmp_path, tar_bytes(pair("0") + pair("1")).rstrip(b"\0"))
    assert (captions(reader), dropped(reader)) == (["0", "1"], [])


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    reader = pairs_in(tmp_path, tar_bytes(pair("0", 1) + pair("0", 2) + pair("1") + pair("0", 3)))
    assert dropped(reader) == ["a key stands twice"] * 2
    assert [document.images[0].read() for document in documents(reader)] == [image_bytes(1), image_bytes(0)]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_compressed_tars_are_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    assert captions(pairs_in(tmp_path, pack(tar_bytes(pair("0"))))) == ["0"]


@pytest.mark.parametrize("magic", [b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_other_compression_is_named(tmp_path: Path, magic: bytes) -> None:
    with pytest.raises(DataError, match=r"^is compressed \((xz|zstd)\)\. Unpack it first\.$"):
        found(pairs_in(tmp_path, magic + bytes(600)))


def test_damage_costs_what_lies_in_it(tmp_path: Path) -> None:
    content = bytearray(tar_bytes(pair("0") + pair("1") + pair("2")))
    place = content.index(b"1.jpg")
    content[place : place + 100] = bytes(100)  # the header no longer has its checksum
    reader = pairs_in(tmp_path, bytes(content))
    assert captions(reader) == ["0", "2"]
    assert dropped(reader) == ["the tar is cut or damaged here", "no image in the sample"]


@pytest.mark.parametrize("content", [b"", tar_bytes(pair("x" * 300))[:1024]])
def test_a_tar_that_ends_before_its_first_member_is_counted(tmp_path: Path, content: bytes) -> None:
    (item,) = found(pairs_in(tmp_path, content))
    assert item == Dropped("the tar is cut or damaged here", f"byte {len(content)}", "the file ends here")


def test_what_is_no_pair_is_counted(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, kind in [("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("f.jpg", tarfile.FIFOTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "l.jpg"
            archive.addfile(info)
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    others = [("__MACOSX/._0.jpg", b"x"), ("._0.txt", b"x"), ("d/Thumbs.db", b"x"), ("README", b"x"), ("t.json", b"{}")]
    reader = pairs_in(tmp_path, stream.getvalue() + tar_bytes(others + pair("0")))
    assert captions(reader) == ["0"]
    assert sorted(dropped(reader)) == [
        *["link or device in the tar"] * 3,
        *["no image in the sample"] * 2,
        *["system file"] * 3,
    ]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("größe".encode(), "größe"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("größe".encode("utf-16"), "größe"),
        ("größe".encode("latin-1"), "caption is not UTF-8"),
        (b" \n", "empty caption"),
        (b"x" * (5 << 20), "caption too long"),
    ],
)
def test_captions(tmp_path: Path, text: bytes, outcome: str) -> None:
    (item,) = found(pairs_in(tmp_path, tar_bytes([("0.jpg", image_bytes(0)), ("0.txt", text)])))
    assert (item.reason if isinstance(item, Dropped) else item.texts[0]) == outcome


@pytest.mark.parametrize("details", [b'{"caption": null}', b"{}", b"[]", b"{", b'{"caption": 3}', b"\xff"])
def test_no_caption_in_the_details(tmp_path: Path, details: bytes) -> None:
    reader = pairs_in(tmp_path, tar_bytes([("0.jpg", image_bytes(0)), ("0.json", details), *pair("1")]))
    assert (captions(reader), dropped(reader)) == (["1"], ["no caption"])


def test_only_the_best_image_of_a_key_is_used(tmp_path: Path) -> None:
    members = [("0.gif", image_bytes(1, container="GIF")), *pair("0", 2), ("0.png", b"")]
    (document,) = documents(pairs_in(tmp_path, tar_bytes(members)))
    assert document.images[0].read() == image_bytes(2)
    assert bad_images(document) == ["another image of the same key"] * 2


def test_names_of_any_bytes_and_length(tmp_path: Path) -> None:
    odd = [
        member
        for key in ("caf\udce9", "caf\udce8")
        for member in [(f"{key}.jpg", image_bytes(0)), (f"{key}.txt", b"x")]
    ]
    members = odd + pair("x" * 300) + pair("ü/" * 80 + "y")
    reader = pairs_in(tmp_path, tar_bytes(members, format=tarfile.GNU_FORMAT, encoding="utf-8"))
    keys = [document.more["source_key"] for document in documents(reader)]
    assert keys == ["caf\\xe9", "caf\\xe8", "x" * 200, ("ü/" * 80 + "y")[:200]]
    reader = pairs_in(tmp_path, tar_bytes(members[4:], format=tarfile.PAX_FORMAT))
    assert [document.more["source_key"] for document in documents(reader)] == keys[2:]


def test_tar_headers_are_read_in_bounded_pieces(tmp_path: Path) -> None:
    """A header's extension of 200 MB, and a member that says it has 8 EiB."""
    asked: list[int] = []

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(-1 if size is None else size)
            return super().read(size)

    extension = tarfile.TarInfo("x")
    extension.type, extension.size = tarfile.XHDTYPE, 200 << 20
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 1 << 62
    content = tar_bytes(pair("0"))
    after = content.rstrip(b"\0")
    joined = extension.tobuf() + bytes(200 << 20) + after + bytes(-len(after) % 512) + huge.tobuf() + b"x" * 5000
    walked = list(tar.walk(Stream(joined), lambda name, size: size < 1 << 20))
    assert [getattr(item, "name", getattr(item, "what", "")) for item in walked] == [
        "a header of 209715200 bytes, at most 65536 are read",
        "0.txt",
        "the file ends inside huge.jpg",
    ]
    assert 0 < max(asked) <= 1 << 20
    assert min(asked) >= 0


# --- jsonl ---


def mmc4_document(n: int, **changes: Any) -> dict[str, Any]:
    info = {"image_name": f"{n}.jpg", "matched_text_index": 0, "matched_sim": 0.5}
    return {"text_list": [f"text {n}"], "image_info": [info], **changes}


def numbers(reader: Mmc4Reader) -> list[int]:
    return [int(document.texts[0].split()[1]) for document in documents(reader)]


def test_jsonl_is_read_once_whatever_the_number_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmc4, "PART_BYTES", 1000)
    text = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(mmc4_document(n)).encode() for n in range(500)) + b"\n\n\n"
    (tmp_path / "a.JSONL").write_bytes(text)
    reader = Mmc4Reader(tmp_path)
    assert len(reader.parts(reader.files()[0])) == len(text) // 1000 + 1
    assert numbers(reader) == list(range(500))
    taken = 0

    class Stream(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal taken
            line = super().readline(size)
            taken += len(line)
            return line

    starts = range(0, len(text), 1000)
    found_lines = [line for start in starts for _, line in lines(Stream(text), 1 << 20, start, start + 1000)]
    assert len(found_lines) == 500
    assert taken < 2.5 * len(text)


def test_a_long_line_is_skipped_by_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmc4, "PART_BYTES", 1000)
    middle = json.dumps(mmc4_document(1, url="x" * 50_000))
    rows = [json.dumps(mmc4_document(0)), middle, json.dumps(mmc4_document(2))]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert numbers(Mmc4Reader(tmp_path)) == [0, 1, 2]
    reader = Mmc4Reader(tmp_path, max_line_bytes=len(middle) - 1)
    assert (numbers(reader), dropped(reader)) == ([0, 2], ["line too long"])
    exact = Mmc4Reader(tmp_path, max_line_bytes=len(middle))
    assert numbers(exact) == [0, 1, 2]


@pytest.mark.parametrize("hole", ["from the start", "at a part", "anywhere"])
def test_a_terabyte_of_nothing_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hole: str) -> None:
    """Sparse files: the hole is one line that is too long, wherever it begins; what stands behind it is found."""
    monkeypatch.setattr(mmc4, "PART_BYTES", 4096)
    path, rows = tmp_path / "a.jsonl", [json.dumps(mmc4_document(i)) + "\n" for i in range(20)]
    begin = "".join(rows[:10])
    begin += "x" * (-len(begin) % 4096 - 1 if hole == "at a part" else 0) + "\n" * (
        hole == "at a part"
    )  # or a part begins with it
    with open(path, "w+b") as file:
        file.write(b"" if hole == "from the start" else begin.encode())
        file.seek(1 << 40)
        file.write(("\n" + "".join(rows[10:])).encode())
    started = time.process_time()
    reader = Mmc4Reader(tmp_path, max_line_bytes=1 << 20)
    assert len(reader.parts(reader.files()[0])) < 10
    assert numbers(reader) == [*range(10 if hole == "from the start" else 0, 20)]
    assert sorted(dropped(reader)) == (["bad JSON"] if hole == "at a part" else []) + ["line too long"]
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe", "bad JSON"),
        (b"[" * 100_000, "bad JSON"),
        (b'{"a":' * 100_000, "bad JSON"),
        (b'{"text_list": [], "image_info": [], "x": 1e999}', "bad JSON"),
        (b'{"text_list": [], "image_info": [], "x": %s}' % (b"9" * 5000), "bad JSON"),
        (b"[" + b"0," * 1_000_001 + b"0]", "too many values in one line"),
        (b"3", "bad JSON"),
        (b'{"text_list": null, "image_info": []}', "no text_list or image_info"),
        (b'{"text_list": [null], "image_info": []}', "bad text"),
    ],
)
def test_a_bad_line_is_dropped_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    good = json.dumps(mmc4_document(0)).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    reader = Mmc4Reader(tmp_path)
    assert (numbers(reader), dropped(reader)) == ([0, 0], [reason])
    (item,) = (item for item in found(reader) if isinstance(item, Dropped))
    assert item.where == f"line at byte {len(good) + 1}"


@pytest.mark.parametrize(
    "change",
    [
        {"image_name": None},
        {"matched_sim": None},
        {"matched_sim": "0.3"},
        {"matched_sim": 10**400},
        {"matched_text_index": 1},
        {"matched_text_index": -1},
        {"matched_text_index": 0.0},
        {"matched_text_index": True},
    ],
)
def test_a_bad_image_entry_is_dropped_alone(tmp_path: Path, change: dict[str, Any]) -> None:
    data = mmc4_document(0)
    data["image_info"] += [{**data["image_info"][0], **change}, 7]
    (tmp_path / "a.jsonl").write_text(json.dumps(data))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(image_bytes(0))
    (document,) = documents(Mmc4Reader(tmp_path))
    assert bad_images(document) == ["bad entry", "bad entry"]
    assert document.images[0].read() == image_bytes(0)


def test_base64_images_may_fill_many_megabytes(tmp_path: Path) -> None:
    content = image_bytes(0) + bytes(3 << 20)
    info = {"image_base64": base64.b64encode(content).decode(), "matched_text_index": 0, "matched_sim": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps({"text_list": ["x"], "image_info": [info] * 6}))
    (document,) = documents(Mmc4Reader(tmp_path))
    assert [image.read() == content for image in document.images] == [True] * 6


def test_zips_with_several_and_foreign_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        for n in range(2):
            archive.writestr(f"{n}.jsonl", json.dumps(mmc4_document(n)))
        archive.writestr("__MACOSX/._0.jsonl", b"\0\5\x16\7")
        archive.writestr("README", b"text")
    (tmp_path / "c.jsonl").write_bytes(zip_bytes(json.dumps(mmc4_document(3)).encode()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(mmc4_document(2)).encode()))
    reader = Mmc4Reader(tmp_path)
    assert (numbers(reader), dropped(reader)) == ([0, 1, 2, 3], ["system file", "no .jsonl file"])


def _flag_encrypted(content: bytes) -> bytes:
    """Set the flag in both headers of the only member."""
    changed = bytearray(content)
    changed[6] |= 1
    changed[content.index(b"PK\1\2") + 8] |= 1
    return bytes(changed)


def zip_bytes(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("a.jsonl", content)
    return stream.getvalue()


LINES = b"".join(json.dumps(mmc4_document(n)).encode() + b"\n" for n in range(200))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", r"^is damaged: File is not a zip file"),
        (zip_bytes(LINES)[:-30], r"^is damaged: File is not a zip file"),
        (_flag_encrypted(zip_bytes(LINES)), r"^is encrypted \(a\.jsonl\)\. Unpack it first\.$"),
        (zip_bytes(bytes(3 << 20)), r"^unpacks to 3145728 bytes, more than 200 times its size\. Unpack it by hand"),
        (zip_bytes(LINES, zipfile.ZIP_STORED).replace(b"text 7", b"text 8"), "Bad CRC-32 for file 'a.jsonl'"),
    ],
)
def test_a_zip_that_cannot_be_read_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl.zip").write_bytes(content)
    with pytest.raises((DataError, zipfile.BadZipFile), match=message):
        found(Mmc4Reader(tmp_path))


def test_a_large_directory_of_a_zip_is_not_read(tmp_path: Path) -> None:
    size = 5 << 20
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, size, 0, 0)
    (tmp_path / "a.jsonl.zip").write_bytes(bytes(size) + end)
    with pytest.raises(DataError, match="its directory has 5242880 bytes, at most 4194304 are read"):
        found(Mmc4Reader(tmp_path))


def test_a_compressed_bomb_stops(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(bytes(1 << 24)))
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        found(Mmc4Reader(tmp_path))


def test_other_encodings_of_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES.decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"^is UTF-16\. Write it as UTF-8\.$"):
        found(Mmc4Reader(tmp_path))


# --- parquet ---

URL = "https://example.org/p.jpg"


def parquet_in(folder: Path, columns: dict[str, Any], **options: Any) -> ParquetReader:
    folder.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return ParquetReader(folder, folder, **options)


def lists(rows: list[Any], kind: pyarrow.DataType) -> pyarrow.Array:
    return pyarrow.array(rows, pyarrow.list_(kind))


def test_a_row_that_is_not_utf8_is_dropped_alone(tmp_path: Path) -> None:
    raw = lists([[b"caf\xe9", None], [b"good", None]], pyarrow.binary())
    values = raw.values.view(pyarrow.string())
    texts = pyarrow.ListArray.from_arrays(raw.offsets, values)
    reader = parquet_in(tmp_path, {"images": lists([[None, URL]] * 2, pyarrow.string()), "texts": texts})
    first, second = found(reader)
    assert isinstance(first, Dropped)
    assert (first.reason, first.where) == ("text is not UTF-8", "row 0 of row group 0")
    assert isinstance(second, RawDocument)
    assert second.texts == ("good",)


COUNTS = pyarrow.struct([("d_hash_dup_count", pyarrow.float64()), ("p_hash_dup_count", pyarrow.float64())])


@pytest.mark.parametrize(
    ("metadata", "outcome"),
    [
        ([None, None, {"d_hash_dup_count": 9.0}], ["over-repeated"]),
        ([{"d_hash_dup_count": 9.0}], ["over-repeated"]),
        ([None, None, {"d_hash_dup_count": float("nan"), "p_hash_dup_count": 2.0}], ["missing file"]),
        ([None, None, {"d_hash_dup_count": float("nan"), "p_hash_dup_count": 9.0}], ["over-repeated"]),
        ([None, None, None], ["missing file"]),
        (None, ["missing file"]),
        ([{"d_hash_dup_count": 9.0}] * 2, "metadata fits neither the places nor the images"),
    ],
)
def test_counts_of_duplicates_as_they_come(tmp_path: Path, metadata: Any, outcome: Any) -> None:
    columns = {
        "images": lists([[None, None, URL]], pyarrow.string()),
        "texts": lists([["a", "b", None]], pyarrow.string()),
        "metadata": lists([metadata], COUNTS),
    }
    (item,) = found(parquet_in(tmp_path, columns, max_duplicates=5))
    assert (item.reason if isinstance(item, Dropped) else bad_images(item)) == outcome


def test_images_inside_the_file(tmp_path: Path) -> None:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    places = [None, {"bytes": image_bytes(1), "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None]
    (tmp_path / "b.jpg").write_bytes(image_bytes(2))
    columns = {"images": lists([places], kind), "texts": lists([["a", None, None, None]], pyarrow.large_string())}
    (document,) = documents(parquet_in(tmp_path, columns))
    assert [image.read() for image in document.images[:2]] == [image_bytes(1), image_bytes(2)]
    assert bad_images(document) == ["a place holds neither image nor text"]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (
            {"image_urls": lists([[URL]], pyarrow.string()), "text": ["x"]},
            "image_urls: list<element: string>, text: string",
        ),
        ({"images": [URL], "texts": ["x"]}, "images: string, texts: string"),
        (
            {"images": lists([[3]], pyarrow.int64()), "texts": lists([["x"]], pyarrow.string())},
            "images: list<element: int64>",
        ),
    ],
)
def test_other_columns_are_refused_with_those_wanted(tmp_path: Path, columns: dict[str, Any], shown: str) -> None:
    reader = parquet_in(tmp_path, columns)
    with pytest.raises(DataError) as caught:
        reader.parts(reader.files()[0])
    assert str(caught.value).startswith(f"has the columns {shown}")
    assert str(caught.value).endswith(
        "; wanted are images (a list of URLs, or of structs of bytes and path) and texts (a list of strings). "
        "Rename or convert them."
    )


def test_a_damaged_page_names_its_row_group(tmp_path: Path) -> None:
    texts = lists([[f"text {n}" * 20, None] for n in range(600)], pyarrow.string())
    table = pyarrow.table({"images": lists([[None, URL]] * 600, pyarrow.string()), "texts": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=200, write_page_checksum=True)
    place = parquet.read_metadata(tmp_path / "a.parquet").row_group(1).column(1).dictionary_page_offset
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[place + 60] ^= 1
    (tmp_path / "a.parquet").write_bytes(content)
    reader = ParquetReader(tmp_path)
    parts = reader.parts(reader.files()[0])
    assert len(list(reader.documents(parts[0]))) == 200
    with pytest.raises(DataError, match=r"^row group 1: is damaged behind row 0: .*\. Download the file again\.$"):
        list(reader.documents(parts[1]))


def test_an_empty_row_is_counted(tmp_path: Path) -> None:
    columns = {
        "images": lists([[], None, [None]], pyarrow.string()),
        "texts": lists([[], ["x"], [" "]], pyarrow.string()),
    }
    assert dropped(parquet_in(tmp_path, columns)) == [
        "empty record",
        "images and texts differ in length",
        "empty record",
    ]


def test_names_of_files_of_any_bytes(tmp_path: Path) -> None:
    columns = {"images": lists([[None, URL]], pyarrow.string()), "texts": lists([["a", None]], pyarrow.string())}
    parquet_in(tmp_path, columns)
    (tmp_path / "a.parquet").rename(tmp_path / "caf\udce9.parquet")
    (tmp_path / "\udce9.tar").write_bytes(tar_bytes(pair("0")))
    (tmp_path / "\udce9.jsonl").write_text(json.dumps(mmc4_document(0)))
    (tmp_path / "\udce9.html").write_text(f"<p>{WORDS}<img src=x.png>")
    readers: list[Reader] = [ParquetReader(tmp_path), PairReader(tmp_path), Mmc4Reader(tmp_path), HtmlReader(tmp_path)]
    assert [len(documents(reader)) for reader in readers] == [1, 1, 1, 1]


def test_a_table_of_images_that_is_no_csv(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_text(f"{URL},p.jpg\n" + "x" * 200_000 + "\n")
    columns = {"images": lists([[None, URL]], pyarrow.string()), "texts": lists([["a", None]], pyarrow.string())}
    (document,) = documents(parquet_in(tmp_path, columns))
    with pytest.raises(DataError, match=r"images\.csv, line 2: is no CSV: field larger than field limit"):
        document.images[0].read()


# --- pages ---


def page_in(folder: Path, content: bytes | str) -> RawDocument | Dropped:
    (folder / "a.html").write_bytes(content if isinstance(content, bytes) else content.encode())
    (item,) = found(HtmlReader(folder))
    return item


def texts_of(folder: Path, content: bytes | str) -> tuple[str, ...]:
    item = page_in(folder, content)
    assert isinstance(item, RawDocument), item
    return item.texts


@pytest.mark.parametrize(
    "hidden",
    [
        "<p class=toc>menu",
        "<p class=nav><b>menu",
        "<ul><li class=toc>menu<ul><li>more</ul></ul>",
        "<ul><li class=nav><b>menu<li>SHOWN</ul>",
        "<dl><dt class=nav><b>menu<dd>SHOWN</dl>",
        "<table><tr class=nav><td>menu<tr><td>SHOWN</table>",
        "<table><tr><td class=nav><b>menu<td>SHOWN</table>",
        "<table><thead class=header><tr><td>menu<tbody><tr><td>SHOWN</table>",
        "<div class=sidebar><p>menu<div>more</div></div>",
        "<script/>",
        "<title>menu</title>",
        "<textarea><img src=x></textarea>",
    ],
)
def test_an_omitted_end_tag_hides_nothing(tmp_path: Path, hidden: str) -> None:
    start = "SHOWN" in hidden
    texts = texts_of(tmp_path, f"{hidden}<p>{WORDS}<section>end</section><img src=p.png>")
    assert texts == (*(["SHOWN"] if start else []), WORDS.strip(), "end")


def test_marked_sections_and_bad_addresses(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(image_bytes(0))
    shown_as = ["p.png", " %70.png?x ", ".\\sub\\..\\p.png"]
    hostile = ["%00", "p%00.png", "a" * 5000, "../x.png", "http://[no", "data:image/png;base64,AA", "/etc/passwd"]
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    shown = "".join(f"<img src='{address}'>" for address in [*shown_as, *hostile, "loop.png"])
    item = page_in(tmp_path, f"<![<![<![CDATA[x]]>{shown}<p>{WORDS}")
    assert isinstance(item, RawDocument)
    assert [image.read() for image in item.images[:3]] == [image_bytes(0)] * 3
    assert bad_images(item) == [
        "not an address",
        "not an address",
        "missing file",
        "path leaves the folder",
        "not an address",
        "not beside the page",
        "path leaves the folder",
        "missing file",
    ]


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("iso-8859-1", "cp1252", "Größe “café” 10 €"),
        ("latin1", "cp1252", "déjà"),
        ("latin1", "latin-1", "a\x81b"),
        ("x-user-defined", "cp1252", "é"),
        ("gbk", "gb18030", "€"),
        ("Shift_JIS", "cp932", "日本語の文書①"),
        ("gb2312", "gb18030", "中文網頁"),
        ("euc-kr", "cp949", "한국어 똠"),
        ("big5", "big5", "繁體"),
        ("koi8-r", "koi8_r", "Привет"),
        ("utf-16le", "utf-8", "é"),  # a page whose declaration can be read as ASCII is not UTF-16
        ("nonsense", "utf-8", "é"),
        ("nonsense", "cp1252", "é"),
    ],
)
def test_pages_are_read_in_the_encoding_that_they_name(tmp_path: Path, label: str, codec: str, text: str) -> None:
    body = f"<p>{text} {WORDS}<img src=x.png>"
    heads = [
        f"<meta charset={label}>",
        f"<head><META http-equiv=content-type content='text/html; charset = \"{label}\"'>",
        f"<!-- <meta charset=utf-7> --><script>'<meta charset=utf-7>'</script><meta charset='{label}'>",
        f"<?xml version='1.0' encoding='{label}'?>",
    ]
    for head in heads:
        (shown,) = texts_of(tmp_path, (head + body).encode(codec))
        assert shown.removeprefix("?xml").startswith(text), head


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_decides(tmp_path: Path, codec: str) -> None:
    (shown,) = texts_of(tmp_path, f"<meta charset=latin1><p>Größe 日本 {WORDS}<img src=x.png>".encode(codec))
    assert shown.startswith("Größe 日本")


def test_a_page_that_is_not_in_its_encoding_is_counted(tmp_path: Path) -> None:
    item = page_in(tmp_path, f"<meta charset=utf-8><p>Größe {WORDS}<img src=x.png>".encode("latin-1"))
    assert isinstance(item, Dropped)
    assert (item.reason, item.where) == ("not in the encoding that it names", "a.html")
    assert item.detail == "utf-8: 'utf-8' codec can't decode byte 0xf6 in position 25: invalid start byte"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<div>" * 600, "nested too deeply"),
        ("<p>" + WORDS, "no image on the page"),
        ("<p>few <img src=x>", "too few words"),
        (WORDS + "<img src=x>" * 1001, "too many texts or images"),
        (b" " * (16 << 20) + b"x", "page cannot be read"),
    ],
)
def test_pages_that_cannot_be_used_are_counted(tmp_path: Path, content: bytes | str, reason: str) -> None:
    item = page_in(tmp_path, content)
    assert isinstance(item, Dropped)
    assert item.reason == reason


def test_long_texts_are_kept_whole(tmp_path: Path) -> None:
    words = " ".join(str(n) for n in range(300_000))
    texts = texts_of(tmp_path, f"<p>{words}<p>x<img src=x.png>")
    assert "".join(texts[:-1]) == words
    assert [len(text) for text in texts] == [1 << 20, len(words) - (1 << 20), 1]


def test_links_and_system_files_among_pages(tmp_path: Path) -> None:
    page = f"<p>{WORDS}<img src=x.png>"
    for name in ["a.html", "__MACOSX/a.html", ".checkpoints/a.html", "._a.html"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(page)
    (tmp_path / "l.html").symlink_to(tmp_path / "a.html")
    (tmp_path / "loop.html").symlink_to(tmp_path / "loop.html")
    os.mkfifo(tmp_path / "fifo.html")
    reasons = [item.reason if isinstance(item, Dropped) else "kept" for item in found(HtmlReader(tmp_path))]
    assert sorted(reasons) == ["kept", *["page cannot be read"], *["page is a link"] * 2, *["system file"] * 3]


HOSTILE_PAGES: dict[str, Callable[[int], str]] = {
    "open paragraphs and stray end tags": lambda n: "<p>" * n + "</x>" * n,
    "unfinished attributes": lambda n: '<a ="' * n,
    "attributes": lambda n: "<a " + " ".join(f"b{i}=1" for i in range(n)) + ">",
    "marked sections": lambda n: "<![<![" * n,
    "comments": lambda n: "<!--" * n,
    "scripts": lambda n: "<script><!--" + "<script" * n,
    "formatting": lambda n: "".join(f"<b a={i}></b>" for i in range(n)) + "<p>" * n,
    "deep, then stray": lambda n: "<span>" * 500 + "</x>" * n,
    "entities": lambda n: "&a" * n,
    "images": lambda n: "<img src=x>" * n,
}


@pytest.mark.parametrize("kind", HOSTILE_PAGES)
def test_time_grows_with_the_length_of_a_page(tmp_path: Path, kind: str) -> None:
    def seconds(n: int) -> float:
        content = HOSTILE_PAGES[kind](n)
        start = time.process_time()
        page_in(tmp_path, content)
        return time.process_time() - start

    assert seconds(40_000) < 7 * max(seconds(10_000), 0.03)


# --- all ---


@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    for name in ["a.jsonl", "a.tar", "a.parquet", "a.jsonl.zip"]:
        os.mkfifo(tmp_path / name)
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    readers: list[Reader] = [Mmc4Reader(tmp_path), PairReader(tmp_path), ParquetReader(tmp_path)]
    messages = []
    for reader in readers:
        for file in reader.files():
            with pytest.raises(OSError, match=r"not a regular file|Too many levels") as caught:
                reader.parts(file)
            messages.append(caught.value.strerror)
    assert messages == ["not a regular file"] * 3 + ["Too many levels of symbolic links", "not a regular file"]


def test_system_files() -> None:
    for name in ["__MACOSX/a.jpg", "a/._b.jpg", ".hidden/b.txt", "x/Thumbs.db", "desktop.ini", "./.a"]:
        assert is_system_file(name), name
    for name in ["a.jpg", "a/b.c/d", "../x.jpg", "./a.jpg", "/a", "macosx/a", "thumbs.db/a"]:
        assert not is_system_file(name), name


def test_links_to_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0.tar").touch()
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    assert inputs(tmp_path, ".tar") == [tmp_path / "real" / "0.tar"]
    assert caplog.messages == [f"{tmp_path}/real/loop: links to folders are not followed."]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()

    def walk(path: Path, onerror: Callable[[OSError], None]) -> list[Any]:
        onerror(PermissionError(13, "Permission denied", str(path / "in")))
        return []

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataError, match=r"/in: cannot be listed: Permission denied\. Check its permissions\.$"):
        inputs(tmp_path, ".tar")
