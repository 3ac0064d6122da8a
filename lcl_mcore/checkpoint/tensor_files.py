"""Files of tensors that others wrote, looked at before a library reads them: safetensors, and torch's `.pt`.

The libraries run no code from them, but they believe what a file says about itself: that costs memory and time, and a
nested tuple as a key ends the process.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.untrusted import BadJsonError, open_regular, parse_object, require_shallow_pickle

MAX_TENSORS = 50_000
MAX_HEADER = 16 << 20
"""Bytes of a safetensors file's header, of a zip's directory, and of the pickle in a `.pt`."""
REMEDY = "Check the path, or download it again."


def require_sound_safetensors(path: Path) -> None:
    """Refuse what is no regular file, has a header of unusual size, or too many tensors.

    Raises:
        CheckpointError: it is so.
    """
    try:
        with open_regular(path) as file:
            size, whole = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if size > min(MAX_HEADER, whole):
                raise BadJsonError(f"a header of {size} bytes")
            header = parse_object(file.read(size), max_bytes=MAX_HEADER)
        header.pop("__metadata__", None)
        tensors, end = len(header), 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != whole:
            raise BadJsonError(f"{whole} bytes, its header describes {end}")
    except (KeyError, IndexError, TypeError):
        raise _unreadable(path, "its header does not say where tensors lie") from None
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from None
    except BadJsonError as error:
        raise _unreadable(path, str(error)) from None
    if tensors > MAX_TENSORS:
        raise _unreadable(path, f"{tensors} tensors, at most {MAX_TENSORS} are read")


def require_sound_pt(path: Path) -> None:
    """Refuse a file that is no zip as torch writes them: stored and not compressed, each byte once, a small pickle.

    Raises:
        CheckpointError: it is so.
    """
    try:
        with open_regular(path) as file:
            _require_small_directory(file)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise ValueError("it is compressed")
                if sum(member.file_size for member in members) > os.fstat(file.fileno()).st_size:
                    raise ValueError("its parts overlap")
                pickles = [member for member in members if member.filename.endswith(".pkl")]
                if len(members) > MAX_TENSORS or sum(member.file_size for member in pickles) > MAX_HEADER:
                    raise ValueError(f"more than {MAX_TENSORS} tensors, or than {MAX_HEADER} bytes to describe them")
                for member in pickles:
                    require_shallow_pickle(archive.read(member))
    except OSError as error:
        raise _unreadable(path, str(error.strerror or error)) from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError) as error:
        raise _unreadable(path, str(error) or "damaged") from None


def _require_small_directory(file: BinaryIO) -> None:
    """A zip's directory would be read whole; its size stands in the record at the end."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - (1 << 16)))
    record = file.read().rpartition(b"PK\5\6")
    if not record[1]:
        raise ValueError("it is no zip, as torch writes since version 1.6")
    if int.from_bytes(record[2][8:12], "little") > MAX_HEADER:
        raise ValueError("its directory is too long")
    file.seek(0)


def _unreadable(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(explain(path, f"cannot be read ({reason})", REMEDY))
