#!/usr/bin/env python
"""The training script on a disk that is full for a while.

    full_disk.py SECONDS DURATION BYTES --recipe ... (the flags of tools/pretrain_lcl.py)

From SECONDS after its start on, for DURATION seconds, no file of this process may grow beyond BYTES.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import threading
import time

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.pretrain import main


def fill(seconds: float, duration: float, size: int) -> None:
    """Limit the size of files for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    time.sleep(seconds)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    time.sleep(duration)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float)
    parser.add_argument("duration", type=float)
    parser.add_argument("size", type=int)
    options = parser.parse_args(sys.argv[1:4])
    del sys.argv[1:4]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead, as on a full disk
    threading.Thread(target=fill, args=(options.seconds, options.duration, options.size), daemon=True).start()
    run_main(main)
