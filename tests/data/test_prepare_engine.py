"""What `prepare` promises whatever the input: nothing uncounted, kills cost nothing, changes are noticed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpora import image_bytes
from launch import run_script
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.prepare import mmc4
from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
from lcl_mcore.data.prepare.normalise import ImageLimits
from lcl_mcore.data.prepare.pairs import PairReader
from lcl_mcore.data.prepare.records import (
    BadRecordError,
    Dropped,
    InputFile,
    InputPart,
    RawDocument,
    RawImage,
    Reader,
    bad_image,
    documents_of,
)
from lcl_mcore.data.prepare.split import heldout_documents, split, wanted_documents
from lcl_mcore.data.prepare.time_limit import time_limit
from lcl_mcore.errors import DataError
from lcl_mcore.untrusted import open_regular
from test_data_prepare import files, make_tar

TOOL = "tools/prepare_data.py"
OPTIONS = PrepareOptions(limits=ImageLimits(min_side=32), shard_documents=3)
TEXT_ONLY = replace(OPTIONS, require_image=False, shard_documents=100)
PICTURES = [image_bytes(n, 48, 40) for n in range(6)]
FAST = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run(reader: Reader, output: Path, options: PrepareOptions = OPTIONS, **more: Any) -> dict[str, Any]:
    return prepare(reader, output, options, workers=1, **{"quiet": True, **more})


def new_folder(base: Path) -> Path:
    """An empty folder for one example."""
    folder = base / str(len(list(base.iterdir())))
    folder.mkdir()
    return folder


# --- corpora of any shape ---

ENTRY = st.sampled_from(["0.jpg", "1.jpg", "2.jpg", "gone.jpg", "text.jpg", "../0.jpg", "tiny.png"])
LINE = st.one_of(
    st.lists(ENTRY, max_size=3),
    st.sampled_from(["{", "[]", "null", '{"text_list": 3}', '{"text_list": [], "image_info": []}']),
)
CORPUS = st.dictionaries(st.sampled_from(["a", "b/a", "c d", "c_d"]), st.lists(LINE, max_size=7), min_size=1)


def write_mmc4(folder: Path, corpus: dict[str, list[Any]], *, pictures: int = 3) -> Path:
    """`corpus` holds the lines of each file: the names of the images of a good one, or the line itself."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for n in range(pictures):
        (images / f"{n}.jpg").write_bytes(PICTURES[n])
    (images / "text.jpg").write_bytes(b"<html>")
    (images / "tiny.png").write_bytes(image_bytes(1, 9, 9, "PNG"))
    for name, lines in corpus.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{mmc4_line(name, n, line)}\n" for n, line in enumerate(lines)))
    return folder


def mmc4_line(name: str, number: int, line: Any) -> str:
    if isinstance(line, str):
        return line
    infos = [{"image_name": image, "matched_text_index": 0, "matched_sim": 0.3} for image in line]
    return json.dumps({"text_list": [f"{name} {number}"], "image_info": infos})


def stored_documents(folder: Path) -> list[tuple[str, ...]]:
    """The texts of all documents, whose images are read and compared with their sha256."""
    data = NativeDataset(str(folder))
    found = []
    for index in range(len(data)):
        document, members = data.document(index)
        for n in range(len(document.images)):
            data.image(document, members, n)
        found.append(document.texts)
    data.close()
    return found


def require_sums(manifest: dict[str, Any]) -> None:
    """Seen = kept + dropped in every file and in all, and all is the sum of the files."""
    for what in ("documents", "images"):
        counts = [file[what] for file in manifest["inputs"]]
        for count in counts:
            assert count["seen"] == count["kept"] + sum(count["dropped"].values())
        dropped = sum((Counter(count["dropped"]) for count in counts), Counter())
        assert dropped == Counter(manifest[f"dropped_{what}"])
        assert manifest[f"seen_{what}"] == sum(count["seen"] for count in counts)
        assert manifest[what] == sum(count["kept"] for count in counts)
        assert set(manifest["examples_of_dropped"][what]) == set(manifest[f"dropped_{what}"])


