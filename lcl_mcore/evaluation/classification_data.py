"""Images with labels: folders of classes, tars, and the IDX files of the MNIST family.

A class is known by its name. Numbers are given once, by the training split, and the test split's labels are looked up
by name, so that folders which one split has and the other has not change nothing.

Shape legend
    n  images;  S  side in pixels
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lcl_mcore.errors import DataError, explain
from lcl_mcore.evaluation.image_files import Fetch, files_below, image_fetcher, is_hidden, is_image, read_file
from lcl_mcore.untrusted import skip_hole

MAX_IDX_BYTES = 1 << 30
MAX_LABEL_BYTES = 1000
SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
IDX_PREFIX = {"train": "train", "test": "t10k"}
FASHION_MNIST = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FASHION_MNIST_LABELS = {
    "train": (60_000, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
    "test": (10_000, [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]),
}
"""Number of labels and the first ten, by which its files are told from MNIST's, which have the same names."""


@dataclass(frozen=True)
class ClassificationDataset:
    """One split of a data set.

    Attributes:
        classes: names, in the order of their numbers.
        numbered: the names are numbers because the data have no others.
        labels: int64 [n].
        fetch: indices -> uint8 RGB [m, 3, S, S], centre-cropped and resized.
        skipped: files or images that were found but are not used, by reason.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    fetch: Fetch
    numbered: bool = False
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int, seed: int) -> ClassificationDataset:
        """`count` images drawn with the seed; all of them if `count` is 0 or not smaller than the set."""
        if not 0 < count < len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self.select(chosen), skipped={**self.skipped, "not drawn": len(self) - count})

    def select(self, indices: Tensor) -> ClassificationDataset:
        """The images of some indices, int64 [k]."""
        chosen, fetch = indices.tolist(), self.fetch
        return replace(self, labels=self.labels[indices], fetch=lambda k: fetch([chosen[i] for i in k]))

    def missing_classes(self) -> list[str]:
        """Classes without an image here."""
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]


def open_splits(path: Path, image_size: int) -> tuple[ClassificationDataset, ClassificationDataset]:
    """Training and test split of a data set at `path`, at `image_size` x `image_size` pixels.

    Understood: `train-images-idx3-ubyte[.gz]` and its siblings; `SPLIT/CLASS/*.jpg`; `SPLIT/CLASS.tar` (as
    ImageNet is distributed); `SPLIT/*.tar` of webdataset samples with `.cls`. SPLIT is train, or val, validation, test.
    Hidden files and folders, empty folders, and files that are no images by their names are not used.

    Raises:
        DataError: none of these is there, or the test split has a class that the training split has not.
    """
    folders = [_folder(path, split) for split in ("train", "test")]
    if folders[0] and folders[1] and folders[0].samefile(folders[1]):
        raise DataError(explain(folders[1], "is the folder of the training images", "Give other images to test on."))
    train = _read_split(path, "train", image_size)
    return train.dataset(train.order), _read_split(path, "test", image_size).dataset(train.order)


def open_test_split(path: Path, image_size: int) -> ClassificationDataset:
    """The test split alone, as `open_splits` gives it; without a training split its own classes are all there are."""
    test = _read_split(path, "test", image_size)
    return test.dataset(_read_split(path, "train", image_size).order if _has_split(path, "train") else test.order)


@dataclass(frozen=True)
class _LabelledImages:
    """One split as found: the class of each image by name, and the names in their order."""

    place: Path
    name: str
    labels: Sequence[str]
    order: tuple[str, ...]
    numbered: bool
    fetch: Fetch
    skipped: Mapping[str, int]

    def dataset(self, classes: tuple[str, ...]) -> ClassificationDataset:
        """With the numbers that `classes` gives."""
        number = {name: i for i, name in enumerate(classes)}
        unknown = sorted(set(self.labels) - set(number))
        if unknown:
            raise DataError(
                explain(
                    f"{self.place}: class {quoted(unknown)}",
                    "not in the training split, so nothing could learn it",
                    "Give it training images, or remove it.",
                )
            )
        labels = torch.tensor([number[name] for name in self.labels])
        return ClassificationDataset(self.name, classes, labels, self.fetch, self.numbered, self.skipped)


def quoted(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: a few, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _read_split(path: Path, split: str, image_size: int) -> _LabelledImages:
    idx = _idx_files(path, split)
    if idx is not None:
        return _read_idx_split(*idx, split, image_size)
    folder = _folder(path, split)
    if folder is None:
        wanted = " or ".join(SPLITS[split])
        rule = f"has no {split} split: no IDX files and no folder {wanted}"
        raise DataError(explain(path, rule, "Give the folder that holds them."))
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
    tars = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
    if tars and any(entry.is_dir() for entry in entries):
        raise DataError(explain(folder, "holds both tars and folders", "Keep one of the two kinds."))
    return _read_tars(folder, tars, image_size) if tars else _read_folder(folder, image_size)


def _has_split(path: Path, split: str) -> bool:
    return _idx_files(path, split) is not None or _folder(path, split) is not None


def _folder(path: Path, split: str) -> Path | None:
    return next((path / name for name in SPLITS[split] if (path / name).is_dir()), None)


# --- IDX files


def _idx_files(path: Path, split: str) -> tuple[Path, Path] | None:
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = (f"{IDX_PREFIX[split]}-{kind}", f"{IDX_PREFIX[split]}-{kind}.gz")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            return None
        found.append(file)
    return found[0], found[1]


def _read_idx(path: Path) -> Tensor:
    """An IDX file of bytes: two zeros, type 8, number of axes, sizes as big-endian int32, content."""
    _, content = read_file(path, MAX_IDX_BYTES)
    try:
        if path.suffix == ".gz":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_IDX_BYTES)
        axes = content[3]
        sizes = np.frombuffer(content, ">i4", axes, 4).tolist()
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        whole = content[:3] == b"\0\0\x08" and min(sizes) > 0 and values.size == int(np.prod(sizes))
    except (OSError, EOFError, zlib.error, IndexError, ValueError):
        whole = False
    if not whole:
        raise DataError(explain(path, "is not an IDX file of as many bytes as its header says", "Download it again."))
    return torch.from_numpy(values.reshape(sizes).copy())


def _read_idx_split(images: Path, labels: Path, split: str, image_size: int) -> _LabelledImages:
    pixels, numbers = _read_idx(images), _read_idx(labels).tolist()
    if pixels.dim() != 3 or len(pixels) != len(numbers):
        rule = f"{list(pixels.shape)} images for {len(numbers)} labels in {labels.name}"
        raise DataError(explain(images, rule, "Download both again."))
    fashion = (len(numbers), numbers[:10]) == FASHION_MNIST_LABELS[split]
    order = FASHION_MNIST if fashion else tuple(str(number) for number in sorted(set(numbers)))
    names = [FASHION_MNIST[number] if fashion else str(number) for number in numbers]

    def fetch(indices: Sequence[int]) -> Tensor:
        grey = pixels[list(indices)][:, None].expand(-1, 3, -1, -1).contiguous()
        return functional.interpolate(grey, size=(image_size, image_size), mode="bicubic", antialias=True)

    return _LabelledImages(images.parent, images.parent.name, names, order, not fashion, fetch, {})


# --- folders and tars of classes


def class_name(folder: Path, name: str) -> str:
    """A folder's name as the class's: in Unicode's composed form, since systems differ in how they store accents.

    Raises:
        DataError: it is not text.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(name).decode("ascii", "backslashreplace")
        raise DataError(explain(f"{folder}: {shown}", "the name is not UTF-8", "Rename it.")) from None
    return unicodedata.normalize("NFC", name)


