#!/usr/bin/env python
"""Print a recipe's parameters, tokens and FLOPs without building the model.

python tools/describe.py --recipe paper-l14
python tools/describe.py --config runs/demo/config.yaml --json
"""

from lcl_mcore.commands.describe import main
from lcl_mcore.commands.entry import run_main

if __name__ == "__main__":
    run_main(main)
