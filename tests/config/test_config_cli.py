"""Flags reach their settings; a repeated flag appends; help shows what is true."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_options import command_options
from lcl_mcore.commands.pretrain import PretrainOptions, parse_options
from lcl_mcore.config import arguments
from lcl_mcore.config.arguments import flags_of
from lcl_mcore.config.base import fields_of, from_dict, help_of, section_in, to_dict
from lcl_mcore.config.cli import RunOptions, parse_run
from lcl_mcore.config.recipes import RECIPES, load_recipe
from lcl_mcore.config.run_folder import read_config, write_config
from lcl_mcore.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def run_of(line: str) -> RunConfig:
    return parse_options(line.split()).run


def test_flags_reach_their_settings() -> None:
    line = "--recipe demo --data a:2 b --tp 2 --sequence-parallel --lr 0.5 --steps 7 --precision bf16"
    config = run_of(f"{line} --no-overlap --set model.vision.layers=3 --model.language.layers 1")
    assert [(s.path, s.weight) for s in config.data.sources] == [("a", 2.0), ("b", 1.0)]
    assert (config.parallel.tensor_parallel_size, config.parallel.sequence_parallel) == (2, True)
    assert (config.parallel.overlap_grad_reduce, config.parallel.overlap_param_gather) == (False, False)
    assert (config.optim.lr, config.train.steps, config.train.precision) == (0.5, 7, "bf16")
    assert (config.model.vision.layers, config.model.language.layers) == (3, 1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_resolved_configuration_starts_the_same_run_again(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    write_config(config, tmp_path)
    assert read_config(tmp_path / "config.yaml") == config
    assert run_of(f"--config {tmp_path / 'config.yaml'}") == config
    assert run_of(f"--recipe {name}") == config


SECTIONS_WITHOUT_PREFIX = ("parallel", "train", "optim", "loss")


def values(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= values(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_every_setting_has_a_flag_named_like_it() -> None:
    """Given as its own value, each flag changes nothing; `--set` and the flag are two spellings of one thing."""
    config = load_recipe("large-h14")
    flags = flags_of(PretrainOptions)
    words, assignments = [], []
    for path, value in values(to_dict(config)).items():
        if path in ("recipe", "data.sources"):
            continue
        section, _, name = path.partition(".")
        flag = "--" + (name if section in SECTIONS_WITHOUT_PREFIX else path).replace("_", "-")
        assert flags[flag].path == f"run.{path}"
        if isinstance(value, bool):
            head, dot, leaf = flag[2:].rpartition(".")
            words.append(flag if value else f"--{head}{dot}no-{leaf}")
        elif value not in (None, "", []):
            words += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
        assignments.append(f"{path}={'null' if value is None else str(value)}")
    assert len(words) > 100
    assert parse_options(["--recipe", "demo", *words]).run == dataclasses.replace(config, recipe="demo")
    again = parse_options(["--recipe", "demo", "--set", *assignments]).run
    assert again == dataclasses.replace(config, recipe="demo")


def test_short_spellings() -> None:
    """What people type: each is another name of the same setting."""
    short = {
        "--tp": "parallel.tensor_parallel_size",
        "--pp": "parallel.pipeline_parallel_size",
        "--timeout": "parallel.timeout_seconds",
        "--drop-path": "model.vision.drop_path",
        "--dropout": "model.language.dropout",
        "--tokenizer": "data.tokenizer.path",
        "--checkpoint-every": "checkpoint.every",
        "--checkpoint-minutes": "checkpoint.minutes",
        "--checkpoint-folder": "checkpoint.folder",
        "--keep": "checkpoint.keep",
        "--max-hours": "checkpoint.max_hours",
        "--log-every": "log.every",
    }
    flags = flags_of(PretrainOptions)
    assert {flag: flags[flag].path for flag in short} == {f: f"run.{path}" for f, path in short.items()}
    config = run_of(
        "--recipe demo --tp 2 --pp 3 --timeout 5 --drop-path 0.1 --dropout 0.2 --tokenizer t --checkpoint-every 7 "
        "--checkpoint-minutes 8 --checkpoint-folder s3://b/r --keep 9 --max-hours 10 --log-every 11"
    )
    found = values(to_dict(config))
    given = [2, 3, 5.0, 0.1, 0.2, "t", 7, 8.0, "s3://b/r", 9, 10.0, 11]
    assert [found[path] for path in short.values()] == given


def test_one_tensor_parallel_rank_switches_sequence_parallelism_off() -> None:
    assert load_recipe("large-h14").parallel.sequence_parallel
    assert not run_of("--recipe large-h14 --tp 1").parallel.sequence_parallel
    assert run_of("--recipe large-h14 --tp 4").parallel.sequence_parallel
    assert not run_of("--recipe large-h14 --no-sequence-parallel").parallel.sequence_parallel


def test_set_is_applied_last_and_appends() -> None:
    config = run_of("--recipe demo --set train.steps=5 log.every=6 --steps 4 --set=train.seed=7 --set train.steps=8")
    assert (config.train.steps, config.log.every, config.train.seed) == (8, 6, 7)
    words = ["data.sources=[{path: a, name: b}]", "checkpoint.folder=x", "faults.spike=off", "log.tensorboard=no"]
    config = parse_options(["--recipe", "demo", "--set", *words]).run
    assert [(s.path, s.label) for s in config.data.sources] == [("a", "b")]
    assert (config.checkpoint.folder, config.faults.spike, config.log.tensorboard) == ("x", "off", False)


def test_values_of_a_repeated_flag_append() -> None:
    config = run_of("--recipe demo --data a --steps 3 --data b:2 c --data=d")
    assert [s.label for s in config.data.sources] == ["a", "b", "c", "d"]
    config = run_of("--recipe demo --data p/A/train p/B/train:2 --data q/B/train/ s3://C/train --data r/val")
    assert [s.label for s in config.data.sources] == ["A/train", "p/B/train", "q/B/train", "C/train", "val"]
    assert from_dict(RunConfig, to_dict(config)).data.sources == config.data.sources
    config = run_of("--recipe demo --pp 3 --stage-layers 0 --stage-layers 1 1")
    assert config.parallel.stage_layers == (0, 1, 1)
    assert run_of("--recipe demo --stage-layers none").parallel.stage_layers is None
    assert run_of("--recipe paper-l14 --model.vision.layer-scale none").model.vision.layer_scale is None


def printed_help(tool: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *words, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split())


def test_help_shows_recipes_sections_and_real_values() -> None:
    text = printed_help("pretrain_lcl.py", "--recipe", "paper-l14")
    for part in (
        "Pre-train a vision encoder by latent compression learning.",
        "Defaults are those of recipe paper-l14.",
        f"Start from a named recipe (docs/recipes.md): {', '.join(RECIPES)}.",
        "parallel options How the job's processes share the work.",
        "--tp INT, --tensor-parallel-size INT Ranks that share each layer; 1 switches tensor parallelism off.",
        "--global-batch-size INT Packed sequences per optimizer step over all data-parallel ranks. (default: 12288)",
        "--lr FLOAT Peak learning rate. (default: 0.0003)",
        "--drop-path FLOAT, --model.vision.drop-path FLOAT",
        "--model.vision.layers INT Transformer layers. (default: 24)",
        "--data.crop-scale FLOAT FLOAT",
        "(default: 0.9 1.0)",
        "--precision {fp32,bf16,fp8}",
        "(default: bf16)",
        "--out PATH Folder of the run; by default runs/RECIPE. --resume",
    ):
        assert part in text, part
    assert "(default: None)" not in text
    assert "Defaults are those of no recipe; with --recipe NAME its own are shown." in printed_help("pretrain_lcl.py")


@pytest.mark.parametrize("name", command_options())
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All flags are there, each with its help, and with a real default where it has one."""
    cls = command_options()[name]
    for owner in sections(cls):
        for field in fields_of(owner):
            assert (
                help_of(owner, field)
                or section_in(fields_of(owner)[field].annotation)
                or field in ("recipe", "packages")
            ), field
    with pytest.raises(SystemExit) as caught:
        arguments.parse(cls, ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    shown = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))
    assert {flag for flag in flags_of(cls) if not re.search(r"--(.*\.)?no-", flag)} <= shown | {"--no-baselines"}
    assert "(default: None)" not in text