def _read_folder(folder: Path, image_size: int) -> _LabelledImages:
    skipped: Counter[str] = Counter()
    files: list[Path] = []
    labels: list[str] = []
    for path in files_below(folder, skipped):
        name, _, inside = path.partition(os.sep)
        if not inside:
            skipped["not in the folder of a class"] += 1
            continue
        files.append(folder / path)
        labels.append(class_name(folder, name))
    if not files:
        raise DataError(explain(folder, "holds no CLASS/IMAGE files", "Give an ImageNet-like folder."))
    fetch = image_fetcher(lambda i: read_file(files[i]), image_size)
    return _LabelledImages(folder, folder.parent.name, labels, _in_order(labels), False, fetch, skipped)


def _in_order(labels: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(labels)))


@dataclass(frozen=True)
class _Member:
    """An image in a tar."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> tuple[str, bytes]:
        """Its name for messages, and its content."""
        with open(self.tar, "rb") as file:
            return f"{self.tar}: {self.name}", os.pread(file.fileno(), self.size, self.offset)


def _read_tars(folder: Path, tars: Sequence[Path], image_size: int) -> _LabelledImages:
    """Tars of webdataset samples if they hold `.cls` files, else a tar for each class."""
    skipped: Counter[str] = Counter()
    members: list[_Member] = []
    labels: list[str] = []
    labelled_tars = 0
    for path in tars:
        images, samples = _read_tar(path, skipped)
        labelled_tars += bool(samples)
        members += images
        name = class_name(folder, path.stem)
        labels += [_label(image, samples) if samples else name for image in images]
    if not members:
        raise DataError(explain(folder, "its tars hold no images", "Give class tars, or webdataset tars."))
    if labelled_tars not in (0, len(tars)):
        rule = f"{labelled_tars} of {len(tars)} tars have .cls files"
        raise DataError(explain(folder, rule, "Give class tars, or webdataset tars, not both."))
    numbered = bool(labelled_tars) and all(label.isdecimal() for label in labels)
    order = tuple(map(str, sorted(set(map(int, labels))))) if numbered else _in_order(labels)
    labels = [str(int(label)) for label in labels] if numbered else labels
    fetch = image_fetcher(lambda i: members[i].read(), image_size)
    return _LabelledImages(folder, folder.parent.name, labels, order, numbered, fetch, skipped)


def _read_tar(path: Path, skipped: Counter[str]) -> tuple[list[_Member], dict[str, str]]:
    """Images of a tar, and the label of each key that has one."""
    images: list[_Member] = []
    samples: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                if extension == ".cls" and not is_hidden(member.name):
                    stream = tar.extractfile(member)
                    samples[stem] = stream.read(MAX_LABEL_BYTES).decode().strip() if stream else ""
                elif member.isfile() and is_image(member.name):
                    if is_hidden(member.name):
                        skipped["hidden"] += 1
                    else:
                        images.append(_Member(path, member.name, member.offset_data, member.size))
            end = tar.offset
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(explain(path, f"cannot be read as a tar ({error})", "Download it again.")) from None
    with open(path, "rb") as file:
        file.seek(end)
        while rest := file.read(1 << 20):
            if rest.strip(b"\0"):
                raise DataError(explain(path, f"goes on after its end mark at byte {end}", "Unpack or repack it."))
            skip_hole(file, file.tell())
    return images, samples


def _label(image: _Member, samples: Mapping[str, str]) -> str:
    """Of the sample that an image belongs to: its path up to the last dot, or as webdataset cuts it, to the first."""
    head, tail = os.path.split(image.name)
    for stem in (os.path.splitext(image.name)[0], os.path.join(head, tail.partition(".")[0])):
        if samples.get(stem):
            return samples[stem]
    raise DataError(explain(f"{image.tar}: {image.name}", "has no .cls beside it", "Repair the tar."))