@FAST
@given(CORPUS, st.booleans(), st.integers(0, 2))
def test_every_line_and_every_image_is_kept_or_counted(
    tmp_path: Path, corpus: dict[str, list[Any]], require_image: bool, max_repeats: int
) -> None:
    folder = new_folder(tmp_path)
    source = write_mmc4(folder / "in", corpus)
    options = replace(OPTIONS, require_image=require_image, max_repeats=max_repeats)
    lines = {f"{name}.jsonl": len(content) for name, content in corpus.items()}
    entries = sum(len(line) for content in corpus.values() for line in content if isinstance(line, list))
    usable = {"0.jpg", "1.jpg", "2.jpg"} if require_image and not max_repeats else set()
    if not any(isinstance(line, list) and usable & {*line} for content in corpus.values() for line in content):
        with contextlib.suppress(DataError):
            run(Mmc4Reader(source), folder / "out", options)
        if not (folder / "out").exists():
            with pytest.raises(DataError, match=f"no document of {sum(lines.values())} could be used"):
                run(Mmc4Reader(source), folder / "out", options)
            return
    manifest = run(Mmc4Reader(source), folder / "out", options)
    assert {file["file"]: file["documents"]["seen"] for file in manifest["inputs"]} == lines
    assert manifest["seen_images"] == entries
    require_sums(manifest)
    assert len(stored_documents(folder / "out")) == manifest["documents"]


@FAST
@given(
    st.lists(st.lists(st.sampled_from(["good", "no image", "no text", "broken"]), max_size=6), min_size=1, max_size=3)
)
def test_every_pair_is_kept_or_counted(tmp_path: Path, tars: list[list[str]]) -> None:
    folder = new_folder(tmp_path)
    for number, samples in enumerate(tars):
        (folder / f"in/{number}").mkdir(parents=True)
        members = []
        for n, kind in enumerate(samples):
            if kind != "no image":
                members.append((f"{n}.jpg", b"no picture" if kind == "broken" else PICTURES[n]))
            if kind != "no text":
                members.append((f"{n}.txt", f"caption {number} {n}".encode()))
        make_tar(folder / f"in/{number}/same.tar", members)
    good = [(f"caption {t} {n}",) for t, kinds in enumerate(tars) for n, kind in enumerate(kinds) if kind == "good"]
    if not good:
        with pytest.raises(DataError, match="could be used, so that nothing is kept"):
            run(PairReader(folder / "in"), folder / "out")
        return
    manifest = run(PairReader(folder / "in"), folder / "out")
    require_sums(manifest)
    assert manifest["seen_documents"] == sum(map(len, tars))
    assert stored_documents(folder / "out") == good  # files of one name are two files, in their order
    names = [f"{t}/same.tar" for t, samples in enumerate(tars) if samples]
    assert [file["file"] for file in manifest["inputs"] if file["documents"]["seen"]] == names


def test_the_parts_of_a_file_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmc4, "PART_BYTES", 300)
    source = write_mmc4(tmp_path / "in", {"a": [["0.jpg"], "{", ["gone.jpg", "1.jpg"]] * 5, "b": [["2.jpg"]]})
    manifest = run(Mmc4Reader(source), tmp_path / "out")
    require_sums(manifest)
    assert len(manifest["shards"]) > 4
    assert [(file["file"], file["documents"]["seen"], file["images"]["seen"]) for file in manifest["inputs"]] == [
        ("a.jsonl", 15, 15),
        ("b.jsonl", 1, 1),
    ]
    numbers = [n for n in range(15) if n % 3 != 1]
    assert stored_documents(tmp_path / "out") == [*((f"a {n}",) for n in numbers), ("b 0",)]


# --- kills ---


