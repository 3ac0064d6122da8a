"""A trained model in one process, from a run, a checkpoint of any layout, or a folder with `model.safetensors`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.build import build_model
from lcl_mcore.checkpoint.consolidate import consolidated_weights
from lcl_mcore.checkpoint.store import (
    STATE,
    TrainState,
    complete_checkpoints,
    read_state,
    require_intact,
    written_config,
)
from lcl_mcore.checkpoint.weights_file import FILE as WEIGHTS_FILE
from lcl_mcore.checkpoint.weights_file import (
    load_consolidated,
    read_consolidated,
    require_same_model,
    without_vocabulary_padding,
)
from lcl_mcore.config.run_folder import FILE as CONFIG_FILE
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.config.schema import ParallelConfig, RunConfig
from lcl_mcore.data.tokenizer import Tokenizer, build_tokenizer
from lcl_mcore.distributed.context import Context, start
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.models.init import initialize
from lcl_mcore.models.lcl import LclModel


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and where they came from.

    Attributes:
        config: that of the weights.
        model: in this process, fp32: its parameters are the run's master weights.
        folder: of the run; results go there.
        weights: the checkpoint or file that was read.
        state: steps, images and data position; zeros for `model.safetensors`.
    """

    config: RunConfig
    model: LclModel
    context: Context
    folder: Path
    weights: Path
    state: TrainState

    def tokenizer(self) -> Tokenizer:
        """The vocabulary that the model was trained with."""
        return build_tokenizer(self.config.data.tokenizer)

    @property
    def results(self) -> Path:
        """Folder of the run that holds the JSON files of evaluations."""
        return self.folder / "results"

    def facts(self) -> dict[str, Any]:
        """What every result says about the model that it belongs to."""
        return {
            "weights": str(self.weights),
            "recipe": self.config.recipe,
            "steps": self.state.step,
            "images_seen": self.state.images_seen,
            "hardware": self.context.device.name,
        }


def open_model(path: Path, context: Context | None = None) -> LoadedModel:
    """Build the model in this process and load its weights, in fp32; in evaluation mode.

    Whatever a run's folder says by now: the configuration is the one that belongs to the weights.

    Args:
        path: see `locate`.
        context: of a process group that was joined before; None joins one of a single process.

    Raises:
        CheckpointError: nothing to load, or it is damaged.
        ConfigError: its configuration is missing or invalid.
    """
    folder, weights = locate(path)
    config = stored_config(folder, weights)
    alone = evaluation_config(config)
    context = context or start(alone, folder)
    model = build_model(alone, context)
    if weights.name == WEIGHTS_FILE:
        require_same_model(weights, config.model)
    stored, state = stored_weights(weights)
    load_consolidated(model, without_vocabulary_padding(stored, config.model.language.vocab_size), 0, 1)
    model.eval()
    return LoadedModel(config, model, context, folder, weights, state)


def locate(path: Path) -> tuple[Path, Path]:
    """Folder of the run and weights, of a run, one of its checkpoints, or an imported model.

    Raises:
        CheckpointError: there is no complete checkpoint and no `model.safetensors`.
    """
    if (path / STATE).is_file():
        return path.resolve().parent.parent, path
    if (path / WEIGHTS_FILE).is_file():
        return path, path / WEIGHTS_FILE
    checkpoints = complete_checkpoints(path / "checkpoints")
    if not checkpoints:
        remedy = "Train first, or give another folder."
        raise CheckpointError(explain(path, "has no complete checkpoint", remedy))
    return path, checkpoints[-1]


def stored_config(folder: Path, weights: Path) -> RunConfig:
    """The configuration that belongs to what `locate` found.

    Raises:
        CheckpointError: damaged.
        ConfigError: it is missing or invalid.
    """
    if weights.name == WEIGHTS_FILE:
        return read_config(folder / CONFIG_FILE)
    require_intact(weights)
    return written_config(weights, print)


def stored_weights(weights: Path) -> tuple[dict[str, Tensor], TrainState]:
    """Whole fp32 tensors by name, and how long they were trained, of what `locate` found and `stored_config` verified.

    Raises:
        CheckpointError: they cannot be read.
    """
    if weights.name == WEIGHTS_FILE:
        return read_consolidated(weights), TrainState(0, None, "", "")
    return consolidated_weights(weights), read_state(weights)


def evaluation_config(config: RunConfig) -> RunConfig:
    """A run's configuration for one process that computes in fp32."""
    train = replace(config.train, precision="fp32", backend="auto", micro_batch_size=1, global_batch_size=1)
    return replace(config, parallel=ParallelConfig(), train=train)


@torch.no_grad()
def reset_weights(loaded: LoadedModel, repetition: int = 0) -> None:
    """Give the model the random weights that the run started from: the baseline of every evaluation.

    Args:
        repetition: others, of another seed, for 1 and so on.
    """
    initialize(loaded.model, loaded.config.model, loaded.config.train.seed + repetition, 0, 1)
    for name, parameter in loaded.model.named_parameters():
        if name.endswith(".gamma"):  # layer scale: a constant, which `initialize` leaves to the layer
            parameter.fill_(loaded.config.model.vision.layer_scale)
