"""Public formats and hostile input to the native layout: right content, every drop counted, kill-safe."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import signal
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from corpora import image_bytes
from launch import Job, run_script
from lcl_mcore.data.format import Document, ImageEntry, NativeDataset, ShardWriter
from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
from lcl_mcore.data.prepare.normalise import ImageLimits
from lcl_mcore.data.prepare.pairs import PairReader
from lcl_mcore.data.prepare.parquet import ParquetReader
from lcl_mcore.data.prepare.records import RawDocument, Reader
from lcl_mcore.data.prepare.repeated import images_of
from lcl_mcore.data.prepare.split import split
from lcl_mcore.errors import DataError

TOOL = "tools/prepare_data.py"
OPTIONS = PrepareOptions(limits=ImageLimits(min_side=32))


def run(reader: Reader, output: Path, options: PrepareOptions = OPTIONS) -> dict[str, Any]:
    return prepare(reader, output, options, workers=1, quiet=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def mmc4_line(n: int, **changes: Any) -> str:
    info = {"image_name": f"{n}.jpg", "raw_url": "x", "matched_text_index": 1, "matched_sim": 0.3}
    data = {"text_list": [f"first {n}", f"second {n}"], "image_info": [info], "url": "http://x", **changes}
    return json.dumps(data)


def make_mmc4(folder: Path, good: int) -> Path:
    """A shard with good documents and one of each hostile kind; images beside it."""
    images = folder / "images"
    images.mkdir(parents=True)
    for n in range(good):
        (images / f"{n}.jpg").write_bytes(image_bytes(n))
    (images / "page.jpg").write_bytes(b"<html>404</html>")
    (images / "cut.jpg").write_bytes(image_bytes(1)[:700])
    (images / "bomb.png").write_bytes(_bomb())
    (folder / "secret.jpg").write_bytes(image_bytes(5))
    (images / "link.jpg").symlink_to(folder / "secret.jpg")
    info = {"matched_text_index": 0, "matched_sim": 0.3}
    bad_images = ["page.jpg", "cut.jpg", "bomb.png", "../secret.jpg", str(folder / "secret.jpg"), "link.jpg", "no.jpg"]
    hostile = [
        mmc4_line(0, image_info=[{"image_name": name, **info} for name in [*bad_images, "0.jpg"]]),
        mmc4_line(0, image_info=[{"image_name": "0.jpg", **info}] * 10_000),
        '{"text_list": ["a"], "image_info": [{"image_name": "0.jpg", "matched_text_index": 0, "matched_sim": NaN}]}',
        '{"text_list": ["a"], "text_list": ["b"], "image_info": []}',
        mmc4_line(0, image_info=[{"image_name": "0.jpg", "matched_text_index": 7, "matched_sim": 0.3}]),
        "[" * 100_000,
        "not json",
        json.dumps([1, 2]),
        mmc4_line(0, text_list=[3, 4]),
        mmc4_line(0, text_list=["lone \ud800 surrogate <BoI> </s>", "x"]),
        mmc4_line(0, image_info=[{"image_base64": base64.b64encode(image_bytes(9)).decode(), **info}]),
        mmc4_line(0, image_info=[{"image_base64": "!!!", **info}]),
        '{"text_list": ["' + "x" * (5 << 20) + '"]}',
    ]
    lines = [mmc4_line(n) for n in range(good)] + hostile
    (folder / "docs_shard_0_v2.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    return folder


def _bomb() -> bytes:
    stream = io.BytesIO()
    Image.new("1", (16_000, 16_000)).save(stream, "PNG")
    return stream.getvalue()


def test_mmc4_with_hostile_lines_and_images(tmp_path: Path) -> None:
    source = make_mmc4(tmp_path / "in", 20)
    manifest = run(Mmc4Reader(source, max_line_bytes=4 << 20), tmp_path / "out")
    assert manifest["dropped_documents"] == {
        "bad JSON": 5,
        "bad text": 1,
        "line too long": 1,
        "no image left": 2,
        "too many images": 1,
    }
    assert manifest["dropped_images"] == {
        "bad base64": 1,
        "bad entry": 1,
        "in a dropped document": 10_000,
        "missing file": 1,
        "not an image": 1,
        "oversized": 1,
        "path leaves the folder": 3,
        "undecodable": 1,
    }
    assert (manifest["documents"], manifest["images"]) == (23, 23)
    data = NativeDataset(str(tmp_path / "out"))
    document, members = data.document(7)
    assert document.texts == ("first 7", "second 7")
    assert (document.images[0].text_index, document.images[0].similarity) == (1, 0.3)
    assert data.image(document, members, 0) == image_bytes(7)
    kept, _ = data.document(20)
    assert [image.name for image in kept.images] == ["0.jpg"]
    assert data.document(21)[0].texts[0] in ("lone ? surrogate <BoI> </s>", "lone \ufffd surrogate <BoI> </s>")


def test_zip_input_and_zip_bomb(tmp_path: Path) -> None:
    source = make_mmc4(tmp_path / "in", 5)
    plain = source / "docs_shard_0_v2.jsonl"
    with zipfile.ZipFile(source / "docs_shard_0_v2.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_0_v2.jsonl", "\n".join(mmc4_line(n) for n in range(5)))
    plain.unlink()
    assert run(Mmc4Reader(source), tmp_path / "out")["documents"] == 5
    with zipfile.ZipFile(source / "docs_shard_0_v2.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_0_v2.jsonl", b"\n" * (30 << 20))
    with pytest.raises(DataError, match="more than 200 times its size"):
        run(Mmc4Reader(source), tmp_path / "out2")


def test_parquet_with_urls(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    images = tmp_path / "in" / "images"
    images.mkdir(parents=True)
    urls = [f"https://example.org/p/{n}.jpg?x=1" for n in range(3)]
    (images / f"{hashlib.sha256(urls[0].encode()).hexdigest()}.jpg").write_bytes(image_bytes(0))
    (images / "1.jpg").write_bytes(image_bytes(1))
    (images / "listed.jpg").write_bytes(image_bytes(2))
    (images / "images.csv").write_text(f"{urls[2]},listed.jpg\n")
    marker = "END_OF_DOCUMENT_TOKEN_TO_BE_REPLACED"
    rows = [
        {"images": [urls[0], None, urls[1]], "texts": [None, "between", None]},
        {"images": [None, urls[2], None], "texts": [f"a{marker}b", None, "c"]},
        {"images": [urls[0]], "texts": ["both"]},
        {"images": [None, None], "texts": ["only"]},
        {"images": ["https://example.org/gone.png", None], "texts": [None, "x"]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet", row_group_size=2)
    manifest = run(ParquetReader(tmp_path / "in"), tmp_path / "out")
    assert manifest["documents"] == 2
    assert manifest["dropped_images"] == {"missing file": 1}
    assert manifest["dropped_documents"] == {
        "a place holds not just one of image and text": 1,
        "images and texts differ in length": 1,
        "no image": 1,
        "no image left": 1,
    }
    first, second = (NativeDataset(str(tmp_path / "out")).document(i)[0] for i in (0, 1))
    assert (first.texts, [image.text_index for image in first.images]) == (("between",), [0, 1])
    assert (second.texts, [image.text_index for image in second.images]) == (("b", "c"), [1])
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 nonsense")
    manifest = run(ParquetReader(tmp_path / "in"), tmp_path / "out2")
    assert manifest["dropped_documents"]["file cannot be read"] == 1
    example = manifest["examples_of_dropped"]["documents"]["file cannot be read"]
    assert example.startswith("b.parquet: is not a readable parquet file")


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_pairs_from_good_and_damaged_tars(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pairs = [
        m for n in range(10) for m in [(f"{n:04d}.jpg", image_bytes(n)), (f"{n:04d}.txt", f"caption {n}".encode())]
    ]
    odd = [
        ("a.b.jpg", image_bytes(1)),
        ("a.txt", b"the key of the image is a.b"),
        ("0003.jpg", image_bytes(3)),
        ("0003.txt", b"again"),
        ("x.txt", b"no image"),
        ("y.jpg", image_bytes(2)),
        ("z.jpg", image_bytes(2)),
        ("z.txt", b"  "),
        ("../../escape.jpg", image_bytes(4)),
        ("../../escape.txt", b"never written anywhere"),
        ("w.jpg", image_bytes(6)),
        ("w.json", b'{"caption": "from json", "url": "http://x"}'),
    ]
    make_tar(source / "00000.tar", pairs + odd)
    make_tar(source / "00001.tar", pairs)
    whole = (source / "00001.tar").read_bytes()
    (source / "00001.tar").write_bytes(whole[: whole.index(image_bytes(5)) + 100])
    (source / "00002.tar").write_bytes(b"\x00garbage" * 300)
    manifest = run(PairReader(source), tmp_path / "out")
    assert manifest["dropped_documents"] == {
        "a key stands twice": 1,
        "empty caption": 1,
        "no caption": 2,
        "no image in the sample": 2,
        "the tar is cut or damaged here": 2,
    }
    assert manifest["documents"] == 12 + 5
    texts = {NativeDataset(str(tmp_path / "out")).document(i)[0].texts[0] for i in range(manifest["documents"])}
    assert {"caption 3", "from json"} <= texts
    assert not list(tmp_path.parent.glob("escape*"))


def test_html_keeps_order_without_navigation(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for n in range(4):
        (source / f"{n}.png").write_bytes(image_bytes(n, 90, 90, "PNG"))
    (source / "logo.png").write_bytes(image_bytes(50, 90, 90, "PNG"))
    words = "one two three four five six seven eight nine ten"
    for n in range(4):
        (source / f"page{n}.html").write_text(
            f"<html><head><title>T</title><script>var x='<p>no</p>'</script></head><body><div class='navbar'>"
            f"<p>menu</p><img src='logo.png'></div><h1>Head {n}</h1><p>{words} &amp; more</p><img src='logo.png'>"
            f"<p>{words}</p><figure><img src='{n}.png'/><figcaption>Figure {n}</figcaption></figure>"
            f"<img src='http://[no'><img src='../../etc/passwd'><img src='https://example.org/x.png'><footer>end</footer></body></html>"
        )
    options = PrepareOptions(limits=ImageLimits(min_side=32), max_repeats=2)
    manifest = run(HtmlReader(source), tmp_path / "out", options)
    assert (manifest["documents"], manifest["images"]) == (4, 4)
    assert manifest["dropped_images"] == {
        "not an address": 4,
        "not beside the page": 4,
        "over-repeated": 4,
        "path leaves the folder": 4,
    }
    document, _ = NativeDataset(str(tmp_path / "out")).document(2)
    assert document.texts == ("Head 2", f"{words} & more", words, "Figure 2")
    assert [image.text_index for image in document.images] == [3]


def test_repeated_images_are_sought_in_navigation_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes(1, 90, 90, "PNG"))
    words = "word " * 30
    (tmp_path / "page.html").write_text(
        f"<nav><img src='b.png'></nav><p>{words}</p><IMG alt='x>y' class=b\n src='a.png'/><img<img src=a.png>"
        f"<!-- <img src='d.png'> --><p>{words}</p><img src='c d.png'>"
    )
    reader = HtmlReader(tmp_path)
    (file,) = reader.files()
    (part,) = reader.parts(file)
    (page,) = reader.documents(part)
    assert isinstance(page, RawDocument)
    assert [image.source for image in page.images] == ["a.png", "c d.png"]
    (images,) = images_of(reader, part)
    assert sorted(image.source for image in images) == ["a.png", "b.png", "c d.png"]


def make_shared(folder: Path, images: list[list[int]]) -> Path:
    """Prepared pages with the images of the given numbers."""
    pages = folder / "pages"
    pages.mkdir(parents=True)
    for number in {number for page in images for number in page}:
        (pages / f"{number}.png").write_bytes(image_bytes(number, 90, 90, "PNG"))
    for n, page in enumerate(images):
        shown = "".join(f"<img src='{number}.png'>" for number in page)
        (pages / f"{n:03d}.html").write_text(f"<p>{'word ' * 30} page {n}</p>{shown}")
    run(HtmlReader(pages), folder / "all")
    return folder / "all"


def test_split_never_parts_documents_that_share_an_image(tmp_path: Path) -> None:
    chain = [[n, n + 1] for n in range(30)]  # one group of 30 documents
    twins = [[100 + n // 2] for n in range(20)]  # ten groups of 2
    single = [[200 + n] for n in range(50)]
    source = make_shared(tmp_path, chain + twins + single)
    result = split(source, tmp_path / "out", heldout_share=0.2, quiet=True)
    assert (result["train"]["documents"], result["heldout"]["documents"], result["heldout_wanted"]) == (80, 20, 20)
    images: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for part in ("train", "heldout"):
        data = NativeDataset(str(tmp_path / "out" / part))
        documents = [data.document(i) for i in range(len(data))]
        images[part] = {image.sha256 for document, _ in documents for image in document.images}
        texts[part] = {text for document, _ in documents for text in document.texts}
        for document, members in documents:
            for n in range(len(document.images)):
                data.image(document, members, n)  # checks the sha256
    assert not images["train"] & images["heldout"]
    assert len(texts["train"] | texts["heldout"]) == 100
    assert len({t for t in texts["heldout"] if int(t.split()[-1]) < 30}) == 0
    before = files(tmp_path / "out")
    assert split(source, tmp_path / "out", heldout_share=0.2, quiet=True) == result
    (tmp_path / "out" / "train" / "dataset.json").unlink()  # as after a kill before the last file
    (tmp_path / "out" / "train" / ".split").touch()
    split(source, tmp_path / "out", heldout_share=0.2, quiet=True)
    assert files(tmp_path / "out") == before
    other = split(source, tmp_path / "seed", heldout_share=0.2, seed=1, quiet=True)
    assert other["heldout"]["fingerprint"] != result["heldout"]["fingerprint"]
    with pytest.raises(DataError, match="with another share or seed"):
        split(source, tmp_path / "out", heldout_share=0.3, quiet=True)
    with pytest.raises(DataError, match=r"of 100 documents 0 would be held out \(0 are wanted\)"):
        split(source, tmp_path / "none", heldout_share=0.001, quiet=True)
    with pytest.raises(DataError, match=r"heldout share 1\.5: must lie between 0 and 1"):
        split(source, tmp_path / "none", heldout_share=1.5, quiet=True)
    (tmp_path / "other" / "train").mkdir(parents=True)
    (tmp_path / "other" / "train" / "train-00000.tar").write_bytes(b"somebody's")
    with pytest.raises(DataError, match=r"other/train: holds other files\. Choose another"):
        split(source, tmp_path / "other", heldout_share=0.2, quiet=True)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/train: cannot be written: Not a directory"):
        split(source, tmp_path / "file", heldout_share=0.2, quiet=True)


def test_shards_have_the_bytes_of_earlier_versions(tmp_path: Path) -> None:
    """Computed at commit 02e64cf: a data set prepared again has the same fingerprint."""
    images = [b"first", b"second" * 200]
    entries = tuple(
        ImageEntry(f"{n}.png", 7, 9, "png", hashlib.sha256(content).hexdigest(), len(content), n, 0.25)
        for n, content in enumerate(images)
    )
    writer = ShardWriter(tmp_path / "shard-000.tar")
    writer.add(Document("doc-0", "matched", ("a text", "ein Text: ä"), entries), images, url="http://x")
    writer.add(Document("doc-1", "pair", ("caption",), entries[:1]), images[:1])
    info = writer.close()
    assert (info.documents, info.images, info.members, info.bytes) == (2, 3, 5, 10240)
    assert info.sha256 == "1a59548b31142bc117091e09b95ff584e9bd5a4f365fa979d2f9e9f2c81b9650"
    index = hashlib.sha256((tmp_path / "shard-000.index.npy").read_bytes()).hexdigest()
    assert index == "810075696451539c84f32fb590028a080a7cd5b8a5bdb472d4c715fd5486e47c"


@pytest.mark.parametrize("corrupt", [False, True])
def test_plain_webdataset_reads_the_result(tmp_path: Path, corrupt: bool) -> None:
    run(Mmc4Reader(make_mmc4(tmp_path / "in", 12)), tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(samples) == 15
    first = json.loads(samples[3]["json"])
    assert first["text_list"] == ["first 3", "second 3"]
    assert samples[3]["0.jpg"] == image_bytes(3)
    if corrupt:
        shard.write_bytes(shard.read_bytes()[:5000])
        with pytest.raises(DataError, match=rf"{shard.name}: has 5000 bytes, the manifest says"):
            NativeDataset(str(tmp_path / "out"))
        shard.unlink()
        with pytest.raises(DataError, match=rf"{shard.name}: is missing"):
            NativeDataset(str(tmp_path / "out"))


def test_a_second_run_changes_nothing_and_other_options_are_refused(tmp_path: Path) -> None:
    source = make_mmc4(tmp_path / "in", 8)
    run(Mmc4Reader(source), tmp_path / "out")
    before = files(tmp_path / "out")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    run(Mmc4Reader(source), tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == stamps
    assert ".progress" not in {p.name for p in (tmp_path / "out").iterdir()}
    with pytest.raises(
        DataError, match=r"was prepared with other settings: limits\.min_side was 32, now 10\. Give the same"
    ):
        run(Mmc4Reader(source), tmp_path / "out", PrepareOptions(limits=ImageLimits(min_side=10)))


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_killed_at_random_moments_gives_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for t in range(4):
        pairs = [
            member
            for n in range(20)
            for member in [(f"{n:04d}.png", image_bytes(n + t, 150, 150, "PNG")), (f"{n:04d}.txt", b"a caption")]
        ]
        make_tar(source / f"{t:05d}.tar", pairs)

    def start(output: Path) -> Job:
        return Job(None, TOOL, "pairs", str(source), str(output), "--workers", "2", "--quiet")

    with start(tmp_path / "whole") as job:
        assert job.wait(100) == 0
    rng = random.Random(3)
    for _ in range(3):
        with start(tmp_path / "killed") as job:
            time.sleep(rng.uniform(0.1, 3.0))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pids[0], signal.SIGKILL)  # the workers too
    with start(tmp_path / "killed") as job:
        assert job.wait(100) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_tool_reports_errors_in_one_line(tmp_path: Path) -> None:
    result = run_script(TOOL, "mmc4", str(tmp_path / "no"), str(tmp_path / "out"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "does not exist" in result.stderr
    assert "Traceback" not in result.stderr
