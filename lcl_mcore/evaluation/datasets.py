"""Images with labels or with captions, by local path, as uint8 pixels of one size.

Labels: folders of classes, tars, and the IDX files of the MNIST family. Captions: Karpathy's JSON (COCO, Flickr30k),
COCO-style JSON (NoCaps), and prepared data sets of pairs.

Shape legend
    n  images;  m  images of one call;  S  side in pixels
"""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lcl_mcore.data.crop import centre_window
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.images import BadImageError, open_image, upright_rgb
from lcl_mcore.errors import DataError, explain

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
IDX_PREFIX = {"train": "train", "test": "t10k"}
FASHION_MNIST = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@dataclass(frozen=True)
class ClassificationDataset:
    """One split of a data set.

    Attributes:
        classes: names, in the order of their numbers.
        labels: int64 [n].
        fetch: indices -> uint8 RGB [m, 3, S, S], centre-cropped and resized.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    fetch: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int, seed: int) -> ClassificationDataset:
        """`count` images drawn with the seed; all of them if `count` is 0 or not smaller than the set."""
        if not 0 < count < len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        fetch = self.fetch
        return ClassificationDataset(
            self.name, self.classes, self.labels[chosen], lambda k: fetch([chosen[i] for i in k])
        )


def open_classification_dataset(path: Path, split: str, image_size: int) -> ClassificationDataset:
    """The "train" or "test" split of a data set at `path`, at `image_size` x `image_size` pixels.

    Understood: `train-images-idx3-ubyte[.gz]` and its siblings; `SPLIT/CLASS/*.jpg`; `SPLIT/CLASS.tar` (as
    ImageNet is distributed); `SPLIT/*.tar` of webdataset samples with `.cls`. SPLIT is train, or val, validation, test.

    Raises:
        DataError: none of these is there.
    """
    idx = _idx_files(path, split)
    if idx is not None:
        return _open_idx(*idx, image_size)
    for name in SPLITS[split]:
        folder = path / name
        if folder.is_dir():
            tars = sorted(folder.glob("*.tar"))
            return _open_tars(folder, tars, image_size) if tars else _open_folder(folder, image_size)
    raise DataError(
        explain(
            path,
            f"has no {split} split: no IDX files and no folder {' or '.join(SPLITS[split])}",
            "Give the folder that holds them.",
        )
    )


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
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise DataError(explain(path, "is not an IDX file of bytes", "Download it again."))
    axes = content[3]
    sizes = np.frombuffer(content, ">i4", axes, 4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if values.size != int(np.prod(sizes)):
        raise DataError(explain(path, f"holds {values.size} bytes, its header says {sizes}", "Download it again."))
    return torch.from_numpy(values.reshape(sizes).copy())


def _open_idx(images: Path, labels: Path, image_size: int) -> ClassificationDataset:
    pixels, numbers = _read_idx(images), _read_idx(labels).long()
    fashion = len(numbers) in (60_000, 10_000) and "fashion" in str(images).lower()
    names = FASHION_MNIST if fashion else tuple(str(i) for i in range(int(numbers.max()) + 1))

    def fetch(indices: Sequence[int]) -> Tensor:
        grey = pixels[list(indices)][:, None].expand(-1, 3, -1, -1).contiguous()
        return functional.interpolate(grey, size=(image_size, image_size), mode="bicubic", antialias=True)

    return ClassificationDataset(images.parent.name, names, numbers, fetch)


# --- folders and tars of classes


def _decode(content: bytes, image_size: int) -> Tensor:
    """An image's centred square, uint8 [3, S, S]."""
    pixels = torch.from_numpy(np.array(upright_rgb(open_image(content))))
    window = centre_window(pixels.shape[1], pixels.shape[0])
    cut = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
    planes = cut.permute(2, 0, 1)[None]
    return functional.interpolate(planes, size=(image_size, image_size), mode="bicubic", antialias=True)[0]


def image_fetcher(read: Callable[[int], tuple[str, bytes]], image_size: int) -> Callable[[Sequence[int]], Tensor]:
    """Fetch images by index, decoding on threads.

    Args:
        read: index -> name for messages, and stored bytes.

    Returns:
        indices -> uint8 [m, 3, S, S]. An image that cannot be decoded raises a `DataError` that names it, since a
        skipped one would falsify the scores.
    """
    pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="evaluation-decode")

    def one(index: int) -> Tensor:
        name, content = read(index)
        try:
            return _decode(content, image_size)
        except BadImageError as error:
            raise DataError(explain(name, f"cannot be decoded ({error})", "Repair or remove it.")) from None

    return lambda indices: torch.stack(list(pool.map(one, indices)))


def _open_folder(folder: Path, image_size: int) -> ClassificationDataset:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(explain(folder, "holds no CLASS/IMAGE files", "Give an ImageNet-like folder."))
    fetch = image_fetcher(lambda i: (str(files[i][0]), files[i][0].read_bytes()), image_size)
    return ClassificationDataset(
        folder.parent.name, tuple(classes), torch.tensor([number for _, number in files]), fetch
    )


