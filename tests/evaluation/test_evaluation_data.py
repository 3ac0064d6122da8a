"""Label folders, caption files, names and prompts as people have them: used, counted, or refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lcl_mcore.commands.evaluate import free_name
from lcl_mcore.data.images import open_photograph, upright_rgb
from lcl_mcore.errors import ConfigError, DataError, NonFiniteError
from lcl_mcore.evaluation.caption_data import CaptionDataset, open_caption_dataset
from lcl_mcore.evaluation.classification_data import ClassificationDataset, open_splits, open_test_split
from lcl_mcore.evaluation.embedding_metrics import chance, effective_rank, recall_at
from lcl_mcore.evaluation.image_files import read_once
from lcl_mcore.evaluation.prompts import prompt_names, read_templates
from lcl_mcore.evaluation.retrieval import chance_scores, retrieval_scores
from lcl_mcore.export.model_card import results

few = settings(max_examples=40, deadline=None, database=None)


def picture(level: int, kind: str = "PNG", size: tuple[int, int] = (4, 4)) -> bytes:
    stored = io.BytesIO()
    Image.new("L", size, level).save(stored, kind)
    return stored.getvalue()


PICTURES = [picture(level) for level in range(256)]


def put(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def text_file(folder: Path, *lines: str) -> Path:
    path = folder / "lines.txt"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def message(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# --- label folders

folder_names = (
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=12)
    .filter(lambda name: not name.startswith(".") and name not in ("__MACOSX", "@eaDir"))
    .filter(lambda name: len(unicodedata.normalize("NFD", name).encode()) < 100)
)
noise = st.sets(
    st.sampled_from(
        [
            ".ipynb_checkpoints/a.png",
            ".hidden/b.txt",
            "__MACOSX/x/._c.png",
            "stray.png",
            ".DS_Store",
            "README.md",
            "notes/d.txt",
        ]
    )
)


@few
@given(st.sets(folder_names.map(lambda name: unicodedata.normalize("NFC", name)), min_size=1, max_size=5), st.data())
def test_a_class_is_its_name_whatever_other_folders_there_are(names: set[str], data: st.DataObject) -> None:
    classes = sorted(names - {"notes"}) or ["a"]
    there = data.draw(st.lists(st.sampled_from(classes), min_size=1, unique=True), "classes of val")
    extra = data.draw(st.none() | folder_names, "class that val alone has")
    with TemporaryDirectory() as root:
        files = Counter[str]()
        for split, held in (("train", classes), ("val", there)):
            for name in held:
                stored = unicodedata.normalize(data.draw(st.sampled_from(["NFC", "NFD"])), name)
                for n in range(data.draw(st.integers(1, 2))):
                    put(Path(root, split, stored, f"{n}.png"), PICTURES[classes.index(name)])
                    files[split] += 1
            for path in data.draw(noise):
                put(Path(root, split, path), PICTURES[255])
                files[split] += 1
            Path(root, split, "empty").mkdir(exist_ok=True)
        if extra is not None and unicodedata.normalize("NFC", extra) not in classes:
            put(Path(root, "val", extra, "0.png"), PICTURES[7])
            told = message(lambda: open_splits(Path(root), 4))
            assert "not in the training split" in told
            assert repr(unicodedata.normalize("NFC", extra)) in told
            return
        for split, opened in zip(("train", "val"), open_splits(Path(root), 4), strict=True):
            assert opened.classes == tuple(classes)
            assert len(opened) + sum(opened.skipped.values()) == files[split]
            assert all(opened.skipped.values())
            levels = opened.fetch(range(len(opened)))[:, 0, 0, 0].tolist()
            assert [opened.classes[label] for label in opened.labels] == [classes[level] for level in levels]
        assert opened.missing_classes() == [name for name in classes if name not in there]


def test_labelled_data_that_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a" / "train" / "cat" / "0.png", PICTURES[1])
    put(tmp_path / "a" / "val" / "cat" / "0.png", PICTURES[1])
    (tmp_path / "a" / "val" / "dog.tar").write_bytes(b"")
    assert message(lambda: open_splits(tmp_path / "a", 4)).endswith(
        "a/val: holds both tars and folders. Keep one of the two kinds."
    )
    (tmp_path / "a" / "val" / "dog.tar").unlink()
    put(tmp_path / "a" / "val" / "cat" / "1.png", b"\x89PNG damaged")
    (tmp_path / "a" / "val" / "cat" / "2.png").symlink_to("nowhere")
    (tmp_path / "a" / "val" / "cat" / "again").symlink_to("..")
    (tmp_path / "a" / "validation").symlink_to("train")
    assert open_splits(tmp_path / "a", 4)[1].skipped == {}
    (tmp_path / "same" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "same" / "val").symlink_to("train")
    assert message(lambda: open_splits(tmp_path / "same", 4)) == (
        f"{tmp_path}/same/val: is the folder of the training images. Give other images to test on."
    )
    test = open_test_split(tmp_path / "a", 4)
    assert len(test) == 3
    assert "val/cat/1.png: cannot be decoded" in message(lambda: test.fetch([1]))
    assert "val/cat/2.png: cannot be read (No such file or directory)" in message(lambda: test.fetch([2]))
    assert "val/cat/1.png: cannot be decoded" in message(lambda: read_once(test.fetch, 3))
    place = tmp_path / "b" / "train"
    for name, label in (("x", b"3"), ("y", b"10"), ("z", b"")):
        place.mkdir(parents=True, exist_ok=True)
        with tarfile.open(place / "s.tar", "w") as tar:
            for member, content in ((f"{name}.1.png", PICTURES[3]), (f"{name}.cls", label), ("._y.png", b"")):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        if label:
            put(tmp_path / "b" / "val" / "s.tar", (place / "s.tar").read_bytes())
            train, test = open_splits(tmp_path / "b", 4)
            assert (train.classes, test.labels.tolist(), train.numbered) == ((label.decode(),), [0], True)
            assert test.skipped == {"hidden": 1}
    assert message(lambda: open_splits(tmp_path / "b", 4)).endswith(
        "s.tar: z.1.png: has no .cls beside it. Repair the tar."
    )
    whole = (tmp_path / "b" / "val" / "s.tar").read_bytes()
    os.truncate(tmp_path / "b" / "val" / "s.tar", 1 << 40)  # a hole behind the end mark takes no time
    for content, told in ((whole + whole, "goes on after its end mark"), (whole[:700], "cannot be read as a tar")):
        (place / "s.tar").write_bytes(content)
        assert told in message(lambda: open_splits(tmp_path / "b", 4))


def test_idx_files_that_do_not_belong_together(tmp_path: Path) -> None:
    def idx(values: np.ndarray) -> bytes:
        return bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()

    for prefix in ("train", "t10k"):
        put(tmp_path / f"{prefix}-images-idx3-ubyte", idx(np.zeros((3, 5, 5), np.uint8)))
        put(tmp_path / f"{prefix}-labels-idx1-ubyte", idx(np.array([0, 4, 7], np.uint8)))
    train, test = open_splits(tmp_path, 4)
    assert (train.classes, test.labels.tolist()) == (("0", "4", "7"), [0, 1, 2])
    put(tmp_path / "t10k-labels-idx1-ubyte", idx(np.array([0, 5, 7], np.uint8)))
    assert "class '5': not in the training split" in message(lambda: open_splits(tmp_path, 4))
    put(tmp_path / "t10k-labels-idx1-ubyte", idx(np.array([0, 7], np.uint8)))
    assert "[3, 5, 5] images for 2 labels" in message(lambda: open_splits(tmp_path, 4))
    for content in (b"", b"\0\0\x08", b"\0\0\x08\x01\0\0\0\x09ab"):
        put(tmp_path / "train-labels-idx1-ubyte", content)
        assert "train-labels-idx1-ubyte: is not an IDX file" in message(lambda: open_splits(tmp_path, 4))


def test_a_large_photograph_is_decoded_smaller(tmp_path: Path) -> None:
    """61 megapixels: half dark, half bright, in whatever format."""
    large = Image.new("L", (9331, 6530), 20)
    large.paste(230, (0, 3265, 9331, 6530))
    (tmp_path / "val" / "cat").mkdir(parents=True)
    large.save(tmp_path / "val" / "cat" / "0.jpeg", quality=20)
    large.save(tmp_path / "val" / "cat" / "1.png", compress_level=1)
    for pixels in open_test_split(tmp_path, 8).fetch([0, 1]).float():
        assert pixels[:, :3].mean() == pytest.approx(20, abs=3)
        assert pixels[:, 5:].mean() == pytest.approx(230, abs=3)
    reduced = open_photograph((tmp_path / "val" / "cat" / "0.jpeg").read_bytes())
    assert upright_rgb(reduced).size == (4666, 3265)


# --- names and prompts


def labelled(*classes: str, numbered: bool = False) -> ClassificationDataset:
    return ClassificationDataset("set", classes, torch.arange(len(classes)), lambda k: torch.zeros(0), numbered)


placeholders = st.sampled_from(["{}", "{c}", "{class}", "{classname}", "{name}"])
plain = st.text(st.characters(categories=("L", "N", "Zs"), include_characters=".,-"), max_size=15).map(str.strip)


@few
@given(st.lists(st.tuples(plain, placeholders, plain), min_size=1, max_size=4))
def test_every_prompt_holds_the_name(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[str, str, str]]
) -> None:
    path = text_file(tmp_path_factory.mktemp("prompts"), *("".join(part) for part in parts))
    for template, (before, _, after) in zip(read_templates(path), parts, strict=True):
        assert template.replace("{}", "cat") == f"{before}cat{after}".strip()


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("a photo of a cat.", "has no place for the name, so all classes would get one prompt"),
        ("a photo of a %s.", "has no place for the name, so all classes would get one prompt"),
        ("a {} of a {c}", "has several placeholders"),
        ("a photo of {article}", "has the unknown placeholder {article}"),
        ("lambda c: f'a photo of a {c}.',", "is program text"),
        ("'a photo of a {}.',", "is program text"),
    ],
)
def test_prompts_that_are_refused(tmp_path: Path, line: str, rule: str) -> None:
    path = text_file(tmp_path, "a {}.", "", line)
    told = message(lambda: read_templates(path), ConfigError)
    assert told.startswith(f"{path}: prompt 2, {line!r}: {rule}. ")


@few
@given(st.lists(plain.filter(bool), min_size=2, max_size=6, unique=True), st.randoms())
def test_names_find_their_class_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, classes: list[str], random: Any
) -> None:
    data, folder = labelled(*classes), tmp_path_factory.mktemp("names")
    mixed = random.sample(classes, len(classes))
    assert prompt_names(text_file(folder, *mixed), data) == tuple(classes)
    wanted = tuple(f"a {name} of its own" for name in classes)
    lines = [f"{name}\ta {name} of its own" for name in mixed]
    assert prompt_names(text_file(folder, *lines), data) == wanted
    assert prompt_names(None, data) == tuple(classes)


def test_names_that_are_refused(tmp_path: Path) -> None:
    def refused(data: ClassificationDataset, *lines: str) -> str:
        path = text_file(tmp_path, *lines)
        return message(lambda: prompt_names(path, data), ConfigError).replace(str(path), "FILE")

    animals, numbers = labelled("cat", "dog", "fox"), labelled("0", "2", numbered=True)
    assert prompt_names(text_file(tmp_path, "Katze", "Hund", "Fuchs"), animals) == ("Katze", "Hund", "Fuchs")
    assert prompt_names(text_file(tmp_path, "zero", "one", "two"), numbers) == ("zero", "two")
    assert refused(animals, "cat", "dog") == (
        "FILE: 2 names: the data set has 3 classes. Give one name for each class."
    )
    assert refused(numbers, "zero", "one") == "FILE: 2 names: the data set has 3 classes. Give one name for each class."
    assert refused(animals, "dog", "Katze", "fox") == (
        "FILE: 'dog' is a class, but not the one in that line's place. "
        "Write CLASS<tab>NAME lines, which may be in any order."
    )
    assert refused(animals, "crane", "crane", "fox") == (
        "FILE: several classes are called 'crane', and would get the same prompts. Give each class a name of its own."
    )
    assert refused(animals, "cat\ta cat", "dog\ta dog") == (
        "FILE: does not name class 'fox'. Give one line CLASS<tab>NAME for each class."
    )
    assert message(lambda: prompt_names(None, numbers), ConfigError) == (
        "set: its classes are known by number only ('0', '2'). Name them with --classnames, a name per line."
    )
    (tmp_path / "lines.txt").write_bytes(b"\xff\xfe")
    assert "not UTF-8" in message(lambda: prompt_names(tmp_path / "lines.txt", animals), ConfigError)


# --- caption files

texts = st.none() | st.sampled_from(["", "  ", "a cat", "zwei Hunde", "\ud800", "雪"])


def written(folder: Path, content: object) -> str:
    (folder / "c.json").write_text(json.dumps(content), "utf-8")
    return str(folder / "c.json")


def usable(captions: list[str | None]) -> tuple[str, ...]:
    found = (text.replace("\ud800", "\ufffd").strip() for text in captions if text)
    return tuple(text for text in found if text)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captions")
    for n in range(6):
        put(folder / f"{n}.png", PICTURES[n])
    return folder


@few
@given(
    st.lists(st.lists(texts, max_size=3), min_size=1, max_size=6),
    st.sampled_from([int, str, float, lambda n: f"{n:012}", lambda n: f" {n} "]),
    st.booleans(),
)
def test_images_used_and_skipped_are_all_there_are(
    photographs: Path, captions: list[list[str | None]], identifier: Callable[[int], object], karpathy: bool
) -> None:
    numbers = range(len(captions))
    if karpathy:
        content: dict[str, Any] = {
            "images": [
                {"filename": f"{n}.png", "split": "test", "sentences": [{"raw": text} for text in captions[n]]}
                for n in numbers
            ]
        }
    else:
        items = [{"image_id": identifier(n), "caption": text} for n in numbers for text in captions[n]]
        content = {"images": [{"id": n, "file_name": f"{n}.png"} for n in numbers], "annotations": items}
    path = written(photographs, content)
    wanted = {n: usable(captions[n]) for n in numbers if usable(captions[n])}
    if not wanted:
        assert f"none of its {len(captions)} images has a caption" in message(
            lambda: open_caption_dataset(path, None, None, 0, 4)
        )
        return
    data = open_caption_dataset(path, None, None, 0, 4)
    assert list(data.captions) == list(wanted.values())
    assert data.fetch(range(len(data)))[:, 0, 0, 0].tolist() == list(wanted)
    assert len(data) + sum(data.skipped.values()) == len(captions)
    part = open_caption_dataset(path, None, None, 1, 4)
    assert len(part) + sum(part.skipped.values()) == len(captions)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None, database=None)
@given(st.data())
def test_a_damaged_caption_file_ends_in_a_sentence(photographs: Path, data: st.DataObject) -> None:
    """Any value of either format replaced by anything."""
    karpathy = {"images": [{"filename": "0.png", "filepath": "", "split": "test", "sentences": [{"raw": "a"}]}]}
    coco = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "b"}]}
    content: Any = json.loads(json.dumps(data.draw(st.sampled_from([karpathy, coco]))))
    place = content
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(junk)
    with contextlib.suppress(DataError):
        assert all(open_caption_dataset(written(photographs, content), None, None, 0, 4).captions)


def test_caption_files_that_are_refused(photographs: Path) -> None:
    images = [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}]
    notes = [{"image_id": 1, "caption": "x"}]

    def told(content: object, split: str | None = None) -> str:
        path = written(photographs, content)
        return message(lambda: open_caption_dataset(path, None, split, 0, 4)).replace(path, "FILE")

    assert told({"images": images, "annotations": notes}, "test") == (
        "FILE: has no splits, so none is called test. Leave the split out."
    )
    assert told({"images": [*images, images[0]], "annotations": notes}) == (
        "FILE: images[2]: its id 1 is that of another image. Repair the file."
    )
    assert told({"images": images, "annotations": [{"image_id": 77, "caption": "x"}]}) == (
        "FILE: none of its captions belongs to one of its images (image_id 77, say). "
        "Give captions and images of one data set."
    )
    karpathy = {"images": [{"filename": "1.png", "split": "val", "sentences": [{"raw": "x"}]}] * 2}
    assert told(karpathy) == "FILE: split test: not in this file, which has val (2). Name one of these."
    data = open_caption_dataset(written(photographs, karpathy), None, "val", 0, 4)
    assert data.captions == (("x", "x"),)  # one picture, listed twice
    missing = {"images": [{"filename": f"no{n}.png", "split": "test", "sentences": [{"raw": "x"}]} for n in range(3)]}
    assert told(missing) == (
        f"{photographs}/no0.png: is not there, nor are 2 others of 3 images. "
        "Give the folder that holds the images with --images."
    )


def test_a_card_has_the_results_of_its_own_weights(tmp_path: Path) -> None:
    weights = tmp_path / "checkpoints" / "step-2"
    put(tmp_path / "report.json", json.dumps({"weights": str(weights), "R@1": 0.5, "curves": [1]}).encode())
    put(tmp_path / "report-2.json", json.dumps({"weights": str(weights.with_name("step-1")), "R@1": 0.1}).encode())
    put(tmp_path / "results" / "zeroshot.json", json.dumps({"weights": str(weights), "top1": 0.2}).encode())
    assert results(tmp_path, weights) == [
        {"name": "report", "numbers": [("R@1", "0.5")], "problem": ""},
        {"name": "zeroshot", "numbers": [("top1", "0.2")], "problem": ""},
    ]


# --- what vectors say


def test_recall_never_gains_from_what_is_missing() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    broken = vectors.clone()
    broken[2] = torch.nan
    assert np.isnan(recall_at(broken, vectors, (1,)).image_to_text[1])
    assert message(lambda: retrieval_scores(vectors, broken, torch.arange(4)), NonFiniteError) == (
        "text vectors: 1 of 4 are not finite. Evaluate an earlier checkpoint, or look where training went wrong."
    )
    message(lambda: effective_rank(broken), NonFiniteError)
    with pytest.raises(ValueError, match="every image needs a caption"):
        recall_at(vectors, vectors[:3], (1,), torch.arange(3))


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 2), (2,)])
def test_chance_is_the_mean_over_random_vectors(counts: tuple[int, ...]) -> None:
    """And 1 where k is all there is."""
    generator = torch.Generator().manual_seed(0)
    data = CaptionDataset("set", [tuple(str(j) for j in range(count)) for count in counts], lambda k: torch.zeros(0))
    _, owner = data.flat_captions()
    expected, found = chance_scores(data), Counter[str]()
    for _ in range(300):
        image, text = (torch.randn(n, 16, generator=generator) for n in (len(counts), len(owner)))
        found.update(retrieval_scores(image / image.norm(dim=1)[:, None], text / text.norm(dim=1)[:, None], owner))
    for name, value in expected.items():
        assert found[name] / 300 == pytest.approx(value, abs=0.06)
    assert (chance(7, 3), chance(7, 10)) == (pytest.approx(3 / 7), 1.0)


def test_another_question_gets_another_file(tmp_path: Path) -> None:
    result: dict[str, object] = {"weights": "step-1", "options": {"data": "a"}, "top1": 0.5}

    def write(**more: object) -> str:
        asked = {**result, **more}
        path = free_name(tmp_path, "zeroshot", asked, ("weights", "options"))
        path.write_text(json.dumps(asked))
        return path.name

    assert [write(), write(top1=0.6), write(options={"data": "b"}), write(weights="step-2"), write(), write()] == [
        *["zeroshot.json"] * 2,
        *[f"zeroshot-{n}.json" for n in (2, 3)],
        *["zeroshot.json"] * 2,
    ]
    (tmp_path / "zeroshot.json").write_text("not JSON")
    assert write() == "zeroshot-4.json"
