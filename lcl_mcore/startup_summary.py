"""What a run says once at its start: which part runs on what, and why not on something faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lcl_kernels.infonce import select_engine

from lcl_mcore.config.recipes import RECIPES
from lcl_mcore.config.run_folder import changes_of_recipe, listed
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.distributed.context import Context
from lcl_mcore.models.backends import Choice
from lcl_mcore.models.lcl import LclModel


def layout_name(config: RunConfig, context: Context) -> str:
    """For example `tp2 pp1 dp4`."""
    parallel = config.parallel
    return f"tp{parallel.tensor_parallel_size} pp{parallel.pipeline_parallel_size} dp{context.groups.dp.size()}"


def startup_summary(config: RunConfig, context: Context, model: LclModel, choices: Sequence[Choice]) -> list[str]:
    """Lines for the terminal."""
    parallel = config.parallel
    lines = [
        f"lcl_mcore  recipe {config.recipe}  {context.world_size} processes on "
        f"{context.device.name} ({context.device.backend})  "
        f"tp {parallel.tensor_parallel_size} pp {parallel.pipeline_parallel_size} dp {context.groups.dp.size()}  "
        f"{config.train.precision}"
    ]
    share, size = config.train.global_batch_size // context.groups.dp.size(), config.train.resolved_micro_batch_size
    lines.append(f"  batch      {size} sequences x {share // size} micro-batches on each data-parallel rank")
    stages = model.stage_layers
    if len(stages) > 1:
        lines.append(f"  stages     LM layers {', '.join(map(str, stages))}; the ViT on the first")
    if parallel.tensor_parallel_size > 1:
        chosen = "" if parallel.vision_parallel != "auto" else " (by the rule of docs/layouts.md)"
        how = "whole on each rank, images shared" if model.vision_data else "matrices split"
        lines.append(f"  ViT        {how} over tp{chosen}")
    lines += [f"  {choice.part:<10} {choice.backend:<16} {choice.reason}" for choice in choices]
    changes = listed(changes_of_recipe(config)) or "none"
    lines.append(f"  changes    of {'the recipe' if config.recipe in RECIPES else 'the defaults'}: {changes}")
    lines += [f"WARNING {caution}" for caution in config.never_happens()]
    return [*lines, f"  loss       {_losses(config, context, model)}", f"  folder     {context.run_folder}"]


def _losses(config: RunConfig, context: Context, model: LclModel) -> str:
    """The kernels of both losses; "auto" by what it stands for here."""
    loss = config.loss
    engine = select_engine(loss.contrastive_impl, torch.empty(0, device=context.device.device))
    contrastive = "reference" if engine is None else engine.name
    automatic = "triton" if model.language.elementwise == "triton" else "chunked"
    generation = automatic if loss.generation_impl == "auto" else loss.generation_impl
    return f"{contrastive} contrastive, {generation} cross-entropy"
