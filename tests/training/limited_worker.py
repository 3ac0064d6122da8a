"""The training script in a process that may not write files larger than 20 kB."""

import resource
import runpy
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    script = Path(__file__).resolve().parents[2] / "tools" / "pretrain_lcl.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")