def _open_tars(folder: Path, tars: Sequence[Path], image_size: int) -> ClassificationDataset:
    members: list[tuple[Path, int, int, str]] = []
    labels: list[int] = []
    for number, path in enumerate(tars):
        samples: dict[str, int] = {}
        images: list[tuple[str, int, int]] = []
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                if extension.lower() in IMAGE_SUFFIXES:
                    images.append((stem, member.offset_data, member.size))
                elif extension == ".cls":
                    stream = tar.extractfile(member)
                    samples[stem] = int(stream.read()) if stream else 0
        for stem, offset, size in images:
            if samples and stem not in samples:
                raise DataError(explain(f"{path}: {stem}", "has no .cls beside it", "Repair the tar."))
            members.append((path, offset, size, stem))
            labels.append(samples.get(stem, number))
    if not members:
        raise DataError(explain(folder, "its tars hold no images", "Give class tars, or webdataset tars."))
    by_class = len(set(labels)) == len(tars) and labels == sorted(labels)
    classes = tuple(p.stem for p in tars) if by_class else tuple(str(i) for i in range(max(labels) + 1))

    def read(index: int) -> tuple[str, bytes]:
        path, offset, size, stem = members[index]
        with open(path, "rb") as file:
            return f"{path}: {stem}", os.pread(file.fileno(), size, offset)

    return ClassificationDataset(folder.parent.name, classes, torch.tensor(labels), image_fetcher(read, image_size))


# --- images with captions


@dataclass(frozen=True)
class CaptionDataset:
    """Images with one or several captions each.

    Attributes:
        captions: captions[i] belong to image i.
        fetch: indices -> uint8 RGB [m, 3, S, S], centre-cropped and resized.
    """

    name: str
    captions: Sequence[tuple[str, ...]]
    fetch: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.captions)

    def flat_captions(self) -> tuple[list[str], Tensor]:
        """All captions, and the image of each: int64 [number of captions]."""
        texts = [caption for captions in self.captions for caption in captions]
        return texts, torch.tensor([i for i, captions in enumerate(self.captions) for _ in captions])


def open_caption_dataset(path: str, images: Path | None, split: str, limit: int, image_size: int) -> CaptionDataset:
    """A prepared data set of pairs; Karpathy's JSON (COCO, Flickr30k); or COCO-style JSON (NoCaps).

    Args:
        images: folder of the images that a JSON file names; None: the file's own folder.
        split: of a Karpathy file; several with commas between.
        limit: images used, from the first on; 0: all.

    Raises:
        DataError: of none of these kinds, or images are missing.
    """
    if (Path(path) / "dataset.json").is_file():
        return _open_prepared(path, limit, image_size)
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        found = _karpathy(content, split) if "sentences" in content["images"][0] else _coco(content)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            explain(
                path,
                f"is neither a prepared data set nor a caption file ({error!r})",
                "Give Karpathy's or NoCaps' JSON, or a prepared data set.",
            )
        ) from None
    found = found[: limit or None]
    root = images or Path(path).parent
    files = [root / name for name, _ in found]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not found:
        raise DataError(
            explain(
                missing[0] if missing else f"{path}: split {split}",
                "is not there",
                "Give --images, the folder that holds the images, and --split.",
            )
        )
    fetch = image_fetcher(lambda i: (str(files[i]), files[i].read_bytes()), image_size)
    return CaptionDataset(Path(path).stem, tuple(captions for _, captions in found), fetch)


def _karpathy(content: dict[str, Any], split: str) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (str(Path(item.get("filepath", "")) / item["filename"]), tuple(s["raw"] for s in item["sentences"]))
        for item in content["images"]
        if item["split"] in split.split(",")
    ]


def _coco(content: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    captions: dict[Any, list[str]] = {}
    for item in content["annotations"]:
        captions.setdefault(item["image_id"], []).append(item["caption"])
    return [(item["file_name"], tuple(captions[item["id"]])) for item in content["images"] if item["id"] in captions]


class _StoredCaptions(Sequence[tuple[str, ...]]):
    """Captions of a prepared data set, read on access: there may be millions."""

    def __init__(self, data: NativeDataset, count: int) -> None:
        self._data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | Sequence[tuple[str, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        document, _ = self._data.document(index)
        if document.kind != "pair":
            raise DataError(
                explain(
                    f"{self._data.path}: {document.key}",
                    f"is a {document.kind} document, not a pair",
                    "Use the heldout command for interleaved documents.",
                )
            )
        return tuple(document.texts)


def _open_prepared(path: str, limit: int, image_size: int) -> CaptionDataset:
    data = NativeDataset(path)
    texts = _StoredCaptions(data, min(len(data), limit or len(data)))
    texts[:1]  # not pairs at all: say so before anything is trained

    def read(index: int) -> tuple[str, bytes]:
        document, members = data.document(index)
        return document.key, data.image(document, members, 0)

    return CaptionDataset(data.name, texts, image_fetcher(read, image_size))
