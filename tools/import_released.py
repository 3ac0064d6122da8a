#!/usr/bin/env python
"""Turn a checkpoint of the released LCL code into weights and a configuration that training starts from.

    python tools/import_released.py LCL-ViT-B-16-Laion.pt --out imported
    torchrun ... tools/pretrain_lcl.py --config imported/config.yaml --init-from imported ...

The weights fit every tensor-parallel size; --tp only sets (and checks) the one in config.yaml.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.base import from_dict, to_dict
from lcl_mcore.config.files import FILE as CONFIG_FILE
from lcl_mcore.config.files import write_config
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.config.schema import DataConfig, LossConfig, ModelConfig, RunConfig, TokenizerConfig


def config_for(shape: ModelConfig) -> RunConfig:
    """The released recipe of this shape; for any other shape, released data and loss rules around it."""
    for name in RECIPES:
        recipe = load_recipe(name)
        if recipe.model == shape:
            return recipe
    tokenizer = TokenizerConfig(kind="clip", path="openai/clip-vit-base-patch16")
    return RunConfig(
        recipe="imported",
        model=shape,
        data=DataConfig(
            tokenizer=tokenizer,
            sequence_length=shape.language.max_positions,
            packing="off",
            context_rule="index0",
        ),
        loss=LossConfig(averaging="rank"),
    )


def main() -> int:
    """Parse the command line, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="`.pt` file of the released code")
    parser.add_argument(
        "--out", type=Path, default=Path("imported"), help="folder to write (default: imported)"
    )
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size in config.yaml")
    args = parser.parse_args()

    from lcl_mcore.interop.released import from_released, read_released, shape_of_released
    from lcl_mcore.interop.weights_file import write_consolidated
    from lcl_mcore.models.flops import parameter_counts

    released = read_released(args.checkpoint)
    shape = shape_of_released(released)
    tree = to_dict(config_for(shape))
    tree["parallel"]["tensor_parallel_size"] = args.tp
    config = from_dict(RunConfig, tree)
    state = from_released(released, shape)
    path = write_consolidated(state, shape, args.out)
    write_config(config, args.out)
    total = sum(parameter_counts(shape).values())
    print(f"{len(state)} tensors, {total:,} parameters, recipe {config.recipe}")
    print(f"{path}\n{args.out / CONFIG_FILE}")
    return 0


if __name__ == "__main__":
    run_main(main)
