"""A training configuration from the command line: a recipe or a file, with flags over it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass, from_dict, require
from lcl_mcore.config.recipes import RECIPES, load_recipe, with_source_options
from lcl_mcore.config.renamed import with_current_names
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.config.schema import RunConfig
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.untrusted import BadYamlError, parse_yaml


@config_dataclass
class RunOptions:
    """What every command that works on a training configuration has: subclasses add their own options."""

    recipe: Annotated[
        str | None,
        tyro.conf.arg(metavar="NAME", help=f"Start from a named recipe (docs/recipes.md): {', '.join(RECIPES)}."),
    ] = None
    config: Path | None = None
    """Start from a configuration file, for example the config.yaml of an earlier run."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE ...")] = ()
    """The settings below by their names in config.yaml: --set model.vision.layers=6 is --model.vision.layers 6."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


Options = TypeVar("Options", bound=RunOptions)

_SHORT = {
    "--overlap": ("--overlap-grad-reduce", "--overlap-param-gather"),
    "--no-overlap": ("--no-overlap-grad-reduce", "--no-overlap-param-gather"),
}
"""One word for several flags."""


def parse_run(cls: type[Options], words: Sequence[str] | None = None) -> Options:
    """Read a command line whose flags change a recipe or a file.

    In this order, later over earlier: the recipe or file, the flags, `--set`.

    Args:
        cls: the command's options; `run` is the training configuration. A field `data` of PATH[:WEIGHT] gives its data
            sources.
        words: the command line; None: that of this process.

    Raises:
        ConfigError: neither or both of --recipe and --config, or a value or combination is refused.
    """
    words = [
        part
        for word in (sys.argv[1:] if words is None else words)
        for part in _SHORT.get(word.replace("_", "-"), (word,))
    ]
    base, name = _base(words)
    about = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nDefaults are those of {name}."
    tree = arguments.parse_unchecked(cls, words, about, {RunConfig: base}).tree()
    require(
        (tree["recipe"] is None) != (tree["config"] is None),
        f"{'both' if tree['recipe'] else 'neither'} of --recipe and --config",
        "exactly one says what to run",
        "For a first try: --recipe demo.",
    )
    run: dict[str, Any] = tree["run"]
    if base.parallel.sequence_parallel and "--sequence-parallel" not in words:
        # A recipe's choice that only makes sense with more than one tensor-parallel rank.
        run["parallel"]["sequence_parallel"] &= str(run["parallel"]["tensor_parallel_size"]) != "1"
    if tree.get("data"):
        run["data"]["sources"] = [_source(text) for text in tree["data"]]
    for assignment in tree["set"]:
        _assign(run, assignment)
    tree["run"] = from_dict(RunConfig, with_source_options(with_current_names(run)))
    return arguments.checked(cls, tree)


def _base(words: Sequence[str]) -> tuple[RunConfig, str]:
    """What the flags change, and what it is called."""
    recipe, file = arguments.last_value(words, "--recipe"), arguments.last_value(words, "--config")
    if recipe is not None:
        return load_recipe(recipe), f"recipe {recipe}"
    if file is not None:
        return read_config(Path(file)), file
    return RunConfig(), "no recipe; with --recipe NAME its own are shown"


def _assign(tree: dict[str, Any], assignment: str) -> None:
    """Carry out PATH=VALUE. Lists, mappings and null are read as YAML; other text is converted as the type asks for."""
    path, separator, text = assignment.partition("=")
    require(
        bool(separator),
        f"--set {assignment}",
        "an assignment reads PATH=VALUE",
        "For example --set model.vision.layers=6.",
    )
    value: Any = text
    if text in ("null", "~") or text[:1] in ("[", "{"):
        try:
            value = parse_yaml(text)
        except BadYamlError as error:
            raise ConfigError(explain(f"--set {assignment[:200]}", f"the value {error}", "Correct it.")) from None
    *sections, name = path.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[name] = value


def _source(text: str) -> dict[str, Any]:
    """A data source from PATH or PATH:WEIGHT."""
    path, separator, weight = text.rpartition(":")
    if separator and weight.replace(".", "", 1).isdigit():
        return {"path": path, "weight": float(weight)}
    return {"path": text}
