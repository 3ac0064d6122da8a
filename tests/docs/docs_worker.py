"""Carries out the documents' commands in one process, because importing torch and megatron-core takes seconds.

Arguments: the workspace, and a JSON file with a list of jobs {"words", "until", "world"}; prints JSON with, for each,
its exit status and what it printed. With `until` the tool's own code runs until it calls that name.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.run import get_args_parser

from lcl_mcore.config import arguments as command_line

READ = "the command line is read"
"""A job of this `until` ends when its command line has been read."""
STEPS = "steps"
"""A job of this `until` starts no process: the commands that it would start are read in its place."""


class Reached(BaseException):  # not an Exception: entry scripts report those
    """The tool came to its work."""


def reached(*args: Any, **kwargs: Any) -> None:
    raise Reached


def script_of(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Script and its arguments, and the environment that torchrun would give one of its processes."""
    if words[0] != "torchrun":
        return words[1:], {}
    given = get_args_parser().parse_args([os.path.expandvars(word) for word in words[1:]])
    return [given.training_script, *given.training_script_args], {"TORCHELASTIC_RUN_ID": given.rdzv_id}


def stop_at(until: str) -> contextlib.AbstractContextManager[Any]:
    """At `READ` the command line is read, by our commands' reader or a script's own; anything else is not called."""
    if until != READ:
        return mock.patch(until, reached)

    def then_stop(original: Callable[..., Any]) -> Callable[..., Any]:
        def read_and_stop(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            raise Reached

        return read_and_stop

    stack = contextlib.ExitStack()
    for owner, name in ((argparse.ArgumentParser, "parse_args"), (command_line, "checked")):
        stack.enter_context(mock.patch.object(owner, name, then_stop(getattr(owner, name))))
    return stack


def recording(started: list[list[str]]) -> contextlib.AbstractContextManager[Any]:
    """Processes are not started but noted, and end well."""

    def note(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        started.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, 0)

    return mock.patch("subprocess.run", note)


def carry_out(job: dict[str, Any], workspace: Path) -> dict[str, Any]:
    """One command; the process is left as it was found."""
    words, environment = script_of(job["words"])
    script, arguments = words[0], words[1:]
    until, world = job["until"], job["world"]
    result: dict[str, Any] = {"code": None, "reached": False, "started": []}
    launched = {"RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "n1", "MASTER_PORT": "1"} if world > 1 else {}
    output = io.StringIO()
    path_before = list(sys.path)
    os.chdir(workspace)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment | launched))
        stack.enter_context(mock.patch.object(sys, "argv", [script, *arguments]))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        if until == STEPS:
            stack.enter_context(recording(result["started"]))
        elif until:
            stack.enter_context(stop_at(until))
        sys.path.insert(0, str((workspace / script).resolve().parent))
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            result["code"] = end.code or 0
        except Reached:
            result["reached"] = True
        except Exception:  # a tool that is broken; the test shows where
            output.write(traceback.format_exc())
    sys.path[:] = path_before
    if dist.is_initialized():
        dist.destroy_process_group()
    result["steps"] = [carry_out(step(words), workspace) for words in result.pop("started")]
    return result | {"script": script, "output": output.getvalue()}


def step(words: list[str]) -> dict[str, Any]:
    """The job that reads a command which a script starts with its own interpreter."""
    assert words[0] == sys.executable, words
    if words[1:3] != ["-m", "torch.distributed.run"]:
        return {"words": words, "until": READ, "world": 1}
    count = int(words[words.index("--nproc-per-node") + 1])
    return {"words": ["torchrun", *words[3:]], "until": "lcl_mcore.data.inputs.check_inputs", "world": count}


def main() -> None:
    workspace = Path(sys.argv[1])
    jobs = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    os.environ |= {"SLURM_JOB_ID": "1234", "HEAD": "n1"}
    results = [carry_out(job, workspace) for job in jobs]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
