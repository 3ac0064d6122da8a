"""Render the demo corpus (OpenMoji images with their names) into a folder.

    python tools/build_demo_corpus.py OUT

Makes OUT/train, OUT/heldout and OUT/tokenizer.json. May be interrupted and started again. The work is done by
examples/demo/openmoji.py, which has the same command line.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

from openmoji import main

from lcl_mcore.commands.entry import run_main

if __name__ == "__main__":
    run_main(main)
