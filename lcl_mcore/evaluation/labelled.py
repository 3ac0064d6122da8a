"""ClassificationDataset images by local path: folders of classes, tars, and the IDX files of the MNIST family."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lcl_mcore.data.crop import centre_window
from lcl_mcore.data.images import BadImageError, open_image, upright_rgb
from lcl_mcore.errors import DataError, explain

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
IDX_PREFIX = {"train": "train", "test": "t10k"}
FASHION_MNIST = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class ClassificationDataset:
    """One split of a data set.

    classes  names, in the order of their numbers
    labels   int64 [n]
    fetch    indices -> uint8 RGB [k, 3, S, S], centre-cropped and resized
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    fetch: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, count: int, seed: int) -> ClassificationDataset:
        """`count` images drawn with the seed; all of them if `count` is 0 or larger."""
        if not 0 < count < len(self):
            return self
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        fetch = self.fetch
        return ClassificationDataset(
            self.name, self.classes, self.labels[chosen], lambda k: fetch([chosen[i] for i in k])
        )


def open_classification_dataset(path: Path, split: str, side: int) -> ClassificationDataset:
    """The "train" or "test" split of a data set at `path`, at `side` x `side` pixels.

    Understood: `train-images-idx3-ubyte[.gz]` and its siblings; `SPLIT/CLASS/*.jpg`; `SPLIT/CLASS.tar` (as
    ImageNet is distributed); `SPLIT/*.tar` of webdataset samples with `.cls`. SPLIT is train, or val, validation, test.

    Raises:
        DataError: none of these is there.
    """
    idx = _idx_files(path, split)
    if idx is not None:
        return _open_idx(*idx, side)
    for name in SPLITS[split]:
        folder = path / name
        if folder.is_dir():
            tars = sorted(folder.glob("*.tar"))
            return _open_tars(folder, tars, side) if tars else _open_folder(folder, side)
    raise DataError(
        explain(
            path,
            f"has no {split} split: no IDX files and no folder {' or '.join(SPLITS[split])}",
            "Give the folder that holds them.",
        )
    )


# --- IDX


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
        raise DataError(
            explain(path, f"holds {values.size} bytes, its header says {sizes}", "Download it again.")
        )
    return torch.from_numpy(values.reshape(sizes).copy())


def _open_idx(images: Path, labels: Path, side: int) -> ClassificationDataset:
    pixels, numbers = _read_idx(images), _read_idx(labels).long()
    fashion = len(numbers) in (60_000, 10_000) and "fashion" in str(images).lower()
    names = FASHION_MNIST if fashion else tuple(str(i) for i in range(int(numbers.max()) + 1))

    def fetch(indices: Sequence[int]) -> Tensor:
        grey = pixels[list(indices)][:, None].expand(-1, 3, -1, -1).contiguous()
        return functional.interpolate(grey, size=(side, side), mode="bicubic", antialias=True)

    return ClassificationDataset(images.parent.name, names, numbers, fetch)


# --- folders and tars


def _decode(content: bytes, side: int) -> Tensor:
    """A image's centred square at [3, side, side]."""
    pixels = torch.from_numpy(np.array(upright_rgb(open_image(content))))
    window = centre_window(pixels.shape[1], pixels.shape[0])
    cut = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
    planes = cut.permute(2, 0, 1)[None]
    return functional.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)[0]


def fetcher(read: Callable[[int], tuple[str, bytes]], side: int) -> Callable[[Sequence[int]], Tensor]:
    """Decode on threads; a image that cannot be read is an error that names it: accuracy must not hide it."""
    pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="labelled")

    def one(index: int) -> Tensor:
        name, content = read(index)
        try:
            return _decode(content, side)
        except BadImageError as error:
            raise DataError(explain(name, f"cannot be decoded ({error})", "Repair or remove it.")) from None

    return lambda indices: torch.stack(list(pool.map(one, indices)))


def _open_folder(folder: Path, side: int) -> ClassificationDataset:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [
        (file, number)
        for number, name in enumerate(classes)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in PICTURES
    ]
    if not files:
        raise DataError(explain(folder, "holds no CLASS/PICTURE files", "Give an ImageNet-like folder."))
    fetch = fetcher(lambda i: (str(files[i][0]), files[i][0].read_bytes()), side)
    return ClassificationDataset(
        folder.parent.name, tuple(classes), torch.tensor([number for _, number in files]), fetch
    )


def _open_tars(folder: Path, tars: Sequence[Path], side: int) -> ClassificationDataset:
    members: list[tuple[Path, int, int, str]] = []
    labels: list[int] = []
    for number, path in enumerate(tars):
        samples: dict[str, int] = {}
        images: list[tuple[str, int, int]] = []
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, extension = os.path.splitext(member.name)
                if extension.lower() in PICTURES:
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

    return ClassificationDataset(folder.parent.name, classes, torch.tensor(labels), fetcher(read, side))
