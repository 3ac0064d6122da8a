#!/usr/bin/env python
"""Turn a checkpoint of the released LCL code into weights and a configuration that training starts from.

    python tools/import_released.py LCL-ViT-B-16-Laion.pt --out imported
    torchrun ... tools/pretrain_lcl.py --config imported/config.yaml --init-from imported ...

The weights fit every tensor-parallel size; --tp only sets (and checks) the one in config.yaml.
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.import_released import main

if __name__ == "__main__":
    run_main(main)
