"""`model.safetensors`: the consolidated state dict of a model, written, read, and loaded into any layout.

A consolidated state dict maps every parameter name of an `LclModel` on one pipeline stage to its whole tensor, as one
tensor-parallel rank holds it, with the vocabulary unpadded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcl_mcore.checkpoint.shards import current_name
from lcl_mcore.checkpoint.tensor_files import require_sound_safetensors
from lcl_mcore.config.base import to_dict
from lcl_mcore.config.schema import ModelConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.storage import atomic_file
from lcl_mcore.untrusted import BadJsonError, parse_object

FILE = "model.safetensors"
VOCABULARY = ("language.token_embedding.weight", "language.head")
"""Parameters whose rows are the vocabulary; layouts pad them differently."""
_FORMAT = "lcl_mcore full state 1"  # written in every such file since the first


_SHOWN = 6


def misfit(what: str, problems: Sequence[str], remedy: str) -> CheckpointError:
    """The error for tensors that do not fit a model; the first problems are named."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    shown = "; ".join([*problems[:_SHOWN], *more])
    return CheckpointError(explain(what, f"do not fit this model ({shown})", remedy))


def without_vocabulary_padding(state: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The same state dict with the rows from `vocab_size` on cut off: they belong to a layout, not to the model."""
    return {name: x[:vocab_size] if name in VOCABULARY else x for name, x in state.items()}


def consolidated_state(model: LclModel) -> dict[str, Tensor]:
    """Every parameter of an fp32 model in one process, whole, on the CPU, without vocabulary padding."""
    state = {name: p.detach().cpu() for name, p in model.named_parameters()}
    return without_vocabulary_padding(state, model.shape.language.vocab_size)


def tensor_parallel_share(whole: Tensor, parameter: Tensor, tp_rank: int, tp_size: int) -> Tensor:
    """The block of a whole tensor that a parameter holds on this rank."""
    if tp_size > 1 and getattr(parameter, "tensor_model_parallel", False):
        return whole.chunk(tp_size, getattr(parameter, "partition_dim", 0))[tp_rank]
    return whole


@torch.no_grad()
def load_consolidated(model: LclModel, state: Mapping[str, Tensor], tp_rank: int, tp_size: int) -> None:
    """Copy this rank's share of a consolidated state dict into an `LclModel`, whole or one stage of a pipeline.

    Padding rows of the vocabulary become zero. Call it before the parameters are rounded, see `build.cast`.

    Raises:
        CheckpointError: names or shapes differ; the model is then unchanged.
    """
    parameters = {model.canonical_name(name): p for name, p in model.named_parameters()}
    problems = [f"missing: {name}" for name in parameters if name not in state]
    if model.stage.count == 1:  # the other stages of a pipeline take the rest
        problems += [f"unexpected: {name}" for name in sorted(set(state) - set(parameters))]
    shares = {}
    for name, parameter in parameters.items():
        if name not in state:
            continue
        whole, size = state[name], list(parameter.shape)
        if tp_size > 1 and getattr(parameter, "tensor_model_parallel", False):
            size[getattr(parameter, "partition_dim", 0)] *= tp_size
        if name in VOCABULARY and whole.shape[0] < size[0]:
            whole = torch.cat((whole, whole.new_zeros(size[0] - whole.shape[0], *whole.shape[1:])))
        if list(whole.shape) != size:
            problems.append(f"shape: {name} is {tuple(whole.shape)}, the model has {tuple(size)}")
            continue
        shares[name] = tensor_parallel_share(whole, parameter, tp_rank, tp_size)
    if problems:
        raise misfit("weights", problems, "Use the config.yaml beside it.")
    for name, share in shares.items():
        parameters[name].copy_(share)


def write_consolidated(state: Mapping[str, Tensor], shape: ModelConfig, folder: Path) -> Path:
    """Write FOLDER/model.safetensors, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    metadata = {"format": _FORMAT, "model": json.dumps(to_dict(shape))}
    try:
        with atomic_file(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain(path, f"cannot be written ({error})", "Free or enlarge the disk.")) from None
    return path


def read_consolidated(path: Path) -> dict[str, Tensor]:
    """Consolidated fp32 state dict from `model.safetensors`, or from the folder that holds it.

    Raises:
        CheckpointError: missing, damaged, or another kind of file.
    """
    file = _file(path)
    require_sound_safetensors(file)
    try:
        with safe_open(file, "pt") as stored:
            metadata: dict[str, Any] = stored.metadata() or {}
            if metadata.get("format") != _FORMAT:
                rule = f"was not written as `{_FORMAT}`"
                raise CheckpointError(explain(file, rule, "Use tools/import_released.py to make one."))
            names = stored.keys()
            return {current_name(name): stored.get_tensor(name).float() for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(explain(file, f"cannot be read ({error})", "Check the path, or make it again.")) from None


_NOT_THE_FUNCTION = re.compile(r"image_size|layer_scale|drop|init")


def require_same_model(path: Path, shape: ModelConfig) -> None:
    """Refuse a `model.safetensors` of another model, whether or not its tensors have the same shapes.

    What changes the start of training alone is not compared, nor is the image size, to which positions are fitted.

    Raises:
        CheckpointError: another number of heads, activation, epsilon or size is written in it.
    """
    file = _file(path)
    with safe_open(file, "pt") as stored:
        text = (stored.metadata() or {}).get("model", "{}")
    try:
        written = dict(_leaves(parse_object(text)))
    except (BadJsonError, RecursionError) as error:
        raise CheckpointError(explain(file, f"cannot be read (model: {error})", "Make it again.")) from None
    ours = dict(_leaves(to_dict(shape)))
    for name in sorted(written.keys() & ours.keys()):
        if written[name] != ours[name] and not _NOT_THE_FUNCTION.search(name):
            rule = f"this model has {ours[name]}"
            raise CheckpointError(
                explain(f"{file}: model.{name} = {written[name]}", rule, "Use the config.yaml beside it.")
            )


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield path + name, value


def is_consolidated(path: Path) -> bool:
    """Whether this is a `model.safetensors` of ours, or a folder with one."""
    try:
        require_sound_safetensors(_file(path))
        with safe_open(_file(path), "pt") as stored:
            return (stored.metadata() or {}).get("format", "").startswith("lcl_mcore")
    except (CheckpointError, OSError, SafetensorError):
        return False


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path
