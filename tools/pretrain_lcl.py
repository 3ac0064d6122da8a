#!/usr/bin/env python
"""Pre-train by latent compression learning.

    python tools/pretrain_lcl.py --recipe demo --data data/demo/train --tokenizer data/demo
    torchrun --nproc-per-node 8 tools/pretrain_lcl.py --recipe paper-l14 --tp 2 --data /data/mmc4 ...

All flags, with the recipe's values: --recipe NAME --help. Every rank runs this script; one process needs no torchrun.
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.pretrain import main

if __name__ == "__main__":
    run_main(main)
