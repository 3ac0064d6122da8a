#!/usr/bin/env python
"""Predict memory, speed, communication, cost and goodput of a job on GPUs that you do not have yet.

python tools/plan.py --recipe paper-l14 --gpus 512 --gpu h100
python tools/plan.py --recipe large-g14 --gpus 256 --gpu a800 --tp 8 --recompute-vision full --json
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.plan import main

if __name__ == "__main__":
    run_main(main)
