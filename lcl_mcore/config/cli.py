"""The command line: about thirty flags over a recipe or a configuration file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from lcl_mcore.config.base import from_dict, to_dict
from lcl_mcore.config.files import read_config
from lcl_mcore.config.recipes import load_recipe, source_options
from lcl_mcore.config.run import RunConfig
from lcl_mcore.errors import ConfigError, explain


@dataclasses.dataclass(frozen=True)
class Flags:
    """Pre-train a vision encoder by latent compression learning.

    Every flag left out keeps the value of the recipe or configuration file.
    """

    recipe: str | None = None
    """Named recipe, see docs/recipes.md. Exactly one of --recipe and --config is needed."""
    config: Path | None = None
    """Configuration file, for example the config.yaml of an earlier run."""
    out: Path | None = None
    """Folder of the run (default: runs/RECIPE)."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the folder, or start if there is none."""
    data: tuple[str, ...] = ()
    """Prepared data sets, PATH or PATH:WEIGHT."""
    tokenizer: str | None = None
    """tokenizer.json, or a folder that holds one."""
    init_from: Path | None = None
    """Start from the weights of this file (see tools/import_released.py)."""

    tp: Annotated[int | None, tyro.conf.arg(help="Tensor-parallel size.")] = None
    pp: Annotated[int | None, tyro.conf.arg(help="Pipeline stages.")] = None
    sequence_parallel: bool = False
    """Split norms and residuals along the tokens over the tensor-parallel ranks."""
    vision_parallel: Literal["auto", "tensor", "data"] | None = None
    """The ViT over tensor-parallel ranks: matrices split, or whole copies that share the images."""
    recompute_vision: str | None = None
    """ViT activations to compute again in backward: none, selective, full or block:N."""
    recompute_language: str | None = None
    """The same for the LM."""
    overlap: bool = True
    """Overlap gradient reduction and parameter gathering with computation."""
    timeout: float | None = None
    """Seconds after which a stuck collective fails."""

    steps: int | None = None
    """Optimizer steps."""
    micro_batch_size: int | None = None
    """Rows per forward pass on one data-parallel rank."""
    global_batch_size: int | None = None
    """Rows per optimizer step."""
    lr: float | None = None
    """Peak learning rate."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    contrastive_weight: float | None = None
    """Weight of the contrastive loss (paper: 0.1)."""
    generation_weight: float | None = None
    """Weight of the generation loss (paper: 1)."""
    negatives: Literal["global_batch", "micro_batch"] | None = None
    """Where contrastive negatives come from with gradient accumulation; micro_batch changes the objective."""
    drop_path: float | None = None
    """Stochastic depth of the ViT's last block."""
    dropout: float | None = None
    """Dropout of the LM."""
    seed: int | None = None
    """Initial weights, data order and all masks."""
    precision: Literal["fp32", "bf16", "fp8"] | None = None
    """Arithmetic of the towers; losses, temperature and master weights are always fp32."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute."""
    backend: Literal["auto", "torch", "te"] | None = None
    """Transformer layers: Transformer Engine's or megatron-core's own."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = None
    """Minutes between checkpoints, whichever comes first; 0 for steps alone."""
    checkpoint_folder: str | None = None
    """Path or URL (s3://bucket/run) for checkpoints instead of the run's folder."""
    keep: int | None = None
    """Newest checkpoints to keep."""
    max_hours: float | None = None
    """Save and end with exit code 0 before this many hours have passed."""
    log_every: int | None = None
    """Steps between lines on the terminal."""
    set: tuple[str, ...] = ()
    """Any other knob, as in the configuration file: model.vision.layers=6."""


# Where each flag lives in the configuration.
_PLACES: dict[str, tuple[str, ...]] = {
    "tp": ("parallel", "tensor_parallel_size"),
    "pp": ("parallel", "pipeline_parallel_size"),
    "vision_parallel": ("parallel", "vision_parallel"),
    "recompute_vision": ("parallel", "recompute_vision"),
    "recompute_language": ("parallel", "recompute_language"),
    "timeout": ("parallel", "timeout_seconds"),
    "drop_path": ("model", "vision", "drop_path"),
    "dropout": ("model", "language", "dropout"),
    "tokenizer": ("data", "tokenizer", "path"),
    "checkpoint_every": ("checkpoint", "every"),
    "checkpoint_minutes": ("checkpoint", "minutes"),
    "checkpoint_folder": ("checkpoint", "folder"),
    "keep": ("checkpoint", "keep"),
    "max_hours": ("checkpoint", "max_hours"),
    "log_every": ("log", "every"),
    **{
        name: ("train", name)
        for name in (
            "steps",
            "micro_batch_size",
            "global_batch_size",
            "seed",
            "precision",
            "device",
            "backend",
        )
    },
    **{name: ("optim", name) for name in ("lr", "warmup_steps")},
    **{name: ("loss", name) for name in ("contrastive_weight", "generation_weight", "negatives")},
}


def parse_flags(arguments: list[str] | None = None) -> Flags:
    """Read the command line (or `arguments`); exits with a message on a mistake."""
    return tyro.cli(Flags, args=arguments)


def resolve(flags: Flags) -> RunConfig:
    """Recipe or file, then flags, then checks.

    Raises:
        ConfigError: neither or both of --recipe and --config, or a value or combination is refused.
    """
    if (flags.recipe is None) == (flags.config is None):
        given = "both" if flags.recipe else "neither"
        raise ConfigError(
            explain(
                f"{given} of --recipe and --config",
                "exactly one says what to run",
                "For a first try: --recipe demo.",
            )
        )
    if flags.recipe is not None:
        base = load_recipe(flags.recipe)
    else:
        assert flags.config is not None
        base = read_config(flags.config)
    tree = to_dict(base)
    for name, place in _PLACES.items():
        value = getattr(flags, name)
        if value is not None:
            _put(tree, place, value)
    if flags.sequence_parallel:
        tree["parallel"]["sequence_parallel"] = True
    elif flags.tp == 1:
        tree["parallel"]["sequence_parallel"] = False  # a recipe's choice that only makes sense with more
    if not flags.overlap:
        tree["parallel"] |= {"overlap_grad_reduce": False, "overlap_param_gather": False}
    if flags.data:
        tree["data"]["sources"] = [_source(text, base.recipe) for text in flags.data]
    for assignment in flags.set:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(
                explain(
                    f"--set {assignment}",
                    "an assignment reads PATH=VALUE",
                    "For example --set model.vision.layers=6.",
                )
            )
        _put(tree, tuple(path.split(".")), yaml.safe_load(text))
    return from_dict(RunConfig, tree, "command line over " + (flags.recipe or str(flags.config)))


def _put(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    node = tree
    for part in place[:-1]:
        if not isinstance(node.get(part), dict):
            raise ConfigError(
                explain(
                    ".".join(place),
                    f"`{part}` is not a section of the configuration",
                    "See any run's config.yaml for the names.",
                )
            )
        node = node[part]
    node[place[-1]] = value


def _source(text: str, recipe: str) -> dict[str, Any]:
    path, separator, weight = text.rpartition(":")
    if separator and weight.replace(".", "", 1).isdigit():
        return {**source_options(recipe), "path": path, "weight": float(weight)}
    return {**source_options(recipe), "path": text}
