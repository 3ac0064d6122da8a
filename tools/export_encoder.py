#!/usr/bin/env python
"""Write the vision encoder of a run for timm, open_clip and transformers, checked, with a model card.

    python tools/export_encoder.py runs/demo --out exported

Takes a run (its newest checkpoint), a checkpoint of any layout, or a folder of tools/import_released.py. Needs no
network: `pip install 'lcl-mcore[export]'` brings the packages that the check loads the result with.
"""

from lcl_mcore.commands.entry import run_main
from lcl_mcore.commands.export import main

if __name__ == "__main__":
    run_main(main)
