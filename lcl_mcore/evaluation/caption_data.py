"""Images with captions: Karpathy's JSON (COCO, Flickr30k), COCO-style JSON (NoCaps), and prepared data sets of pairs.

What a file says is checked here, once: an image without a caption is skipped and counted, anything else that is not
as it should be is one sentence, before any work is done.

Shape legend
    m  images of one call;  S  side in pixels
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from lcl_mcore.data.format import NativeDataset
from lcl_mcore.errors import DataError, explain
from lcl_mcore.evaluation.image_files import Fetch, image_fetcher, read_file
from lcl_mcore.untrusted import BadJsonError, clean_text, parse_object, read_regular

KINDS = "Give Karpathy's or NoCaps' JSON, or a prepared data set."
NO_CAPTION = "without a caption"
MAX_BYTES, MAX_VALUES = 512 << 20, 1 << 24  # Karpathy's COCO has 144 MB and 8 million values


@dataclass(frozen=True)
class CaptionDataset:
    """Images with one or several captions each.

    Attributes:
        captions: captions[i] belong to image i; none is empty.
        fetch: indices -> uint8 RGB [m, 3, S, S], centre-cropped and resized.
        sources: paths of all images, or of the one prepared data set that holds them.
        skipped: images that were found but are not used, by reason.
    """

    name: str
    captions: Sequence[tuple[str, ...]]
    fetch: Fetch
    sources: Sequence[str] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    def flat_captions(self) -> tuple[list[str], Tensor]:
        """All captions, and the image of each: int64 [number of captions]."""
        texts = [caption for captions in self.captions for caption in captions]
        return texts, torch.tensor([i for i, captions in enumerate(self.captions) for _ in captions])


def open_caption_dataset(
    path: str, images: Path | None, split: str | None, limit: int, image_size: int, default_split: str = "test"
) -> CaptionDataset:
    """A prepared data set of pairs; Karpathy's JSON (COCO, Flickr30k); or COCO-style JSON (NoCaps).

    Args:
        images: folder of the images that a JSON file names; None: the file's own folder.
        split: of a Karpathy file, and only there; several with commas between; None: `default_split`.
        limit: images used, from the first on; 0: all.

    Raises:
        DataError: of none of these kinds, damaged, images are missing, or none has a caption.
    """
    if (Path(path) / "dataset.json").is_file():
        _require_no_split(path, split)
        return _open_prepared(path, limit, image_size)
    content = _read_json(path)
    entries = _list(path, "images", content["images"])
    if any("sentences" in entry for entry in entries):
        found = _karpathy(path, entries, (split or default_split).split(","))
    else:
        _require_no_split(path, split)
        found = _coco(path, entries, content.get("annotations"))
    return _open_files(path, images or Path(path).parent, found, limit, image_size)


def _read_json(path: str) -> dict[str, Any]:
    """An object with `images`."""
    try:
        content = read_regular(path, MAX_BYTES)
        if content.count(b",") > MAX_VALUES:
            raise BadJsonError(f"more than {MAX_VALUES} values")
        found = parse_object(content.removeprefix(codecs.BOM_UTF8), max_bytes=MAX_BYTES)
        if "images" in found:
            return found
        reason = "no images in it"
    except OSError as error:
        reason = str(error.strerror)
    except BadJsonError as error:
        reason = str(error)
    raise DataError(explain(path, f"is neither a prepared data set nor a caption file ({reason})", KINDS))


def _require_no_split(path: str, split: str | None) -> None:
    if split is not None:
        raise DataError(explain(path, f"has no splits, so none is called {split}", "Leave the split out."))


def _open_files(
    path: str, root: Path, found: Iterable[tuple[str, tuple[str, ...]]], limit: int, image_size: int
) -> CaptionDataset:
    """Data set of the named files; a file that stands several times has all its captions."""
    captions: dict[str, list[str]] = {}
    for name, texts in found:
        captions.setdefault(name, []).extend(texts)
    used = [name for name, texts in captions.items() if texts]
    skipped = Counter({NO_CAPTION: len(captions) - len(used)})
    if not used:
        raise DataError(explain(path, f"none of its {len(captions)} images has a caption", "Give captions."))
    if limit and limit < len(used):
        skipped["beyond the limit"] = len(used) - limit
        used = used[:limit]
    files = [root / name for name in used]
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        rule = f"is not there, nor are {len(missing) - 1} others of {len(files)} images"
        raise DataError(explain(missing[0], rule, "Give the folder that holds the images with --images."))
    fetch = image_fetcher(lambda i: read_file(files[i]), image_size)
    kept = tuple(tuple(captions[name]) for name in used)
    return CaptionDataset(Path(path).stem, kept, fetch, [os.path.abspath(file) for file in files], +skipped)


def _text(value: object) -> str:
    """A caption without white space around it; empty if it is none."""
    return clean_text(value, max_chars=len(value)).strip() if isinstance(value, str) else ""


def _texts(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(text for text in map(_text, values) if text)


def _required(path: str, place: str, entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(explain(f"{path}: {place}", f"its {name} is {value!r}, not a name", "Repair the file."))
    return value


def _list(path: str, place: str, value: object) -> list[dict[str, Any]]:
    """A list of objects, where null stands for an empty one."""
    items = value or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(explain(f"{path}: {place}", "is not a list of objects", "Repair the file."))
    return items


def _karpathy(path: str, entries: list[dict[str, Any]], splits: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    counts = Counter(str(entry.get("split")) for entry in entries)
    absent = [name for name in splits if not counts[name]]
    if absent:
        there = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise DataError(
            explain(f"{path}: split {absent[0]}", f"not in this file, which has {there}", "Name one of these.")
        )
    found = []
    for number, entry in enumerate(entries):
        if entry.get("split") in splits:
            place = f"images[{number}]"
            folder = entry.get("filepath") or ""
            sentences = _list(path, f"{place}.sentences", entry.get("sentences"))
            name = Path(str(folder)) / _required(path, place, entry, "filename")
            found.append((str(name), _texts(sentence.get("raw") for sentence in sentences)))
    return found


def _identifier(value: object) -> object:
    """An image's id in one form: "000042", "42", 42.0 and 42 are the same."""
    if isinstance(value, str):
        text = value.strip()
        return int(text) if text.isdecimal() and len(text) < 20 else text
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _coco(path: str, entries: list[dict[str, Any]], annotations: object) -> list[tuple[str, tuple[str, ...]]]:
    captions: dict[object, list[object]] = {}
    for item in _list(path, "annotations", annotations):
        owner = _identifier(item.get("image_id"))
        if not isinstance(owner, int | str):
            raise DataError(explain(f"{path}: an annotation", f"its image_id is {owner!r}", "Repair the file."))
        captions.setdefault(owner, []).append(item.get("caption"))
    found: dict[object, tuple[str, tuple[str, ...]]] = {}
    for number, entry in enumerate(entries):
        place, own = f"images[{number}]", _identifier(entry.get("id"))
        if not isinstance(own, int | str):
            raise DataError(explain(f"{path}: {place}", f"its id is {own!r}", "Repair the file."))
        if own in found:
            rule = f"its id {entry['id']!r} is that of another image"
            raise DataError(explain(f"{path}: {place}", rule, "Repair the file."))
        found[own] = (_required(path, place, entry, "file_name"), _texts(captions.get(own, [])))
    astray = [owner for owner in captions if owner not in found]
    if astray and len(astray) == len(captions):
        rule = f"none of its captions belongs to one of its images (image_id {astray[0]!r}, say)"
        raise DataError(explain(path, rule, "Give captions and images of one data set."))
    return list(found.values())


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
        texts = _texts(document.texts)
        if not texts:
            raise DataError(explain(f"{self._data.path}: {document.key}", "has no caption", "Prepare the data again."))
        return texts


def _open_prepared(path: str, limit: int, image_size: int) -> CaptionDataset:
    data = NativeDataset(path)
    count = min(len(data), limit or len(data))
    texts = _StoredCaptions(data, count)
    texts[:1]  # not pairs at all: say so before anything is trained

    def read(index: int) -> tuple[str, bytes]:
        document, members = data.document(index)
        return document.key, data.image(document, members, 0)

    skipped = {"beyond the limit": len(data) - count} if count < len(data) else {}
    return CaptionDataset(data.name, texts, image_fetcher(read, image_size), [os.path.abspath(path)], skipped)
