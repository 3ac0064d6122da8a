"""The folder of a run: its resolved configuration, and the rules for starting it again."""

from __future__ import annotations

import hashlib
import json
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from lcl_mcore.config.base import fields_of, from_dict, shown, to_dict
from lcl_mcore.config.recipes import RECIPES, load_recipe, with_source_options
from lcl_mcore.config.renamed import with_current_names
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.storage import atomic_write
from lcl_mcore.untrusted import MAX_YAML_BYTES, BadYamlError, parse_yaml, read_regular

FILE = "config.yaml"

RECORDS = ("metrics.jsonl", "events.jsonl", "tensorboard")
"""What a run writes of its steps, beside its checkpoints."""

_IMPLEMENTATIONS = frozenset(
    f"loss.{name}" for name in ("contrastive_impl", "contrastive_precision", "contrastive_schedule", "generation_impl")
)
"""Settings of the objective that say how it is computed, not what it is."""


def config_digest(config: RunConfig) -> str:
    """Short digest of the whole configuration."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def read_config(path: Path) -> RunConfig:
    """Load a configuration file.

    The file of a run holds every setting. A file by hand may hold only some: with `recipe: NAME` they are merged over
    that recipe, else over the defaults. Names of earlier versions are understood.

    Raises:
        ConfigError: unreadable, not YAML, or not a valid configuration.
    """
    try:
        data = parse_yaml(read_regular(path, MAX_YAML_BYTES))
    except OSError as error:
        raise ConfigError(
            explain(path, f"cannot be read ({error.strerror})", "Give the path of a config.yaml.")
        ) from None
    except BadYamlError as error:
        where = f"{path}, line {error.line}" if error.line else path
        raise ConfigError(explain(where, str(error), "Correct the file.")) from None
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ConfigError(explain(path, "does not hold a configuration", "Start from a run's config.yaml."))
    try:
        data = with_source_options(_completed(with_current_names(data)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return from_dict(RunConfig, data, str(path))


def _completed(data: dict[str, Any]) -> dict[str, Any]:
    """The file's values over its recipe, if it names one; a file that holds every section may name any."""
    recipe = data.get("recipe", "custom")
    whole = fields_of(RunConfig).keys() <= data.keys()
    if not isinstance(recipe, str) or (recipe not in RECIPES and (whole or recipe == "custom")):
        return data
    return merged(to_dict(load_recipe(recipe)), data)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` over it, section by section; lists are replaced whole."""
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def config_text(config: RunConfig) -> str:
    """The fully resolved configuration, as `config.yaml` has it."""
    text: str = yaml.safe_dump(to_dict(config), sort_keys=False)
    return text


def write_config(config: RunConfig, folder: Path) -> None:
    """Save the fully resolved configuration as `config.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / FILE, config_text(config))


def differences(before: RunConfig, now: RunConfig) -> dict[str, str]:
    """The settings that differ, by path: `12 -> 8`."""
    old, new = _flat(to_dict(before)), _flat(to_dict(now))
    paths = [*new, *(path for path in old if path not in new)]
    return {
        path: f"{shown(old.get(path))} -> {shown(new.get(path))}" for path in paths if old.get(path) != new.get(path)
    }


def changes_of_recipe(config: RunConfig) -> dict[str, str]:
    """`differences` from the recipe of its name, or from the defaults if it has none; data sets do not count."""
    base = to_dict(load_recipe(config.recipe) if config.recipe in RECIPES else RunConfig())
    sources = [{"path": source.path, "weight": source.weight, "name": source.name} for source in config.data.sources]
    base |= {"recipe": config.recipe, "data": base["data"] | {"sources": sources}}
    return differences(from_dict(RunConfig, with_source_options(base)), config)


def change_of_model_or_objective(changes: dict[str, str]) -> str:
    """Those of the `differences` that make another model or objective, as one line: weights must not change sides."""
    return listed(
        {p: change for p, change in changes.items() if p.startswith(("model.", "loss.")) and p not in _IMPLEMENTATIONS}
    )


def listed(changes: dict[str, str]) -> str:
    """`differences` in one line."""
    return ", ".join(f"{path} {change}" for path, change in changes.items())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its path; lists stay whole but for those of sections."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): part for number, part in enumerate(value)}
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse to mix a new run into the folder of an old one.

    Raises:
        ConfigError: the folder holds checkpoints and `--resume` was not given.
    """
    held = folder / "checkpoints"
    if not resume and held.is_dir() and any(held.iterdir()):
        raise ConfigError(
            explain(
                folder,
                "already holds the checkpoints of a run",
                "Add --resume to continue it, or --start-over, or choose another --out.",
            )
        )


def set_records_aside(folder: Path) -> None:
    """Rename what an earlier run wrote beside its checkpoints (`former-metrics.jsonl`, `former-metrics.jsonl.1`, ...).

    Raises:
        ConfigError: something cannot be renamed.
    """
    for name in RECORDS:
        if (folder / name).exists():
            names = (f"former-{name}" + (f".{number}" if number else "") for number in count())
            aside = next(aside for aside in names if not (folder / aside).exists())
            try:
                (folder / name).rename(folder / aside)
            except OSError as error:
                problem = f"cannot be renamed ({error.strerror})"
                raise ConfigError(explain(folder / name, problem, "Mend that, or choose another --out.")) from error
