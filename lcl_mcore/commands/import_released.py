"""Turn a checkpoint of the released LCL code into weights and a configuration (`tools/import_released.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import PositiveInt

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass, from_dict, to_dict
from lcl_mcore.config.recipes import released_for
from lcl_mcore.config.run_folder import FILE as CONFIG_FILE
from lcl_mcore.config.run_folder import write_config
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.storage import require_writable


@config_dataclass
class ImportOptions:
    """Turn a checkpoint of the released LCL code into weights and a configuration that training starts from.

    The weights fit every tensor-parallel size.
    """

    checkpoint: tyro.conf.Positional[Path]
    """`.pt` file of the released code."""
    out: Path = Path("imported")
    """Folder to write."""
    tensor_parallel_size: Annotated[PositiveInt, tyro.conf.arg(aliases=("--tp",))] = 1
    """Checked, and written into config.yaml."""


def main() -> int:
    """Parse the command line, convert, write."""
    options = arguments.parse(ImportOptions)
    require_writable(options.out, "--out")

    from lcl_mcore.checkpoint.weights_file import write_consolidated
    from lcl_mcore.interop.released import from_released, read_released, shape_of_released
    from lcl_mcore.models.flops import parameter_counts

    released = read_released(options.checkpoint)
    shape = shape_of_released(released)
    tree = to_dict(released_for(shape))
    tree["parallel"]["tensor_parallel_size"] = options.tensor_parallel_size
    config = from_dict(RunConfig, tree)
    state = from_released(released, shape)
    path = write_consolidated(state, shape, options.out)
    write_config(config, options.out)
    total = sum(parameter_counts(shape).values())
    print(f"{len(state)} tensors, {total:,} parameters, recipe {config.recipe}")
    print(f"{path}\n{options.out / CONFIG_FILE}")
    return 0


if __name__ == "__main__":
    run_main(main)
