"""A prepared data set in two: documents to train on, and held-out ones that share no image with them.

Documents that contain the same image (by sha256 of its stored bytes), directly or through others, form a group; so do
documents without an image that have the same texts. Groups are walked in an order keyed by seed and content, and held
out while they fit the wanted number: exactly that many when documents share nothing, fewer when groups are in the way.
Contents are copied, not decoded again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lcl_mcore.data.format import (
    MANIFEST,
    Document,
    ImageDamagedError,
    NativeDataset,
    ShardInfo,
    ShardWriter,
    parse_manifest,
    write_manifest,
    writing_to,
)
from lcl_mcore.errors import DataError, explain
from lcl_mcore.rng import key64
from lcl_mcore.storage import atomic_write
from lcl_mcore.untrusted import BadJsonError, parse_object

PARTS = ("train", "heldout")
SHARD_BYTES = 1 << 30
MARKER = ".split"
"""Stands in a part that is being written."""
STORED = ("kind", "text_list", "image_info")


def split(
    source: Path, output: Path, *, heldout_share: float = 0.1, seed: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """Write `output/train` and `output/heldout`; does nothing if both are there.

    Args:
        source: a prepared data set.
        output: the folder of both parts.
        heldout_share: of the documents, between 0 and 1.
        seed: keys which documents are held out.
        quiet: no progress bar.

    Returns:
        Documents, images and fingerprint of both parts, and how many documents were wanted in `heldout`.

    Raises:
        DataError: a share outside 0..1, a part that would be empty, another split in `output`, or no room for it.
    """
    if not 0.0 < heldout_share < 1.0:
        raise DataError(explain(f"heldout share {heldout_share}", "must lie between 0 and 1", "Try 0.1."))
    data = NativeDataset(str(source))
    try:
        plan = {"of": data.fingerprint, "heldout_share": heldout_share, "seed": seed}
        if not _done(output, plan):
            _write(data, output, plan, quiet=quiet)
    finally:
        data.close()
    result: dict[str, Any] = {"heldout_wanted": wanted_documents(len(data), heldout_share)}
    for part in PARTS:
        manifest = _manifest(output / part)
        result[part] = {name: manifest[name] for name in ("documents", "images", "fingerprint")}
    for name in ("documents", "images"):
        if sum(result[part][name] for part in PARTS) != data.manifest[name]:
            raise AssertionError(f"{name} of {PARTS} in {output} are not those of {source}")
    return result


def wanted_documents(documents: int, share: float) -> int:
    """How many documents a share is; a half goes to the even number."""
    return round(share * documents)


def heldout_documents(contents: list[list[str]], share: float, seed: int) -> frozenset[int]:
    """Numbers of the documents to hold out, given digests of what each holds that no other side may hold."""
    members: dict[int, list[int]] = {}
    for number, root in enumerate(_groups(contents)):
        members.setdefault(root, []).append(number)

    def order(documents: list[int]) -> int:
        return key64(seed, "heldout", *sorted({digest for number in documents for digest in contents[number]}))

    wanted = wanted_documents(len(contents), share)
    chosen: set[int] = set()
    for documents in sorted(members.values(), key=order):
        if len(chosen) + len(documents) <= wanted:
            chosen.update(documents)
    return frozenset(chosen)


def _groups(contents: list[list[str]]) -> list[int]:
    """For every document the smallest number of its group."""
    parent = list(range(len(contents)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    first_with: dict[str, int] = {}
    for number, digests in enumerate(contents):
        for digest in digests:
            a, b = root(first_with.setdefault(digest, number)), root(number)
            parent[max(a, b)] = min(a, b)
    return [root(number) for number in range(len(contents))]


def _contents(document: Document) -> list[str]:
    """Digests of a document's images, or of its texts if it has none."""
    texts = json.dumps(document.texts).encode()
    return [image.sha256 for image in document.images] or [hashlib.sha256(texts).hexdigest()]


def _write(data: NativeDataset, output: Path, plan: dict[str, Any], *, quiet: bool) -> None:
    contents = [_contents(data.document(index)[0]) for index in range(len(data))]
    heldout = heldout_documents(contents, plan["heldout_share"], plan["seed"])
    if not heldout or len(heldout) == len(contents):
        wanted = wanted_documents(len(contents), plan["heldout_share"])
        rule = f"of {len(contents)} documents {len(heldout)} would be held out ({wanted} are wanted)"
        raise DataError(explain(data.path, rule, "Change the share, or lower --max-repeats when preparing."))
    writers = [_SplitWriter(output / part) for part in PARTS]
    try:
        for index in tqdm(range(len(contents)), "splitting", disable=quiet):
            writers[index in heldout].add(data, index)
        for writer in reversed(writers):
            writer.close(plan)
    finally:
        for writer in writers:
            writer.discard()


class _SplitWriter:
    """Writes one side of the split, shard by shard."""

    def __init__(self, folder: Path) -> None:
        marker = folder / MARKER
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()) and not marker.exists() and not (folder / MANIFEST).exists():
                raise DataError(explain(folder, "holds other files", "Choose another output folder."))
            atomic_write(marker, "")
            (folder / MANIFEST).unlink(missing_ok=True)
            for path in folder.glob(f"*{folder.name}-*"):  # of a killed attempt, which may have had another share
                path.unlink()
        self._folder = folder
        self._shards: list[ShardInfo] = []
        self._writer: ShardWriter | None = None

    def add(self, data: NativeDataset, index: int) -> None:
        """Copy a document with everything that is stored with it."""
        document, members = data.document(index)
        stored = parse_object(data.storage.read(members.shard, *members.places[0]))
        more = {name: value for name, value in stored.items() if name not in STORED}
        try:
            contents = [data.image(document, members, n) for n in range(len(document.images))]
        except ImageDamagedError as error:
            where = f"{data.path}/{members.shard}, document {document.key}"
            raise DataError(explain(where, str(error), "Prepare the data set again.")) from error
        if self._writer is None:
            self._writer = ShardWriter(self._folder / f"{self._folder.name}-{len(self._shards):05d}.tar")
        named = Document(f"{index:010d}", document.kind, document.texts, document.images)
        try:
            self._writer.add(named, contents, **{"source_key": document.key, **more})
        except BadJsonError as error:
            where = f"{data.path}/{members.shard}, document {document.key}"
            raise DataError(explain(where, f"cannot be copied: {error}", "Prepare the data set again.")) from error
        if self._writer.size >= SHARD_BYTES:
            self._shards.append(self._writer.close())
            self._writer = None

    def close(self, plan: dict[str, Any]) -> None:
        """Complete it: only now does it count as there."""
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None
        write_manifest(self._folder, self._shards, dropped_documents=Counter(), dropped_images=Counter(), split=plan)
        (self._folder / MARKER).unlink()

    def discard(self) -> None:
        """Give up what is not complete."""
        if self._writer is not None:
            self._writer.discard()
            self._writer = None


def _done(output: Path, plan: dict[str, Any]) -> bool:
    """Whether both parts are complete; refuses a folder with another split."""
    there = [part for part in PARTS if (output / part / MANIFEST).exists()]
    for part in there:
        if _manifest(output / part).get("split") != plan:
            rule = "holds a split of other data, or with another share or seed"
            raise DataError(explain(output / part, rule, "Choose another output folder."))
    return len(there) == len(PARTS)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return parse_manifest(str(path), path.read_bytes())