def in_a_fork(action: Callable[[], None], *, kill_at: int = 0) -> int:
    """Run `action` in a forked process, which dies at the given file-system event; returns how many there were."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, _: Any) -> None:
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
                count += 1
                if count == kill_at:
                    os._exit(9)

        sys.addaudithook(watch)
        try:
            action()
        finally:
            os.write(write, str(count).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        events = answer.read()
    os.waitpid(child, 0)
    return int(events or 0)


@FAST
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4), st.integers(0, 2))
def test_kills_anywhere_change_no_byte(tmp_path: Path, moments: list[float], max_repeats: int) -> None:
    folder = new_folder(tmp_path)
    source = write_mmc4(
        folder / "in", {"a": [["0.jpg"], ["1.jpg"], "{", ["2.jpg"], ["0.jpg"]], "b/a": [["2.jpg", "gone.jpg"]]}
    )
    options = replace(OPTIONS, max_repeats=max_repeats)

    def prepare_in(name: str) -> Callable[[], None]:
        return lambda: void(run(Mmc4Reader(source), folder / name, options))

    events = in_a_fork(prepare_in("whole"))
    assert events > 20
    for moment in moments:
        in_a_fork(prepare_in("killed"), kill_at=1 + int(moment * (events - 1)))
    manifest = run(Mmc4Reader(source), folder / "killed", options)
    require_sums(manifest)
    assert files(folder / "killed") == files(folder / "whole")


def void(_: object) -> None:
    """Drops a result."""


# --- changes ---

CHANGE = st.sampled_from(["line", "new file", "no file", "image", "new image", "no image", "images moved"])


def change(source: Path, kind: str) -> Path:
    """Change the input; returns the folder of images."""
    images = source / "images"
    if kind == "line":
        text = (source / "a.jsonl").read_text()
        (source / "a.jsonl").write_text(text.replace("a 0", "a 9"))  # the same size
    elif kind == "new file":
        (source / "aa.jsonl").write_text(mmc4_line("aa", 0, ["1.jpg"]) + "\n")
    elif kind == "no file":
        (source / "b/a.jsonl").unlink()
    elif kind == "image":
        (images / "0.jpg").write_bytes(PICTURES[5])
    elif kind == "new image":
        (images / "gone.jpg").write_bytes(PICTURES[4])
    elif kind == "no image":
        (images / "1.jpg").unlink()
    else:
        shutil.copytree(images, source / "others")
        (source / "others" / "0.jpg").write_bytes(PICTURES[4])
        return source / "others"
    return images


@FAST
@given(CHANGE, st.none() | st.floats(0, 1), st.integers(0, 2))
def test_changed_input_is_noticed(tmp_path: Path, kind: str, killed: float | None, max_repeats: int) -> None:
    """After a change the old data are never returned: they are refused, or brought up to date as if made anew."""
    folder = new_folder(tmp_path)
    source = write_mmc4(
        folder / "in", {"a": [["0.jpg"], ["1.jpg"], "{", ["gone.jpg"]], "b/a": [["2.jpg", "gone.jpg"], ["0.jpg"]]}
    )
    options = replace(OPTIONS, max_repeats=max_repeats)

    def begin() -> None:
        run(Mmc4Reader(source), folder / "out", options)

    if killed is None:
        begin()
    else:
        in_a_fork(begin, kill_at=1 + int(killed * 60))
    images = change(source, kind)
    reader = Mmc4Reader(source, images)
    if (folder / "out" / "dataset.json").exists():
        before = files(folder / "out")
        with pytest.raises(DataError, match="was prepared before its input changed: ") as refusal:
            run(reader, folder / "out", options)
        assert len(str(refusal.value).splitlines()) == 1
        assert files(folder / "out") == before
    manifest = run(reader, folder / "out", options, update=True)
    anew = run(Mmc4Reader(source, images), folder / "anew", options)
    assert manifest == anew
    assert files(folder / "out") == files(folder / "anew")
    assert run(reader, folder / "out", options) == manifest  # and now it is this input's


@FAST
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1.3)), min_size=1, max_size=5), st.integers(0, 2))
def test_input_that_changes_back_and_forth_between_kills(
    tmp_path: Path, attempts: list[tuple[int, float]], max_repeats: int
) -> None:
    """Shards of one version never pass for the other's, though both have the same sizes and each its own time."""
    folder = new_folder(tmp_path)
    source = write_mmc4(folder / "in", {"a": [["0.jpg"], ["1.jpg"], ["2.jpg"], ["1.jpg"]], "b": [["0.jpg"]]})
    lines = (source / "a.jsonl").read_text()
    versions = [lines, lines.replace("1.jpg", "0.jpg").replace("a 0", "a 9")]
    options = replace(OPTIONS, max_repeats=max_repeats)

    def become(version: int) -> None:
        (source / "a.jsonl").write_text(versions[version])
        os.utime(source / "a.jsonl", (version, version))

    def attempt() -> None:
        run(Mmc4Reader(source), folder / "out", options, update=True)

    for version, moment in attempts:
        become(version)
        in_a_fork(attempt, kill_at=1 + int(moment * 70))  # the last ones are not killed
    for version in (0, 1):
        become(version)
        attempt()
        run(Mmc4Reader(source), folder / str(version), options)
        assert files(folder / "out") == files(folder / str(version))


