#!/usr/bin/env python
"""Say what this machine offers, which backend every part would use, and why not a faster one.

python tools/doctor.py
torchrun --nproc-per-node 2 tools/doctor.py --folder runs/x  # also links, clocks, equal software, storage
"""

from lcl_mcore.commands.doctor import main
from lcl_mcore.commands.entry import run_main

if __name__ == "__main__":
    run_main(main)
