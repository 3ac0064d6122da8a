"""Configuration files: those of earlier versions, and those that hold only some settings."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.base import from_dict, to_dict
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.config.run_folder import change_of_model_or_objective, changes_of_recipe, differences, read_config
from lcl_mcore.config.schema import OptimConfig, RunConfig, TrainConfig

OLD = Path(__file__).parent / "config-02e64cf.yaml"


def test_a_file_of_an_earlier_version_is_the_same_run() -> None:
    """Written by commit 02e64cf from the same flags, with every setting that has another name now.

    It goes on with what the recipe was then: other packing, documents without images, dropout on
    embeddings, another layer scale.
    """
    words = "--recipe large-g14 --tp 4 --data a:2 b --tokenizer t --no-overlap --averaging rank"
    words += " --optimizer-backend torch --vision-parallel tensor --no-gradient-accumulation-fusion"
    words += " --faults.skip-batches 3 7 --data.packing best_fit --model.language.embedding-dropout 0.1"
    words += " --model.vision.layer-scale 1e-5 --data.decode-threads 2"
    expected = parse_options(words.split()).run
    sources = tuple(dataclasses.replace(source, min_images=0) for source in expected.data.sources)
    expected = dataclasses.replace(expected, data=dataclasses.replace(expected.data, sources=sources))
    assert read_config(OLD) == expected
    assert parse_options(["--config", str(OLD)]).run == expected
    assert "tensor_parallel_size" not in OLD.read_text()
    assert expected.parallel.sequence_parallel


def test_old_names_on_the_command_line() -> None:
    old = "parallel.tensor=2 parallel.pipeline=2 parallel.sequence=true parallel.vision=data parallel.context=1"
    old += " parallel.overlap_tensor=false parallel.fuse_gradients=false loss.mean=rank optim.backend=torch"
    config = parse_options(["--recipe", "demo", "--set", *old.split()]).run
    new = "--recipe demo --tp 2 --pp 2 --sequence-parallel --vision-parallel data --no-gradient-accumulation-fusion"
    assert config == parse_options([*new.split(), "--averaging", "rank", "--optimizer-backend", "torch"]).run


def test_some_settings_are_merged_over_the_named_recipe(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("recipe: paper-l14\ntrain: {steps: 7}\nmodel: {vision: {layers: 2}}\n")
    recipe = load_recipe("paper-l14")
    vision = dataclasses.replace(recipe.model.vision, layers=2)
    assert read_config(path) == dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, steps=7), model=dataclasses.replace(recipe.model, vision=vision)
    )
    path.write_text("train: {steps: 7}\n")
    assert read_config(path) == RunConfig(train=TrainConfig(steps=7))
    path.write_text("recipe: custom\noptim: {lr: 1.0}\n")
    assert read_config(path) == RunConfig(optim=OptimConfig(lr=1.0))


def test_a_whole_file_keeps_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    config = dataclasses.replace(load_recipe("demo"), recipe="my-own")
    path.write_text(yaml.safe_dump(to_dict(config)))
    assert read_config(path) == config


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


CHANGES = {
    "recipe": "other",
    "model.vision.heads": 2,
    "model.vision.drop_path": 0.5,
    "model.language.activation": "gelu",
    "model.language.init": "clip_text",
    "model.pool_heads": 8,
    "data.context_rule": "index0",
    "data.crop_scale": [0.5, 1.0],
    "loss.contrastive_weight": 0.25,
    "loss.negatives": "micro_batch",
    "loss.contrastive_impl": "tiled",
    "loss.contrastive_precision": "fp32",
    "loss.contrastive_schedule": "gather_both",
    "loss.generation_impl": "chunked",
    "optim.lr": 0.5,
    "parallel.stage_layers": [2],
    "train.precision": "bf16",
    "checkpoint.folder": "s3://b/r",
    "faults.skip_batches": [[1, 2], [5, 9]],
}
"""Another valid value than the demo's, for settings of every section and kind."""


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(CHANGES))))
def test_differences_are_exactly_what_was_changed(paths: set[str]) -> None:
    base = load_recipe("demo")
    tree = to_dict(base)
    old = leaves(tree)
    for path in paths:
        *sections, name = path.split(".")
        functools.reduce(lambda node, section: node[section], sections, tree)[name] = CHANGES[path]
    found = differences(base, from_dict(RunConfig, tree))
    assert found == {path: f"{old[path]} -> {CHANGES[path]}" for path in paths}
    named = change_of_model_or_objective(found)
    implementations = {"loss.contrastive_impl", "loss.contrastive_precision", "loss.contrastive_schedule"}
    meant = {path for path in paths if path.startswith(("model.", "loss."))} - implementations
    assert {part.split(" ")[0] for part in named.split(", ") if part} - set("29") == meant - {"loss.generation_impl"}


def test_every_setting_of_model_and_objective_counts() -> None:
    """A new one is compared without being named anywhere; those that do not count are listed here."""
    paths = [path for path in leaves(to_dict(RunConfig())) if path.startswith(("model.", "loss."))]
    assert len(paths) > 30
    free = [path for path in paths if not change_of_model_or_objective({path: "1 -> 2"})]
    assert free == [
        "loss.contrastive_impl",
        "loss.contrastive_precision",
        "loss.contrastive_schedule",
        "loss.generation_impl",
    ]


def test_sources_are_compared_setting_by_setting() -> None:
    one, two = (parse_options(["--recipe", "demo", "--data", *words]).run for words in (["a:2", "b"], ["a", "b", "c"]))
    assert differences(one, two)["data.sources.0.weight"] == "2.0 -> 1.0"
    assert differences(one, two)["data.sources.2.path"] == "None -> c"
    assert "data.sources.1.path" not in differences(one, two)


def test_changes_of_the_recipe_are_the_settings_and_not_the_data() -> None:
    for name in RECIPES:
        assert changes_of_recipe(parse_options(["--recipe", name, "--data", "a:2", "b"]).run) == {}
    config = parse_options(["--recipe", "paper-b16", "--data", "a", "--lr", "0.5", "--tokenizer", "t"]).run
    assert changes_of_recipe(config) == {"data.tokenizer.path": "facebook/opt-125m -> t", "optim.lr": "0.0003 -> 0.5"}
    source = dataclasses.replace(config.data.sources[0], min_similarity=0.5)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(source,)))
    assert changes_of_recipe(config)["data.sources.0.min_similarity"] == "0.24 -> 0.5"
    assert changes_of_recipe(RunConfig(train=TrainConfig(steps=7))) == {"train.steps": "1000 -> 7"}
