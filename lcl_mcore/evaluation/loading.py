"""A trained model in one process, from whatever holds one: a run, a checkpoint of any layout, a full-state file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lcl_mcore.build import build_model
from lcl_mcore.checkpoint.manager import TrainState, complete_checkpoints, load_weights
from lcl_mcore.config.files import FILE as CONFIG_FILE
from lcl_mcore.config.files import read_config
from lcl_mcore.config.run import ParallelConfig, RunConfig
from lcl_mcore.data.tokenizer import Tokenizer, build_tokenizer
from lcl_mcore.distributed.context import Context, start
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.interop.released import FILE as STATE_FILE
from lcl_mcore.interop.released import load_full_state, read_full_state
from lcl_mcore.models.init import initialize
from lcl_mcore.models.lcl import LclModel


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and where they came from.

    folder   holds `config.yaml`
    weights  the checkpoint or file that was read
    state    steps, images and data position; zeros for a full-state file
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

    def facts(self) -> dict[str, Any]:
        """What every result says about the model that it belongs to."""
        return {
            "weights": str(self.weights),
            "recipe": self.config.recipe,
            "steps": self.state.step,
            "images_seen": self.state.images_seen,
            "hardware": self.context.device.name,
        }


def single_process_config(run: Path) -> RunConfig:
    """The run's configuration for evaluation in one process."""
    config = read_config(run / CONFIG_FILE)
    precision = "bf16" if config.train.precision == "fp8" else config.train.precision
    train = replace(config.train, precision=precision, global_batch_size=config.train.micro_batch_size)
    return replace(config, parallel=ParallelConfig(), train=train)


def locate(path: Path) -> tuple[Path, Path]:
    """Folder with the configuration, and weights, of a run, one of its checkpoints, or an imported model.

    Raises:
        CheckpointError: there is no complete checkpoint or full-state file.
    """
    if (path / "state.json").is_file():
        return path.resolve().parent.parent, path
    if (path / STATE_FILE).is_file():
        return path, path / STATE_FILE
    checkpoints = complete_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise CheckpointError(
            explain(path, "has no complete checkpoint", "Train first, or give another folder.")
        )
    return path, checkpoints[-1]


def open_model(path: Path, context: Context | None = None) -> LoadedModel:
    """Build the model in this process and load its weights, in the run's precision; ready to evaluate.

    Args:
        context: a process group that was joined before; None joins one of a single process.

    Raises:
        CheckpointError: nothing to load, or it is damaged.
        ConfigError: the configuration beside it is missing or invalid.
    """
    folder, weights = locate(path)
    config = single_process_config(folder)
    context = context or start(config, folder)
    model = build_model(config, context)
    if weights.name == STATE_FILE:
        load_full_state(model, read_full_state(weights), 0, 1)
        state = TrainState(0, None, "", "")
    else:
        state = load_weights(weights, model)
    model.eval()
    return LoadedModel(config, model, context, folder, weights, state)


def reset_weights(opened: LoadedModel) -> None:
    """Back to the random weights that the run started from: the baseline of every probe."""
    initialize(opened.model, opened.config.model, opened.config.train.seed, 0, 1)


def data_fingerprints(config: RunConfig) -> dict[str, str]:
    """Fingerprint of every prepared data set of a run that is still where it was; others are named as gone."""
    found = {}
    for source in config.data.sources:
        manifest = Path(source.path) / "dataset.json"
        if manifest.is_file():
            found[source.label] = str(json.loads(manifest.read_text("utf-8")).get("fingerprint", "?"))
        else:
            found[source.label] = "not on this machine"
    return found


def full_state(model: LclModel) -> dict[str, Tensor]:
    """Every parameter, whole and fp32, the vocabulary's padding cut off."""
    rows = model.shape.language.vocab_size
    state = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    for name in ("language.token_embedding.weight", "language.head"):
        if name in state:
            state[name] = state[name][:rows]
    return state
