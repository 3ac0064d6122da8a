"""Settings that had another name before: old files and command lines are still understood."""

from __future__ import annotations

from typing import Any

from lcl_mcore.config.base import require

RENAMED = {
    "parallel.tensor": "parallel.tensor_parallel_size",
    "parallel.pipeline": "parallel.pipeline_parallel_size",
    "parallel.sequence": "parallel.sequence_parallel",
    "parallel.vision": "parallel.vision_parallel",
    "parallel.fuse_gradients": "parallel.gradient_accumulation_fusion",
    "loss.mean": "loss.averaging",
    "optim.backend": "optim.optimizer_backend",
    "data.packing_rows": "data.packing_buffer",
}
"""Old path -> path."""

SOURCE_VALUES = {"cut_rule": {"pieces": "segments"}}
"""Setting of a data source -> old value -> value."""

WITHDRAWN: dict[str, tuple[Any, str]] = {
    "parallel.context": (1, "Leave it out: there is no context parallelism."),
    "parallel.overlap_tensor": (
        False,
        "Leave it out: --no-overlap-grad-reduce and --no-overlap-param-gather are what can be chosen.",
    ),
}
"""Path of a setting that only ever had one accepted value -> that value, and the remedy for another one."""


def with_current_names(tree: dict[str, Any]) -> dict[str, Any]:
    """A configuration's nested dict with today's names.

    Raises:
        ConfigError: a withdrawn setting has another value than the one it still stands for.
    """
    result = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if isinstance(result.get(section), dict) and name in result[section]:
            result[section][new.partition(".")[2]] = result[section].pop(name)
    for path, (only, remedy) in WITHDRAWN.items():
        section, _, name = path.partition(".")
        if isinstance(result.get(section), dict) and name in result[section]:
            value = result[section].pop(name)
            same = str(value).lower() == str(only).lower()  # --set gives text
            require(same, f"{path} = {value}", "no longer exists", remedy)
    data = result.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        data["sources"] = [_source_with_current_values(source) for source in data["sources"]]
    return _with_former_embedding_dropout(result)


def _with_former_embedding_dropout(tree: dict[str, Any]) -> dict[str, Any]:
    """Before 0.2.0 `dropout` was on embeddings too. A file from then holds every other setting of the LM."""
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(language := model.get("language"), dict):
        return tree
    if not {"dropout", "norm_eps", "init"} <= language.keys():
        return tree
    return tree | {"model": model | {"language": {"embedding_dropout": language["dropout"]} | language}}


def _source_with_current_values(source: Any) -> Any:
    if not isinstance(source, dict):
        return source
    return source | {name: values[source[name]] for name, values in SOURCE_VALUES.items() if source.get(name) in values}
