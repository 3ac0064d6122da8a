#!/usr/bin/env python
"""Pre-train by latent compression learning.

    python tools/pretrain_lcl.py --recipe demo --data data/demo/train --tokenizer data/demo
    torchrun --nproc-per-node 8 tools/pretrain_lcl.py --recipe paper-l14 --tp 2 --data /data/mmc4 ...

All flags: --help. Every rank runs this script; one process needs no torchrun.
"""

from __future__ import annotations

import os
from pathlib import Path

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.cli import parse_flags, resolve
from lcl_mcore.config.files import check_folder, write_config
from lcl_mcore.fault_tolerance.restart import is_restart


def main() -> int:
    flags = parse_flags()
    config = resolve(flags)
    config.check_processes(int(os.environ.get("WORLD_SIZE", "1")))
    folder = flags.out or Path("runs") / config.recipe
    resume = flags.resume or is_restart(folder)  # torchrun repeats the same command after a failure
    check_folder(folder, resume)

    # Imported only now, so that a mistake above is answered at once.
    from lcl_mcore.distributed.context import start

    context = start(config, folder)
    if context.rank == 0:
        write_config(config, folder)
    from lcl_mcore.trainer import Trainer  # after `start`: see `lcl_mcore.distributed.cpu`

    return Trainer(config, context, resume=resume, init_from=flags.init_from).train()


if __name__ == "__main__":
    run_main(main)
