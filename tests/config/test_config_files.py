"""Configuration files: those of earlier versions, and those that hold only some settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.base import to_dict
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.config.schema import OptimConfig, RunConfig, TrainConfig

OLD = Path(__file__).parent / "config-02e64cf.yaml"


def test_a_file_of_an_earlier_version_is_the_same_run() -> None:
    """Written by commit 02e64cf from the same flags, with every setting that has another name now.

    It goes on with what the recipe was then: other packing, documents without images, dropout on embeddings.
    """
    words = "--recipe large-g14 --tp 4 --data a:2 b --tokenizer t --no-overlap --averaging rank"
    words += " --optimizer-backend torch --vision-parallel tensor --no-gradient-accumulation-fusion"
    words += " --faults.skip-batches 3 7 --data.packing best_fit --model.language.embedding-dropout 0.1"
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
