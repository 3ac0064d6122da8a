#!/usr/bin/env python
"""Print a recipe's parameters, tokens and FLOPs without building the model.

python tools/describe.py --recipe paper-l14
python tools/describe.py --config runs/demo/config.yaml --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.files import read_config
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.models.flops import describe_model

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """12345678 -> `12.35 M`."""
    for size, unit in UNITS:
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g} "


def print_report(report: dict[str, Any]) -> None:
    """The same numbers for people."""
    print(f"{report['recipe']}\n\nparameters")
    for name, count in report["parameters"].items():
        print(f"  {name.replace('_', ' '):<22}{count:>16,}")
    tokens = report["tokens_per_image"]
    print(
        f"\ntokens per image       {tokens['encoder']} in the encoder, {tokens['language_model']} in the "
        f"language model, {tokens['with_markers']} with <BoI> and <EoI>"
    )
    print(f"tokens per row         {report['sequence_length']}")
    print(f"\n{'FLOPs':<40}{'forward':>12}{'training':>12}")
    for name, forward in report["forward_flops"].items():
        label = name.replace("_", " ").replace("lm", "LM")
        print(f"  {label:<38}{short(forward):>12}{short(report['training_flops'][name]):>12}")
    print("\nMatrix products only, 2 per multiply-add; training is forward and backward, without recompute.")


def main() -> int:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", help="a named recipe")
    what.add_argument("--config", type=Path, help="a config.yaml, for example of a run")
    parser.add_argument("--json", action="store_true", help="machine-readable, exact numbers")
    args = parser.parse_args()
    report = describe_model(load_recipe(args.recipe) if args.recipe else read_config(args.config))
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    run_main(main)
