"""What a data set is prepared from: settings, input files and the folder of images. Decides what is still valid.

Files are told apart by size and time of change, as `make` and `rsync` do. The images' folder is one digest over the
names, sizes and times below it: about 4 s per million files on a local disk, and a request per file on some network
file systems. Where data lie is not part of it: moved with their times, they are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_mcore.data.prepare.records import InputFile

FileState = list[list[Any]]
"""Name, size and time of change (nanoseconds) of every path of an input file."""
SHOWN_CHANGES = 3


@dataclass(frozen=True)
class ImageListing:
    """What lies in the images' folder: number of files, and a digest of their names, sizes and times."""

    root: str
    files: int
    digest: str


@dataclass(frozen=True)
class PreparePlan:
    """What goes into a data set.

    Attributes:
        settings: format, the reader's settings and the options.
        images: what lies in the images' folder; None if there is none.
        files: the state of every input file by its name.
    """

    settings: dict[str, Any]
    images: ImageListing | None
    files: dict[str, FileState]

    def identity(self, file: InputFile, part: int, parts: int) -> str:
        """Changes whenever something changes from which this part of a file is prepared."""
        images = self.images.digest if self.images else ""
        content = [self.settings, images, file.name, self.files[file.name], part, parts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def other_settings(self, earlier: PreparePlan) -> list[str]:
        """What was asked for otherwise, setting by setting."""
        old, new = dict(_flat(earlier.settings)), dict(_flat(self.settings))
        return [
            f"{name} was {old.get(name)}, now {new.get(name)}"
            for name in [*old, *(new.keys() - old.keys())]
            if old.get(name) != new.get(name)
        ]

    def other_input(self, earlier: PreparePlan) -> list[str]:
        """Which input files and images are not what they were."""
        changes = []
        for name in [*earlier.files, *(self.files.keys() - earlier.files.keys())]:
            if name not in self.files:
                changes.append(f"{name} is gone")
            elif name not in earlier.files:
                changes.append(f"{name} is new")
            elif self.files[name] != earlier.files[name]:
                changes.append(f"{name} changed")
        if len(changes) > SHOWN_CHANGES:
            changes[SHOWN_CHANGES:] = [f"{len(changes) - SHOWN_CHANGES} more input files too"]
        old, new = earlier.images, self.images
        if old and new and old.digest != new.digest:
            if old.root == new.root:
                changes.append(f"the images in {new.root} changed ({old.files} files, now {new.files})")
            else:
                changes.append(f"the images were those of {old.root}, now of {new.root}")
        return changes


def printable(name: str) -> str:
    """A file's name with bytes that are not UTF-8 written out, so that it can be stored and shown."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def make_plan(
    settings: dict[str, Any], files: Sequence[InputFile], image_root: Path | None, output: Path
) -> PreparePlan:
    """The plan of what lies there now; what lies in `output` is not counted among the images."""
    apart = {os.path.realpath(path) for file in files for path in file.paths}
    images = None if image_root is None else list_images(image_root, os.path.realpath(output), apart)
    return PreparePlan(json.loads(json.dumps(settings)), images, {file.name: file_state(file) for file in files})


def file_state(file: InputFile) -> FileState:
    """Sizes and times of an input file; one that cannot be looked at has none."""
    states: FileState = []
    for path in file.paths:
        try:
            found = path.stat()
            states.append([printable(path.name), found.st_size, found.st_mtime_ns])
        except OSError:
            states.append([printable(path.name), None, None])
    return states


def list_images(root: Path, output: str, apart: set[str]) -> ImageListing:
    """Number of files and digest of names, sizes and times below `root`, except `output` and the paths `apart`."""
    digest = hashlib.sha256()
    count = 0
    for folder, entries in _folders(root.resolve(), output):
        digest.update(b"/%s\0" % folder)
        for entry in entries:
            if entry.path in apart:
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since
                found = entry.stat(follow_symlinks=False)
                digest.update(b"%s\0%d %d\0" % (os.fsencode(entry.name), found.st_size, found.st_mtime_ns))
                count += 1
    return ImageListing(printable(str(root)), count, digest.hexdigest())


def _folders(root: Path, output: str) -> Iterator[tuple[bytes, list[os.DirEntry[str]]]]:
    """Every folder below `root`, in a fixed order: its path from there, and what it holds but folders."""
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            continue  # whatever is wanted from there will be a missing file
        inner = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False) and entry.path != output]
        waiting += reversed(inner)
        yield os.fsencode(folder.removeprefix(str(root))), [e for e in entries if not e.is_dir(follow_symlinks=False)]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
