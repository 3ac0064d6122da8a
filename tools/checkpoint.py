#!/usr/bin/env python
"""Look at checkpoints of any layout, in a folder or behind a URL; one process, no GPU, no torchrun.

    python tools/checkpoint.py list runs/demo
    python tools/checkpoint.py verify s3://bucket/run           # every file's size and SHA-256; exit code 1 if damaged
    python tools/checkpoint.py info runs/demo/checkpoints/step-00000100
    python tools/checkpoint.py consolidate runs/demo --out weights   # one model.safetensors and its config.yaml

PATH is one checkpoint, a folder of checkpoints, or a run's folder; `info` and `consolidate` then take the newest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lcl_mcore.commands.entry import run_main


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("list", "verify", "info", "consolidate"))
    parser.add_argument("path", help="checkpoint, folder of checkpoints, or run; local or a URL")
    parser.add_argument("--out", type=Path, help="consolidate: folder to write into")
    flags = parser.parse_args()
    if (flags.command == "consolidate") != (flags.out is not None):
        parser.error("consolidate needs --out, the other commands take none")

    from lcl_mcore.checkpoint import consolidate as checkpoint_tool

    if flags.command == "list":
        for row in checkpoint_tool.list_checkpoints(flags.path):
            state = f"NOT COMPLETE: {row['problem']}" if row["problem"] else "complete"
            print(f"{row['path']}  {row['files']} files  {row['bytes'] / 1e6:.1f} MB  {state}")
    elif flags.command == "verify":
        damaged = 0
        for path, problems in checkpoint_tool.verify_checkpoints(flags.path).items():
            print(f"{path}: {'; '.join(problems) or 'intact'}")
            damaged += bool(problems)
        return 1 if damaged else 0
    elif flags.command == "info":
        print(checkpoint_tool.as_text(checkpoint_tool.info(flags.path)))
    else:
        file = checkpoint_tool.consolidate(flags.path, flags.out)
        print(f"{file}: start from it with --config {file.parent / 'config.yaml'} --init-from {file}")
    return 0


if __name__ == "__main__":
    run_main(main)
