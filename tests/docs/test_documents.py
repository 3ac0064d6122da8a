"""The documents say what is true: their commands work, their options, settings, files and links exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from command_options import command_options  # noqa: E402
from doc_commands import DOCUMENTS, ROOT, Text, commands, links, options, settings, take_apart  # noqa: E402
from docs_workspace import build  # noqa: E402
from documented import ENTRIES, Entry  # noqa: E402

Result = dict[str, Any]


@pytest.fixture(scope="module")
def texts() -> dict[str, Text]:
    return {str(path.relative_to(ROOT)): take_apart(path.read_text(encoding="utf-8")) for path in DOCUMENTS}


# --- commands


def test_every_command_has_one_entry_and_every_entry_a_command(texts: dict[str, Text]) -> None:
    places: dict[str, set[str]] = {}
    for name, text in texts.items():
        for command in commands(text):
            places.setdefault(command, set()).add(name)
    entries = Counter(" ".join(entry.command.split()) for entry in ENTRIES)
    assert {command: n for command, n in entries.items() if n > 1} == {}
    new = {command: sorted(where) for command, where in places.items() if command not in entries}
    assert not new, f"add to tests/docs/documented.py how these are shown to work: {new}"
    assert sorted(entries.keys() - places.keys()) == [], "in no document any more"
    for entry in ENTRIES:
        assert entry.run is not None or entry.until or entry.by, entry.command


def variants(entry: Entry) -> Iterator[list[str]]:
    """The command's words, with every stand-in for its placeholders."""
    words = shlex.split(entry.command)
    tried = max((len(values) for _, values in entry.words), default=1)
    for n in range(tried):
        stand_ins = {name: values[n % len(values)] for name, values in entry.words}
        yield [stand_ins.get(word, word) for word in words]


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[Entry, Result]]]:
    """All commands that are run or read, in the order of the table, in one workspace and one process."""
    workspace = tmp_path_factory.mktemp("documents")
    build(workspace)
    jobs: list[Result] = []
    entries: list[Entry] = []
    for entry in ENTRIES:
        if entry.run is None and not entry.until:
            continue
        for words in variants(entry):
            for world in entry.worlds:
                jobs.append({"words": [*words, *(entry.run or ())], "until": entry.until, "world": world})
                entries.append(entry)
    demo = Entry("python examples/demo/run.py")
    jobs.append({"words": demo.command.split(), "until": "steps", "world": 1})
    (workspace / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(HERE / "docs_worker.py"), str(workspace), str(workspace / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return workspace, list(zip([*entries, demo], results, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(820)
def test_commands_work(carried_out: tuple[Path, list[tuple[Entry, Result]]]) -> None:
    workspace, results = carried_out
    ran = 0
    for entry, result in results:
        about = f"{entry.command}\n{result['output'][-3000:]}"
        if entry.run is not None:
            assert result["code"] in (None, 0), about
            assert "Traceback" not in result["output"], about
            assert entry.prints in result["output"], about
            for file in entry.leaves:
                assert (workspace / file).stat().st_size > 0, f"{file}: {about}"
            ran += 1
        elif entry.until:
            assert result["reached"], about
    assert ran == sum(entry.run is not None for entry in ENTRIES) >= 20
    one, again = (
        [json.loads(line) for line in (workspace / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "again")
    )
    assert [line["loss"] for line in one] == [line["loss"] for line in again]
    assert len(one) >= 2


@pytest.mark.slow
@pytest.mark.timeout(820)
def test_the_demo_is_made_of_accepted_commands(carried_out: tuple[Path, list[tuple[Entry, Result]]]) -> None:
    """`make demo` takes minutes: here it starts nothing, and what it would start is read by the tools."""
    assert "$(BIN)/python examples/demo/run.py" in targets()["demo"]
    demo = carried_out[1][-1][1]
    assert demo["code"] == 0, demo
    assert [step["script"] for step in demo["steps"]] == [
        "tools/build_demo_corpus.py",
        "tools/pretrain_lcl.py",
        "tools/evaluate.py",
    ]
    for step in demo["steps"]:
        assert step["reached"], step


def targets() -> dict[str, str]:
    """Targets of the Makefile, with their recipes."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z][a-z-]*):[^=\n]*\n((?:\t.*\n?)*)", text, re.MULTILINE))


def test_what_shows_a_command_exists() -> None:
    for entry in ENTRIES:
        for by in entry.by:
            if by.startswith("make "):
                assert targets().get(by.removeprefix("make ")), f"{entry.command}: no target {by}"
                continue
            file, _, name = by.partition("::")
            assert (ROOT / file).is_file(), f"{entry.command}: no {file}"
            if name:
                tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
                assert any(isinstance(n, ast.FunctionDef) and n.name == name for n in ast.walk(tree)), by
        words = shlex.split(entry.command)
        if words[0] == "make":
            names = [word.partition("=")[0] for word in words[1:] if "=" in word]
            assert all(word in targets() for word in words[1:] if "=" not in word), entry.command
            assert all(f"$({name}" in (ROOT / "Makefile").read_text(encoding="utf-8") for name in names), entry.command
        elif words[0] == "pytest":
            assert (ROOT / words[1]).is_dir()
        elif words[:2] == ["pip", "install"]:
            assert_installable(Requirement(words[2]))


def assert_installable(wanted: Requirement) -> None:
    """An extra of ours, or a package that one of our extras asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if wanted.name == project["name"]:
        assert wanted.extras <= extras.keys(), wanted
    else:
        known = [Requirement(text) for texts in extras.values() for text in texts]
        assert (wanted.name, wanted.extras) in [(one.name, one.extras) for one in known], wanted


# --- options, settings, files, links


def flags_of_tools() -> set[str]:
    """Options of everything that the documents start: from its dataclass, or its source."""
    from lcl_mcore.config.arguments import flags_of

    found = {"--help", "--no-overlap"}.union(*(flags_of(cls) for cls in command_options().values()))
    scripts = ("benchmarks/*.py", "examples/*/run.py", "campaigns/*.py", "tests/planning/*_worker.py")
    for path in (path for pattern in scripts for path in ROOT.glob(pattern)):
        found |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text(encoding="utf-8")))
    return found


# Of programs that are not ours.
FOREIGN = {
    "torchrun": {
        "--nnodes",
        "--nproc-per-node",
        "--max-restarts",
        "--rdzv-backend",
        "--rdzv-id",
        "--rdzv-endpoint",
        "--rdzv-conf",
    },
    "sbatch and scancel": {"--partition", "--time", "--output", "--requeue", "--signal"},
    "pip": {"--no-build-isolation"},
    "open_clip": {"--accum-freq", "--fsdp-checkpoint"},
}


def test_options_exist(texts: dict[str, Text]) -> None:
    known = flags_of_tools().union(*FOREIGN.values())
    for name, text in texts.items():
        assert options(text) - known == set(), name


SUFFIXES = ("py", "json", "jsonl", "yaml", "md", "safetensors")


def test_settings_exist(texts: dict[str, Text]) -> None:
    from lcl_mcore.config.base import to_dict
    from lcl_mcore.config.recipes import load_recipe
    from lcl_mcore.config.schema import SourceConfig

    tree = to_dict(load_recipe("demo"))
    tree["data"]["sources"] = to_dict(SourceConfig(path="a"))
    sections = {name for name, value in tree.items() if isinstance(value, dict)}
    seen = 0
    for name, text in texts.items():
        for path in settings(text):
            first, *rest = path.split(".")
            if first not in sections or rest[-1] in SUFFIXES:
                continue
            node: Any = tree
            for part in (first, *rest):
                assert isinstance(node, dict), (name, path)
                assert part in node, (name, path)
                node = node[part]
            seen += 1
    assert seen >= 15


def test_links_and_files_exist(texts: dict[str, Text]) -> None:
    for document in DOCUMENTS:
        for target in links(document.read_text(encoding="utf-8")):
            assert (document.parent / target.partition("#")[0]).exists(), (document.name, target)
    folders = "docs|tools|tests|benchmarks|campaigns|examples|lcl_mcore|kernels"
    for name, text in texts.items():
        for code in (*text.inline, *text.blocks):
            for path in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.(?:py|md|json|yaml|sh|sbatch))\b", code):
                assert (ROOT / path).exists(), (name, path)


def test_documents_are_taken_apart() -> None:
    """What the collector must not miss, and must not take for a command."""
    text = take_apart(
        "Run `make  demo`, or `python\ntools/x.py --a 1`; `python` alone and `makefile rules` are no commands.\n"
        "\n"
        "    python tools/y.py one \\\n        --two    # a comment\n    result: 3\n"
        "    OMP_NUM_THREADS=1 torchrun z.py\n"
        "\n"
        "text\n    python no.py\n"
        "```\nsbatch job.sbatch --c=1 # queue\n```\n"
        "[there](docs/a.md#part) and [web](https://example.org), `--set loss.averaging=rank`, `optim.lr`\n"
    )
    assert commands(text) == [
        "python tools/y.py one --two",
        "OMP_NUM_THREADS=1 torchrun z.py",
        "sbatch job.sbatch --c=1",
        "make demo",
        "python tools/x.py --a 1",
    ]
    assert options(text) == {"--two", "--c", "--a", "--set"}
    assert settings(text) >= {"loss.averaging", "optim.lr"}
    assert links("[there](docs/a.md#part) and [web](https://example.org)") == {"docs/a.md#part"}