def test_an_update_that_would_keep_nothing_leaves_the_data_set(tmp_path: Path) -> None:
    source = write_mmc4(tmp_path / "in", {"a": [["0.jpg"], ["1.jpg"]]})
    manifest = run(Mmc4Reader(source), tmp_path / "out")
    before = files(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(DataError, match="no document of 2 could be used"):
            run(Mmc4Reader(source, tmp_path / "typo"), tmp_path / "out", update=True)
        assert files(tmp_path / "out") == before
    assert run(Mmc4Reader(source), tmp_path / "out") == manifest


def test_an_output_folder_inside_the_input_is_not_input(tmp_path: Path) -> None:
    for n in range(2):
        make_tar(tmp_path / f"{n}.tar", [("a.jpg", PICTURES[n]), ("a.txt", b"a caption")])
    manifest = run(PairReader(tmp_path), tmp_path / "out")
    assert run(PairReader(tmp_path), tmp_path / "out") == manifest
    with pytest.raises(DataError, match=r"out: holds the input\. Choose another output folder\."):
        run(PairReader(tmp_path / "out"), tmp_path / "out")
    source = write_mmc4(tmp_path / "in", {"a": [["0.jpg"]]})
    manifest = run(Mmc4Reader(source), source / "images" / "out")
    assert run(Mmc4Reader(source), source / "images" / "out") == manifest


def test_only_the_changed_file_is_prepared_again(tmp_path: Path) -> None:
    """Other input files keep their shards, whether some were mended, came or went."""
    source = write_mmc4(tmp_path / "in", {name: [[f"{n}.jpg"]] for n, name in enumerate("abc")})
    run(Mmc4Reader(source), tmp_path / "out")

    def shards() -> dict[str, int]:
        found = {path.name[0]: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
        assert [f"{name} 0" for name in sorted(found)] == [texts[0][:3] for texts in stored_documents(tmp_path / "out")]
        return found

    before = shards()
    (source / "b.jsonl").write_text(mmc4_line("b", 0, ["0.jpg", "1.jpg"]) + "\n")
    run(Mmc4Reader(source), tmp_path / "out", update=True)
    after = shards()
    assert {name for name in before if before[name] != after[name]} == {"b"}
    (source / "a.jsonl").unlink()
    (source / "bb.jsonl").write_text(mmc4_line("bb", 0, ["2.jpg"]) + "\n")
    run(Mmc4Reader(source), tmp_path / "out", update=True)
    assert {path.name.partition("-")[0] for path in (tmp_path / "out").glob("*.tar")} == {"b", "bb", "c"}
    last = {path.name.partition("-")[0]: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert (last["b"], last["c"]) == (after["b"], after["c"])


@FAST
@given(st.booleans(), st.floats(0, 1), st.binary(max_size=3), st.data())
def test_torn_records_cost_work_but_no_data(
    tmp_path: Path, finished: bool, place: float, end: bytes, data: st.DataObject
) -> None:
    folder = new_folder(tmp_path)
    source = write_mmc4(folder / "in", {"a": [["0.jpg"], "{"], "b": [["1.jpg"]]})
    whole, out = run(Mmc4Reader(source), folder / "whole"), folder / "out"
    if finished:
        run(Mmc4Reader(source), out)
        (out / "dataset.json").unlink()
        torn = out / "prepare.jsonl"
    else:
        in_a_fork(lambda: void(run(Mmc4Reader(source), out)), kill_at=data.draw(st.integers(10, 70)))
        torn = data.draw(
            st.sampled_from(sorted(path for path in out.rglob("*") if path.is_file()) or [folder / "none"])
        )
    content = torn.read_bytes() if torn.exists() else b""
    torn.write_bytes(content[: int(place * len(content))] + end)
    if torn.name == "dataset.json":
        with pytest.raises(DataError, match=r"dataset\.json: is damaged: .*delete this file and prepare again"):
            run(Mmc4Reader(source), out)
        torn.unlink()
    assert run(Mmc4Reader(source), out) == whole


# --- files that cannot be read, processes that die, folders that cannot be written ---


@dataclass
class ToyReader:
    """Files of texts, one document a line; some words make it fail in ways of their own."""

    folder: Path
    image_root: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"format": "toy"}

    def files(self) -> Sequence[InputFile]:
        """All files of the folder."""
        return [InputFile(path.name, (path,)) for path in sorted(self.folder.glob("*.txt"))]

    def parts(self, file: InputFile) -> Sequence[InputPart]:
        """The whole file."""
        with open_regular(file.paths[0]):
            return [InputPart(str(file.paths[0]))]

    def documents(self, part: InputPart) -> Iterator[RawDocument | Dropped]:
        """One per line."""
        for number, line in enumerate(Path(part.where).read_text().splitlines(), 1):
            if line == "torn":
                raise DataError("is cut at byte 7. Download it again.")
            if line == "memory":
                raise MemoryError
            if line == "disk":
                raise OSError(5, "Input/output error")
            if line == "killed" or (line == "killed once" and not (self.folder / "once").exists()):
                (self.folder / "once").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield from documents_of(f"line {number}", lambda line=line: self._line(line))

    def _line(self, line: str) -> Iterator[RawDocument]:
        if line == "bad":
            raise BadRecordError("a bad word", line)
        if line == "number":
            int(line)
        if line == "slow":
            slow()
        if line == "bug":
            [][0]
        text = "x" * (5 << 20) if line == "long" else line
        texts = (text,) * (100_001 if line == "many" else 1)
        images = (RawImage(lambda: PICTURES[0], source="0.jpg"), bad_image("no name", "entry 2"))
        if line.startswith("text "):
            images = ()
        if line == "slow image":
            images = (RawImage(slow, source="1.jpg"), *images)
        if line != "empty":
            yield RawDocument("sequence", texts, images)


def slow() -> bytes:
    """Never ends, and catches what it can."""
    while True:
        with contextlib.suppress(Exception):
            sum(range(1000))


def toy(folder: Path, **lines: str) -> ToyReader:
    """One file per argument, its lines separated by commas."""
    folder.mkdir(exist_ok=True)
    for name, content in lines.items():
        (folder / f"{name}.txt").write_text(content.replace(",", "\n"))
    return ToyReader(folder)


def test_bad_records_and_what_no_reader_would_accept_are_counted(tmp_path: Path) -> None:
    manifest = run(toy(tmp_path / "in", a="one,bad,number,long", b="empty,many,two"), tmp_path / "out")
    assert stored_documents(tmp_path / "out") == [("one",), ("two",)]
    require_sums(manifest)
    assert manifest["dropped_documents"] == {
        "a bad word": 1,
        "cannot be stored": 2,
        "empty record": 1,
        "unreadable record": 1,
    }
    assert manifest["dropped_images"] == {"in a dropped document": 2, "no name": 4}
    assert manifest["examples_of_dropped"] == {
        "documents": {
            "a bad word": "a.txt, line 2: bad",
            "cannot be stored": "a.txt, line 4: 5243172 bytes of JSON, at most 4194304 are accepted",
            "empty record": "b.txt, line 1",
            "unreadable record": "a.txt, line 3: ValueError: invalid literal for int() with base 10: 'number'",
        },
        "images": {"in a dropped document": "a.txt, line 4", "no name": "a.txt, line 1: entry 2"},
    }


def test_what_takes_too_long_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit.__wrapped__, "__defaults__", (0.05,))
    manifest = run(toy(tmp_path / "in", a="one,slow,slow image,two"), tmp_path / "out")
    require_sums(manifest)
    assert (manifest["documents"], manifest["dropped_documents"]) == (3, {"took too long": 1})
    assert manifest["dropped_images"] == {"no name": 3, "took too long": 1}
    assert manifest["examples_of_dropped"] == {
        "documents": {"took too long": "a.txt, line 2: over 0.05 seconds"},
        "images": {"no name": "a.txt, line 1: entry 2", "took too long": "a.txt, line 3: 1.jpg: over 0.05 seconds"},
    }
    with time_limit(0.05):
        pass
    sum(range(3_000_000))  # nothing rings later


def test_a_bug_stays_a_bug_and_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(IndexError) as bug:
        run(toy(tmp_path / "in", a="one,bug"), tmp_path / "out")
    assert bug.value.__notes__ == ["while a.txt, after line 1 was prepared"]
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_damaged_files_are_counted_and_alone_prepared_again(tmp_path: Path) -> None:
    """What precedes the damage is kept; the mended file is noticed."""
    reader = toy(tmp_path / "in", a="one", b="two,torn,three", d="torn", e="five")
    os.rename(tmp_path / "in" / "e.txt", os.fsencode(tmp_path / "in") + b"/e\xe9.txt")  # no UTF-8
    (tmp_path / "in" / "f.txt").symlink_to("f.txt")
    os.mkfifo(tmp_path / "in" / "g.txt")
    (tmp_path / "in" / "._a.txt").write_text("of a Mac")
    manifest = run(reader, tmp_path / "out")
    require_sums(manifest)
    assert manifest["dropped_documents"] == {"file cannot be read": 3, "file is damaged here": 1, "system file": 1}
    assert manifest["examples_of_dropped"]["documents"] == {
        "file cannot be read": "f.txt: Too many levels of symbolic links",
        "file is damaged here": "b.txt, after line 1: is cut at byte 7. Download it again.",
        "system file": "._a.txt",
    }
    assert stored_documents(tmp_path / "out") == [("one",), ("two",), ("five",)]
    assert manifest["inputs"][-1]["file"] == "e\\xe9.txt"
    before = {path.name[0]: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    (tmp_path / "in" / "b.txt").write_text("two\nthree")
    with pytest.raises(DataError, match=r"was prepared before its input changed: b\.txt changed\. --update prepares"):
        run(reader, tmp_path / "out")
    assert run(reader, tmp_path / "out", update=True)["documents"] == 4
    after = {path.name[0]: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert {name for name in before if before[name] != after[name]} == {"b"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [1, 2])
def test_what_may_pass_is_an_error_and_tried_again(tmp_path: Path, workers: int) -> None:
    reader = toy(tmp_path / "in", a="one", b="memory", c="two,disk", d="four")
    with pytest.raises(DataError) as refusal:
        prepare(reader, tmp_path / "out", OPTIONS, workers=workers, quiet=True)
    assert str(refusal.value).splitlines() == [
        "b.txt: MemoryError",
        "c.txt, after line 1: Input/output error",
        "Some input could not be read now. The others are prepared and stay: run the same command again.",
    ]
    before = {path.name[0]: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert set(before) == {"a", "d"}
    (tmp_path / "in" / "b.txt").unlink()
    (tmp_path / "in" / "c.txt").write_text("two\nthree")
    assert run(reader, tmp_path / "out")["documents"] == 4
    after = {path.name[0]: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    assert (after["a"], after["d"]) == (before["a"], before["d"])
    assert stored_documents(tmp_path / "out") == [("one",), ("two",), ("three",), ("four",)]


@pytest.mark.timeout(120)
def test_a_process_that_dies_is_named_and_its_job_tried_once_more(tmp_path: Path) -> None:
    reader = toy(tmp_path / "in", a="one", b="killed once", c="three")
    assert prepare(reader, tmp_path / "out", OPTIONS, workers=2, quiet=True)["documents"] == 3
    (tmp_path / "in" / "b.txt").write_text("killed")
    with pytest.raises(DataError) as refusal:
        prepare(reader, tmp_path / "new", OPTIONS, workers=2, quiet=True)
    assert str(refusal.value).splitlines() == [
        "b.txt: the process that prepared it died twice, killed by signal 9 (SIGKILL). "
        "If memory was short, free some; or take the file out of the input.",
        "Some input could not be read now. The others are prepared and stay: run the same command again.",
    ]
    (tmp_path / "in" / "b.txt").unlink()
    assert run(reader, tmp_path / "new")["documents"] == 2


def test_output_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    reader = toy(tmp_path / "in", a="one,two", b="three")
    (tmp_path / "file").touch()
    for output, rule in ((tmp_path / "file", "Not a directory"), (Path("/proc/nowhere"), "No such file or directory")):
        with pytest.raises(DataError) as refusal:
            run(reader, output)
        assert str(refusal.value) == f"{output}: cannot be written: {rule}. Make room, or choose another output folder."

    def on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
        try:
            run(reader, tmp_path / "out")
        except DataError as error:
            (tmp_path / "message").write_text(str(error))

    in_a_fork(on_a_full_disk)
    message = f"{tmp_path / 'out'}: cannot be written: File too large. Make room, or choose another output folder."
    assert (tmp_path / "message").read_text() == message
    assert not list((tmp_path / "out").glob("*.part"))  # the room it took is free
    assert run(reader, tmp_path / "out")["documents"] == 3


# --- messages ---


def test_why_nothing_was_kept_begins_with_the_cause(tmp_path: Path) -> None:
    source = write_mmc4(tmp_path / "in", {"a": [["gone.jpg"], ["text.jpg"], ["also-gone.jpg"], "{"]})
    with pytest.raises(DataError) as refusal:
        run(Mmc4Reader(source, tmp_path / "typo"), tmp_path / "out")
    first, second, third = str(refusal.value).splitlines()
    assert first.startswith("images: 3 of 3 dropped: 3 missing file (a.jsonl")
    assert first.endswith(f": gone.jpg). Images were looked for in {tmp_path / 'typo'}, which is no folder")
    assert second.startswith("documents: 4 of 4 dropped: 3 no image left (a.jsonl")
    assert third == (
        f"{tmp_path / 'out'}: no document of 4 could be used, so that nothing is kept of this run. "
        "Check the folders and the format's name."
    )


def test_the_command_says_what_was_dropped(tmp_path: Path) -> None:
    source = write_mmc4(tmp_path / "in", {"a": [["0.jpg"], ["gone.jpg"], ["gone.jpg"], "{"]})
    result = run_script(TOOL, "mmc4", str(source), str(tmp_path / "out"), "--workers", "1")
    assert result.returncode == 0
    assert json.loads(result.stdout)["dropped_images"] == {"missing file": 2}
    assert f": gone.jpg). Images were looked for in {source / 'images'}\n" in result.stderr
    assert "documents: 3 of 4 dropped: 2 no image left (a.jsonl" in result.stderr
    (source / "images" / "gone.jpg").write_bytes(PICTURES[4])
    refused = run_script(TOOL, "mmc4", str(source), str(tmp_path / "out"), "--workers", "1", "--quiet")
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: {tmp_path / 'out'}: was prepared before its input changed: the images in {source / 'images'} changed "
        "(5 files, now 6). --update prepares again what changed and no more; or choose another output folder.\n",
    )
    updated = run_script(TOOL, "mmc4", str(source), str(tmp_path / "out"), "--workers", "1", "--update")
    assert json.loads(updated.stdout)["documents"] == 3


def test_one_folder_is_prepared_by_one_process(tmp_path: Path) -> None:
    source = write_mmc4(tmp_path / "in", {"a": [["0.jpg"]]})
    inner: list[str] = []

    class Nested(Mmc4Reader):
        def parts(self, file: InputFile) -> Sequence[InputPart]:
            with pytest.raises(DataError) as refusal:
                run(Mmc4Reader(source), tmp_path / "out")
            inner.append(str(refusal.value))
            return super().parts(file)

    run(Nested(source), tmp_path / "out")
    rule = "is being prepared by another process. Wait for it, or choose another output folder."
    assert inner == [f"{tmp_path / 'out'}: {rule}"]


# --- train and held-out ---


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=2, max_size=40), st.floats(0.05, 0.95), st.data())
def test_held_out_documents_share_nothing_and_are_as_many_as_fit(
    documents: list[list[int]], share: float, data: st.DataObject
) -> None:
    contents = [[f"image {n}" for n in numbers] or [f"text {i}"] for i, numbers in enumerate(documents)]
    heldout = heldout_documents(contents, share, 0)
    wanted = wanted_documents(len(contents), share)
    groups: list[tuple[set[str], int]] = []
    for digests in contents:  # by an algorithm of its own: merge what overlaps
        group, size = {*digests}, 1
        for other in [g for g in groups if g[0] & group]:
            groups.remove(other)
            group, size = group | other[0], size + other[1]
        groups.append((group, size))
    chosen = {digest for i in heldout for digest in contents[i]}
    assert all(group <= chosen or not group & chosen for group, _ in groups)
    assert len(heldout) == sum(size for group, size in groups if group <= chosen) <= wanted
    left = [size for group, size in groups if not group & chosen]
    assert all(size > wanted - len(heldout) for size in left)  # whatever is left would not have fitted
    order = data.draw(st.permutations(range(len(contents))))
    again = heldout_documents([contents[i] for i in order], share, 0)
    assert {order[i] for i in again} == heldout  # it depends on the contents, not on their order


def test_held_out_is_exact_without_shared_images_and_depends_on_the_seed() -> None:
    contents = [[f"image {n}"] for n in range(1000)]
    chosen = {seed: heldout_documents(contents, 0.1, seed) for seed in range(5)}
    assert {len(found) for found in chosen.values()} == {100}
    assert all(len(chosen[a] & chosen[b]) < 30 for a in chosen for b in chosen if a < b)  # 10 are expected


# --- time ---


def calls(action: Callable[[], object]) -> int:
    """Function calls that an action makes, those of C among them."""
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("max_repeats", [0, 1000])
def test_four_times_the_input_costs_at_most_five_times_the_calls(tmp_path: Path, max_repeats: int) -> None:
    def cost(name: str, count: int) -> int:
        reader = toy(tmp_path / name, **{f"f{n}": "one,two,bad" for n in range(count)})
        options = replace(OPTIONS, max_repeats=max_repeats)
        return calls(lambda: run(reader, tmp_path / f"{name}-out", options))

    cost("warm", 2)
    small, large = cost("small", 10), cost("large", 40)
    assert large <= 5 * small


def test_a_split_of_four_times_the_documents_costs_at_most_five_times_the_calls(tmp_path: Path) -> None:
    def cost(name: str, count: int) -> int:
        run(toy(tmp_path / name, f=",".join(f"text {n}" for n in range(count))), tmp_path / f"{name}-data", TEXT_ONLY)
        return calls(lambda: split(tmp_path / f"{name}-data", tmp_path / f"{name}-out", quiet=True))

    cost("warm", 10)
    small, large = cost("small", 40), cost("large", 160)
    assert large <= 5 * small
