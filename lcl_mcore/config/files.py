"""The folder of a run: its resolved configuration, and the rule for starting it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from lcl_mcore.config.base import from_dict, to_dict
from lcl_mcore.config.run import RunConfig
from lcl_mcore.errors import ConfigError, explain

FILE = "config.yaml"


def config_digest(config: RunConfig) -> str:
    """Short digest of the whole configuration."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def read_config(path: Path) -> RunConfig:
    """Load a configuration file.

    Raises:
        ConfigError: unreadable, not YAML, or not a valid configuration.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            explain(path, f"cannot be read ({error.strerror})", "Give the path of a config.yaml.")
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(explain(path, f"is not YAML: {error}", "Correct the file.")) from None
    if not isinstance(data, dict):
        raise ConfigError(explain(path, "does not hold a configuration", "Start from a run's config.yaml."))
    return from_dict(RunConfig, data, str(path))


def write_config(config: RunConfig, folder: Path) -> None:
    """Save the fully resolved configuration as `config.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_dict(config), sort_keys=False)
    partial = folder / (FILE + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(folder / FILE)


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
                "Add --resume to continue it, or choose another --out.",
            )
        )
