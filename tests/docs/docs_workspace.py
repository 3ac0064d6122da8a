"""A folder in which the documents' commands find what they name: a corpus, pages, labelled and captioned images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "data")]

from corpora import image_bytes, make_dataset, small_tokenizer  # noqa: E402

PAGES, CLASSES = 12, ("bird", "cat")


def build(folder: Path) -> None:
    """Everything small: 60 and 20 documents, 12 pages, two classes of 8 and 4 images, 6 images with captions."""
    for name in ("tools", "examples", "benchmarks", "campaigns", "tests"):
        (folder / name).symlink_to(ROOT / name)
    demo = folder / "data" / "demo"
    make_dataset(demo / "train")
    make_dataset(demo / "heldout", documents=20, seed=1)
    small_tokenizer().save(demo / "tokenizer.json")
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to("one")  # what `make demo` leaves
    _pages(folder / "data" / "corpora" / "python-skimage-doc" / "usr" / "share" / "doc")
    for name in ("corpora/opencv-doc", "corpora/python-sklearn-doc", "packages/dataset-fashion-mnist"):
        (folder / "data" / name).mkdir(parents=True)
    _labelled(folder)
    _captioned(folder)


def _pages(folder: Path) -> None:
    folder.mkdir(parents=True)
    words = "one two three four five six seven eight nine ten " * 3
    for n in range(PAGES):
        (folder / f"{n}.png").write_bytes(image_bytes(n, 90, 90, "PNG"))
        (folder / f"page{n}.html").write_text(
            f"<html><body><h1>Head {n}</h1><p>{words}</p><img src='{n}.png'></body></html>", encoding="utf-8"
        )


def _labelled(folder: Path) -> None:
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(CLASSES):
            place = folder / "imagenet" / split / name
            place.mkdir(parents=True)
            for n in range(count):
                (place / f"{n}.jpg").write_bytes(image_bytes(1000 * number + n + 100 * count))
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("a {}.\nan old {}.\n", encoding="utf-8")


def _captioned(folder: Path) -> None:
    (folder / "coco").mkdir()
    images = []
    for n in range(6):
        (folder / "coco" / f"{n}.jpg").write_bytes(image_bytes(5000 + n))
        sentences = [{"raw": f"a {kind} image, number {n}"} for kind in ("round", "green")]
        images.append({"filename": f"{n}.jpg", "split": "test", "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}), encoding="utf-8")
