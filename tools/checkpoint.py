#!/usr/bin/env python
"""Look at checkpoints of any layout, in a folder or behind a URL; one process, no GPU, no torchrun.

    python tools/checkpoint.py list runs/demo
    python tools/checkpoint.py verify s3://bucket/run           # every file's size and SHA-256; exit code 1 if damaged
    python tools/checkpoint.py info runs/demo/checkpoints/step-00000100
    python tools/checkpoint.py consolidate runs/demo --out weights   # one model.safetensors and its config.yaml

PATH is one checkpoint, a folder of checkpoints, or a run's folder; `info` and `consolidate` then take the newest.
"""

from lcl_mcore.commands.checkpoint import main
from lcl_mcore.commands.entry import run_main

if __name__ == "__main__":
    run_main(main)