def sections(cls: type) -> Iterator[type]:
    """The class and the classes of its sections, however deep."""
    yield cls
    for field in fields_of(cls).values():
        section = section_in(field.annotation)
        if section is not None:
            yield from sections(section)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['pretrain_lcl.py', '--help']\n"
        f"try:\n    runpy.run_path({str(ROOT / 'tools' / 'pretrain_lcl.py')!r}, run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'megatron', 'numpy', 'fsspec', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


SEQUENCES = {
    (name, flag) for name, cls in command_options().items() for flag, field in flags_of(cls).items() if field.appends
}


def test_the_flags_that_take_any_number_of_values() -> None:
    """Which they are, so that a new one is met by the test below with values that it accepts."""
    runs = {
        (name, flag)
        for name in ("describe.DescribeOptions", "plan.PlanOptions", "pretrain.PretrainOptions")
        for flag in ("--set", "--stage-layers", "--faults.skip-batches")
    }
    assert runs | {("pretrain.PretrainOptions", "--data"), ("export.ExportOptions", "--formats")} == SEQUENCES


VALUES = {
    "--set": ["train.steps=7", "log.every=3", "train.seed=2"],
    "--stage-layers": ["0", "1", "1"],
    "--faults.skip-batches": ["1", "2", "5", "9"],
    "--data": ["a:2", "b", "c"],
    "--formats": ["timm", "full", "released"],
}
REST = {
    "describe.DescribeOptions": "--recipe demo --pp 3",
    "plan.PlanOptions": "--recipe demo --pp 3 --gpus 3",
    "pretrain.PretrainOptions": "--recipe demo --pp 3",
    "export.ExportOptions": "--out o m",
}


