"""What every entry script does around its own work. Imports nothing heavy: mistakes are answered at once."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from lcl_mcore.errors import ConfigError, LclError, LeaseError, explain
from lcl_mcore.optional_packages import half_installed


def run_main(main: Callable[[], int]) -> None:
    """Run a script's `main`, print what the user can act on without a traceback, and leave with its code.

    A failed rank leaves through `os._exit`: destructors of process groups whose peers are gone may hang.
    """
    # megatron-core warns about each package it does without; our own start-up report says it once.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    code, failed = 1, True
    try:
        code, failed = main(), False
    except LclError as error:
        # What is refused at the start is the same on every rank: one of them says it.
        if not isinstance(error, ConfigError | LeaseError) or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        if text := half_installed(error) or _disk_fault(error):
            print(f"error: {text}", file=sys.stderr, flush=True)
            code = LclError.exit_code
        else:  # reported whole: a bug or a lost peer, not a mistake of the user
            traceback.print_exc()
    _flush()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        if failed:
            for child in multiprocessing.active_children():  # writers of a checkpoint would outlive us
                child.kill()
            os._exit(code)
        distributed.destroy_process_group()
    sys.exit(code)


_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
_PATH_FAULTS = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ENOTEMPTY, errno.ENXIO, errno.EINVAL),
}


def _disk_fault(error: Exception) -> str:
    """What a disk or a path of the user's refuses, in one sentence; empty for all else, and for files of our own."""
    if not isinstance(error, OSError):
        return ""
    named = str(error.filename) if isinstance(error.filename, str | os.PathLike) else ""
    ours = Path(__file__).resolve().parents[1] in Path(named).absolute().parents if named else False
    if error.errno in _DISK_FAULTS or (named and not ours and error.errno in _PATH_FAULTS):
        rule = f"cannot be used ({error.strerror})"
        return explain(named or "the disk", rule, "Check the path, its rights and the room on its disk.")
    return ""


def _flush() -> None:
    """Write out what was printed. A reader that is gone, or a full disk, changes no exit code."""
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            with contextlib.suppress(OSError):
                stream.flush()
