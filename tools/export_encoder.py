#!/usr/bin/env python
"""Write the vision encoder of a run for timm, open_clip and transformers, checked, with a model card.

    python tools/export_encoder.py runs/demo --out exported

Takes a run (its newest checkpoint), a checkpoint of any layout, or a folder of tools/import_released.py. Needs no
network: `pip install 'lcl-mcore[export]'` brings the packages that the check loads the result with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lcl_mcore.commands.entry import run_main


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="run, checkpoint, or folder with model.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--formats",
        nargs="*",
        default=[],
        choices=["timm", "open_clip", "transformers", "full", "released"],
        help="default: every package's format that can hold the encoder, and full",
    )
    flags = parser.parse_args()

    from lcl_mcore.interop.export import export

    summary = export(flags.model, flags.out, flags.formats)
    for name, facts in summary["written"].items():
        checked = f"  features equal within {facts['deviation']:.1e}" if "deviation" in facts else ""
        print(f"{flags.out / name}{checked}")
    for name, reason in summary["skipped"].items():
        print(f"{name}: not written: {reason}")
    print(flags.out / "README.md")
    return 0


if __name__ == "__main__":
    run_main(main)