@pytest.mark.parametrize(("name", "flag"), sorted(SEQUENCES))
def test_repeating_a_flag_appends(name: str, flag: str) -> None:
    """In one go, one by one, with other flags between, and with `=`: the same options."""
    cls, rest, given = command_options()[name], REST[name].split(), VALUES[flag]

    def parse(*words: str) -> Any:
        return parse_run(cls, words) if issubclass(cls, RunOptions) else arguments.parse(cls, words)

    together = parse(*rest, flag, *given)
    assert together != parse(*rest)
    assert parse(flag, given[0], *rest, *(word for value in given[1:] for word in (flag, value))) == together
    assert parse(*rest, *(f"{flag}={value}" for value in given)) == together
    assert parse(*rest, flag, *given[:2], f"{flag}={given[2]}", flag, *given[3:]) == together


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_values_survive_every_way_of_typing_them(data: st.DataObject) -> None:
    """Any command, any flag that takes several values: divided at random, with a space or `=`, among the others."""
    name, flag = data.draw(st.sampled_from(sorted(SEQUENCES)))
    cls, left = command_options()[name], VALUES[flag]

    def parse(words: list[str]) -> Any:
        return parse_run(cls, words) if issubclass(cls, RunOptions) else arguments.parse(cls, words)

    others = [part.split() for part in re.findall(r"--[^-]*", REST[name])]
    expected = parse([*REST[name].split(), flag, *left])
    place, line = 0, list[str]()
    while left:
        following = data.draw(st.integers(place, len(others)))
        line += [word for part in others[place:following] for word in part]
        place, count = following, data.draw(st.integers(1, len(left)))
        spelled = data.draw(st.sampled_from([flag, "--" + flag[2:].replace("-", "_")]))
        one = count == 1 and data.draw(st.booleans())
        line += [f"{spelled}={left[0]}"] if one else [spelled, *left[:count]]
        left = left[count:]
    line += [word for part in others[place:] for word in part]
    assert parse(line) == expected
