"""Look at checkpoints of any layout, in a folder or behind a URL (`tools/checkpoint.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import tyro

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass, require
from lcl_mcore.storage import require_writable


@config_dataclass
class CheckpointOptions:
    """Look at checkpoints of any layout, in a folder or behind a URL; one process, no GPU, no torchrun."""

    command: tyro.conf.Positional[Literal["list", "verify", "info", "consolidate"]]
    """list: path, size and completeness; verify: every file's size and hash, exit code 1 if damaged; info: state,
    configuration and tensors of the newest; consolidate: the newest as one model.safetensors and its config.yaml."""
    path: tyro.conf.Positional[str]
    """Checkpoint, folder of checkpoints, or run; local or a URL."""
    out: Path | None = None
    """consolidate: folder to write into."""

    def __post_init__(self) -> None:
        require(
            (self.command == "consolidate") == (self.out is not None),
            f"{self.command} {'without' if self.out is None else 'with'} --out",
            "consolidate writes a folder, the other commands write nothing",
            "Give --out FOLDER." if self.out is None else "Leave it out.",
        )


def main() -> int:
    """Parse the command line and carry it out."""
    options = arguments.parse(CheckpointOptions)
    if options.out is not None:
        require_writable(options.out, "--out")

    from lcl_mcore.checkpoint import consolidate as checkpoints

    if options.command == "list":
        for found in checkpoints.list_checkpoints(options.path):
            state = f"NOT COMPLETE: {found['problem']}" if found["problem"] else "complete"
            print(f"{found['path']}  {found['files']} files  {found['bytes'] / 1e6:.1f} MB  {state}")
    elif options.command == "verify":
        damaged = 0
        for path, problems in checkpoints.verify_checkpoints(options.path).items():
            print(f"{path}: {'; '.join(problems) or 'intact'}")
            damaged += bool(problems)
        return 1 if damaged else 0
    elif options.command == "info":
        print(json.dumps(checkpoints.info(options.path), indent=2))
    else:
        assert options.out is not None
        file = checkpoints.consolidate(options.path, options.out)
        print(f"{file}: start from it with --config {file.parent / 'config.yaml'} --init-from {file}")
    return 0


if __name__ == "__main__":
    run_main(main)
