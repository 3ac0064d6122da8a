"""Pre-train by latent compression learning (`tools/pretrain_lcl.py`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config.base import config_dataclass, require
from lcl_mcore.config.cli import RunOptions, parse_run
from lcl_mcore.config.run_folder import check_folder, config_text
from lcl_mcore.distributed.launcher import refuse_tasks_without_ranks, world_size
from lcl_mcore.fault_tolerance.events import is_restart
from lcl_mcore.storage import require_writable
from lcl_mcore.terminal import say


@config_dataclass
class PretrainOptions(RunOptions):
    """Pre-train a vision encoder by latent compression learning.

    Every rank runs this command; one process needs no torchrun.
    """

    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH[:WEIGHT] ...")] = ()
    """Prepared data sets, and their shares of the mixture."""
    out: Path | None = None
    """Folder of the run; by default runs/RECIPE."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue from the newest complete checkpoint in the folder, or start if there is none."""
    start_over: tyro.conf.FlagCreatePairsOff[bool] = False
    """Start at step 0 in a folder that holds a run; what it holds gets other names (former-...) and stays."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the whole configuration as the config.yaml of the run would hold it, and do nothing else."""
    init_from: Path | None = None
    """Start from the weights of this file or folder (tools/import_released.py)."""


def parse_options(arguments: Sequence[str] | None = None) -> PretrainOptions:
    """Read the command line."""
    options = parse_run(PretrainOptions, arguments)
    options.run.check_schedule()
    return options


def main() -> int:
    """Parse the command line, start the processes, train."""
    options = parse_options()
    config = options.run
    if options.print_config:
        say(config_text(config).rstrip())
        return 0
    refuse_tasks_without_ranks()
    config.check_processes(world_size())
    folder = options.out or Path("runs") / config.recipe
    require(not (options.resume and options.start_over), "--resume", "goes on, and --start-over does not", "Drop one.")
    restart = is_restart(folder)  # torchrun repeats the same command after a failure
    resume, start_over = options.resume or restart, options.start_over and not restart
    if not start_over:
        check_folder(folder, resume)
    if os.environ.get("RANK", "0") == "0":
        require_writable(folder, "--out")
    if options.init_from is not None:
        there = options.init_from.is_file() or options.init_from.is_dir()
        require(there, f"--init-from {options.init_from}", "is no file or folder", "Check the path.")

    # Imported only now, so that a mistake above is answered at once; and what follows before torch is.
    from lcl_mcore.data.inputs import check_inputs

    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        check_inputs(config)
    from lcl_mcore.distributed.context import start

    context = start(config, folder)
    from lcl_mcore.planning.micro_batch import with_number

    config = with_number(config, context, resume)
    from lcl_mcore.fault_tolerance.lease import hold
    from lcl_mcore.trainer import Trainer  # after `start`: see `lcl_mcore.distributed.cpu`

    with hold(config, context) as lease:
        trainer = Trainer(config, context, lease, resume=resume, start_over=start_over, init_from=options.init_from)
        return trainer.train()


if __name__ == "__main__":
    run_main(main)
