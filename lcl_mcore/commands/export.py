"""Write the vision encoder of a run in the formats of other packages (`tools/export_encoder.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass
from lcl_mcore.storage import require_writable


@config_dataclass
class ExportOptions:
    """Write the vision encoder of a run for timm, open_clip and transformers, checked, with a model card."""

    model: tyro.conf.Positional[Path]
    """Run, checkpoint of any layout, or folder with model.safetensors."""
    out: Path
    """Folder to write."""
    formats: tuple[Literal["timm", "open_clip", "transformers", "full", "released"], ...] = ()
    """By default every package's format that can hold the encoder, and full."""


def main() -> int:
    """Parse the command line, export, say what was written."""
    options = arguments.parse(ExportOptions)
    require_writable(options.out, "--out")

    from lcl_mcore.export.encoder import export

    summary = export(options.model, options.out, options.formats)
    for name, facts in summary["written"].items():
        checked = f"  features equal within {facts['deviation']:.1e}" if "deviation" in facts else ""
        print(f"{options.out / name}{checked}")
    for name, reason in summary["skipped"].items():
        print(f"{name}: not written: {reason}")
    print(options.out / "README.md")
    return 0


if __name__ == "__main__":
    run_main(main)
