"""Print a model's parameters, tokens and FLOPs without building it (`tools/describe.py`)."""

from __future__ import annotations

import json
from typing import Any

import tyro

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.base import config_dataclass
from lcl_mcore.config.cli import RunOptions, parse_run

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@config_dataclass
class DescribeOptions(RunOptions):
    """Print a recipe's parameters, tokens and FLOPs without building the model."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Machine-readable, exact numbers."""


def main() -> int:
    """Parse the command line and print."""
    options = parse_run(DescribeOptions)

    from lcl_mcore.models.flops import describe_model

    report = describe_model(options.run)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0


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
    print(f"tokens per sequence    {report['sequence_length']}")
    print(f"\n{'FLOPs':<40}{'forward':>12}{'training':>12}")
    for name, forward in report["forward_flops"].items():
        label = name.replace("_", " ").replace("lm", "LM")
        print(f"  {label:<38}{short(forward):>12}{short(report['training_flops'][name]):>12}")
    print("\nMatmuls only, 2 per multiply-add; training is forward and backward, without recompute.")


if __name__ == "__main__":
    run_main(main)
