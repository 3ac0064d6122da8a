"""Every option of every command that names a file or folder, given one that cannot serve: exit code 2, one message.

The options come from the commands' own classes, so that a new one is tried without being named here.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import tarfile
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from command_options import command_options
from lcl_mcore.config.arguments import flags_of
from lcl_mcore.config.base import fields_of, section_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]
Arguments = Callable[..., list[str]]
Tool = Callable[..., Any]

OUTPUTS = {"out", "output", "html", "checkpoint.folder"}
"""Options that say where something is written."""
NO_PATHS = {"recipe", "set", "packages", "gpu", "split", "train_split", "recompute_vision", "recompute_language"}
"""Options of text that name no file, by their last part or path."""


@dataclasses.dataclass(frozen=True)
class PathOption:
    """One option: how it is written (empty: by its place), and its dotted path in the command's class."""

    flag: str
    path: str
    positional: bool

    @property
    def name(self) -> str:
        return self.path.removeprefix("run.")


def holds(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(holds(part, kind) for part in typing.get_args(annotation))


def path_options(cls: type, prefix: str = "") -> Iterator[PathOption]:
    """Options whose type is a path, or text that is not known to be none."""
    flags = {flag.path: spelled for spelled, flag in reversed(flags_of(cls).items())} if not prefix else {}
    for name, annotation in typing.get_type_hints(cls, include_extras=True).items():
        if name not in fields_of(cls):
            continue
        section = section_in(annotation)
        if section is not None:
            for option in path_options(section, f"{prefix}{name}."):
                yield dataclasses.replace(option, flag=flags.get(option.path, option.flag))
            continue
        text = holds(annotation, str) and not holds(annotation, Path) and typing.Literal not in _origins(annotation)
        if holds(annotation, Path) or (text and not {name, prefix + name} & NO_PATHS):
            marks = getattr(annotation, "__metadata__", ())
            yield PathOption(flags.get(prefix + name, ""), prefix + name, tyro.conf.Positional in marks)


def _origins(annotation: Any) -> set[Any]:
    return {typing.get_origin(annotation)}.union(*(_origins(part) for part in typing.get_args(annotation)))


OUTPUT_FILES = {"evaluate", "inspect", "plan"}
"""Commands whose output is a file."""


class Workspace:
    """Good inputs for every command, and things that cannot serve as any input or output."""

    def __init__(self, folder: Path, corpus: Path, run: Path) -> None:
        self.folder, self.corpus, self.run = folder, corpus, run
        self.file = folder / "file.txt"
        self.file.write_bytes(b"\x00\xff not what is wanted " * 9)
        (folder / "empty file").touch()
        (folder / "empty folder").mkdir()
        os.mkfifo(folder / "pipe")
        with tarfile.open(folder / "pairs.tar", "w") as tar:
            for name, content in (("0.jpg", b"no image"), ("0.txt", b"a caption")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    def inputs(self) -> dict[str, str]:
        """What is no file, folder or data set of any kind that a command reads."""
        names = ("pipe", "nowhere", "file.txt", "empty folder", "empty file", "file.txt/below", "x" * 300)
        return {name[:20]: str(self.folder / name) for name in names}

    def outputs(self, file: bool) -> dict[str, str]:
        """Where nothing can be written."""
        wrong = self.folder / "empty folder" if file else self.file
        places = (self.file / "below" / "this", Path("/proc/nowhere/here"), wrong, self.folder / ("x" * 300))
        return {str(path)[-20:]: str(path) for path in places}

    def line(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Script with sub-command, and good values of the options that a command must have, in order."""
        module, cls = name.split(".")
        data, out = str(self.corpus / "pairs"), str(self.folder / f"new-{module}" / "output")
        script = {"import_released": "import_released", "prepare": "prepare_data", "inspect": "inspect_data"}
        script |= {"export": "export_encoder", "pretrain": "pretrain_lcl"}
        head = [f"tools/{script.get(module, module)}.py"]
        if module == "evaluate":
            head.append(cls.removesuffix("Options").lower())
        return head, {
            "checkpoint": {"command": "consolidate", "path": str(self.run), "out": out},
            "describe": {"recipe": "demo"},
            "evaluate": {"model": str(self.run), "data": data},
            "export": {"model": str(self.run), "out": out},
            "fetch_corpora": {"output": out},
            "import_released": {"checkpoint": str(self.file), "out": out},
            "inspect": {"data": data, "tokenizer": str(self.corpus)},
            "plan": {"recipe": "demo", "gpus": "1"},
            "prepare": {"format": "pairs", "input": str(self.folder / "pairs.tar"), "output": out},
            "pretrain": {
                "recipe": "demo",
                "data": data,
                "run.data.tokenizer.path": str(self.corpus),
                "out": out,
                "run.evaluation.every": "5",
                "run.evaluation.data": data,
            },
        }[module]


# Options of a configuration that these commands describe and do not use.
UNUSED = {"describe", "plan"}
# Commands that need torchrun, or a network, for their work; options of kinds of input that another test has.
ELSEWHERE = {"doctor.DoctorOptions", "evaluate.PairsOptions"}


def cases(workspace: Workspace, per_option: int) -> dict[str, list[str]]:
    """Command lines, each with one value that cannot serve, by a title; for each option some values, in turn."""
    found = {}
    turn = itertools.count()
    for name, cls in command_options().items():
        if name in ELSEWHERE:
            continue
        head, good = workspace.line(name)
        module = name.partition(".")[0]
        positional = [field for field, hint in typing.get_type_hints(cls, include_extras=True).items()]
        positional = [f for f in positional if tyro.conf.Positional in getattr(hints(cls)[f], "__metadata__", ())]
        flags = {flag.path: spelled for spelled, flag in reversed(flags_of(cls).items())}
        for option in path_options(cls):
            suppressed = not option.flag and not option.positional
            if suppressed or (option.path.startswith("run.") and module in UNUSED):
                continue
            output = option.name in OUTPUTS
            bad = workspace.outputs(module in OUTPUT_FILES) if output else workspace.inputs()
            first = next(turn) % len(bad)
            for title, value in [*bad.items(), *bad.items()][first : first + per_option]:
                given = good | {option.path: value}
                if option.path == "config":
                    given.pop("recipe")
                words = [given.pop(field) for field in positional if field in given]
                for path, text in given.items():
                    words += [flags[path], text]
                words += ["--quiet"] if module == "prepare" else []
                found[f"{name} {option.path} {title}"] = [*head, *words]
    return found


def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def test_what_cannot_serve_is_one_message(corpus: Path, arguments: Arguments, run_tool: Tool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_tool(*arguments(run, "--steps", "1"))
    assert done.returncode == 0, done.stderr
    workspace = Workspace(tmp_path, corpus, run)
    lines = cases(workspace, per_option=2)
    assert len(lines) > 70
    file = tmp_path / "cases.json"
    file.write_text(json.dumps(list(lines.values())))
    done = run_tool("tests/training/tool_worker.py", str(file), timeout=560)
    assert done.returncode == 0, done.stderr
    results = dict(zip(lines, json.loads(done.stdout.splitlines()[-1]), strict=True))
    wrong = {
        title: result
        for title, result in results.items()
        if result["code"] != 2 or len(result["stderr"].splitlines()) > 3 or "Traceback" in result["stderr"]
    }
    for title, result in wrong.items():
        print(title, "|", result["code"], "|", result["stderr"][-600:], "|", result["stdout"][-200:])
    assert not wrong, sorted(wrong)
    left = {path.name for path in tmp_path.glob("new-*")}
    assert left <= {"new-prepare"}, list(tmp_path.glob("new-*/**/*"))  # which remembers what it dropped
