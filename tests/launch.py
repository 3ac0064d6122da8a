"""Starts scripts of this repository, in one process or as the ranks of a job, and returns what they said.

Processes are forked from a server that has imported torch, megatron-core and the trainer once in this pytest run:
importing them takes seconds of processor time in each new process. What is about torchrun itself, such as restarts
in place, is started by torchrun: `torchrun_command`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TERMINATION_SECONDS = 30.0
"""What torchrun gives the other ranks after one has failed."""


class Server:
    """The other side of fork_server.py: one for the whole pytest run."""

    def __init__(self) -> None:
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(TESTS / "fork_server.py")],
            cwd=ROOT,
            env=os.environ | ONE_THREAD | {"PYTHONUNBUFFERED": ""},  # lines of several ranks stay whole
            stdin=other,
        )
        other.close()
        assert self.channel.recv(16) == b"ready", f"the fork server ended with {self.process.wait(10)}"
        self.codes: dict[int, int] = {}
        self.cpu_seconds = 0.0
        self.lock = threading.Lock()
        atexit.register(self.close)

    def close(self) -> None:
        """End it and what it still runs."""
        self.channel.close()
        self.process.wait(10)

    def start(self, streams: list[int], **job: Any) -> int:
        """Fork a process that writes to these file descriptors; its id."""
        with self.lock:
            socket.send_fds(self.channel, [json.dumps(job).encode()], streams)
            while "started" not in (answer := self._receive()):
                pass
        pid = int(answer["started"])
        self.codes.pop(pid, None)  # of an earlier process of this number
        return pid

    def poll(self, seconds: float = 0.0) -> None:
        """Note which processes have ended, waiting at most so long for one."""
        with self.lock:
            if select.select([self.channel], [], [], seconds)[0]:
                self._receive()

    def _receive(self) -> dict[str, Any]:
        packet = self.channel.recv(1 << 16)
        assert packet, f"the fork server ended with {self.process.wait(10)}"
        answer: dict[str, Any] = json.loads(packet)
        if "ended" in answer:
            self.codes[answer["ended"]] = answer["code"]
            self.cpu_seconds += answer["cpu"]
        return answer


_servers: list[Server] = []


def server() -> Server:
    """Started at the first use."""
    if not _servers:
        _servers.append(Server())
    return _servers[0]


class Job:
    """Ranks of one script, with their output in pipes; ended as torchrun does when one of them fails.

    pids        one process id for each rank
    returncode  None while one runs; then 0, or the code of the first rank that failed
    """

    def __init__(self, count: int | None, *command: str, **environment: str) -> None:
        """`count` ranks that meet over gloo, or None for a single process that knows nothing of ranks."""
        script, *arguments = command
        self.outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        # Through pipes, as with torchrun: ranks that may not write large files still print.
        self.readers = [subprocess.Popen("cat", stdin=subprocess.PIPE, stdout=file) for file in self.outputs]
        pipes = [reader.stdin for reader in self.readers]
        self.returncode: int | None = None
        self.pids: list[int] = []
        shared = os.environ | ONE_THREAD | environment
        if count is not None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            shared |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": str(uuid.uuid4()),
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
        for rank in range(count or 1):
            own = {} if count is None else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.pids.append(
                server().start(
                    [pipe.fileno() for pipe in pipes if pipe is not None],
                    script=script,
                    arguments=arguments,
                    environment=shared | own,
                    folder=str(ROOT),
                )
            )
        for pipe in pipes:
            if pipe is not None:
                pipe.close()

    @property
    def stdout(self) -> str:
        """What all ranks have printed so far."""
        return self._text(0)

    @property
    def stderr(self) -> str:
        """The same of their standard error."""
        return self._text(1)

    def _text(self, number: int) -> str:
        file = self.outputs[number].fileno()
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def poll(self, seconds: float = 0.0) -> int | None:
        """`returncode`, after waiting at most so long for a change; ranks of a failed job are ended here."""
        if self.returncode is not None:
            return self.returncode
        codes = server().codes
        server().poll(seconds)
        done = [codes[pid] for pid in self.pids if pid in codes]
        if any(done):
            self.returncode = next(code for code in done if code)
            self.end(signal.SIGTERM, TERMINATION_SECONDS)
        elif len(done) == len(self.pids):
            self.returncode = 0
        if self.returncode is not None:
            for reader in self.readers:
                with contextlib.suppress(subprocess.TimeoutExpired):  # a helper process holds it open
                    reader.wait(5.0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Until all ranks have ended.

        Raises:
            subprocess.TimeoutExpired: they have not; they are killed.
        """
        end = time.monotonic() + timeout
        while self.poll(0.2) is None:
            if time.monotonic() > end:
                self.end(signal.SIGKILL, 10.0)
                raise subprocess.TimeoutExpired("job", timeout, self.stdout[-6000:], self.stderr[-6000:])
        assert self.returncode is not None
        return self.returncode

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank, unless it has ended."""
        if self.pids[rank] in self._running():
            with contextlib.suppress(ProcessLookupError):  # ended meanwhile; the server has not said so yet
                os.kill(self.pids[rank], number)

    def end(self, number: signal.Signals, seconds: float) -> None:
        """Signal what still runs, and kill it if that did not end it in this time."""
        for chosen, limit in ((number, seconds), (signal.SIGKILL, 10.0)):
            left = self._running()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):  # ended meanwhile; the server has not said so yet
                    os.kill(pid, chosen)
            end = time.monotonic() + limit
            while self._running() and time.monotonic() < end:
                server().poll(0.2)

    def _running(self) -> list[int]:
        return [pid for pid in self.pids if pid not in server().codes]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL, 10.0)
        for reader in self.readers:
            reader.kill()
            reader.wait()
        for file in self.outputs:
            file.close()


def _run(count: int | None, command: tuple[str, ...], timeout: float, environment: Mapping[str, str]) -> Any:
    with Job(count, *command, **environment) as job:
        code = job.wait(timeout)
        return subprocess.CompletedProcess(command, code, job.stdout, job.stderr)


def run_script(*command: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository in one process, as `python SCRIPT ...` does."""
    done: subprocess.CompletedProcess[str] = _run(None, command, timeout, environment)
    return done


def torchrun(count: int, *command: str, timeout: float = 240, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script of this repository on `count` ranks of this machine, as torchrun without restarts does."""
    done: subprocess.CompletedProcess[str] = _run(count, command, timeout, {})
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-6000:]}")
    return done


_subprocess_run = subprocess.run


def forked_run(command: list[str], **options: Any) -> Any:
    """Stands in for `subprocess.run` where a script starts others of this repository with its own interpreter."""
    if command[0] != sys.executable:
        return _subprocess_run(command, **options)
    assert not options["check"]
    done = run_script(*map(str, command[1:]), timeout=600, **options["env"])
    options["stdout"].write(done.stdout + done.stderr)
    return done


def torchrun_command(count: int, *elastic: str) -> list[str]:
    """The command line of torchrun itself, to be followed by a script and its arguments."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *elastic]


def last_json(done: subprocess.CompletedProcess[str]) -> Any:
    """The last line that a worker printed."""
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_worker(name: str, count: int, *arguments: str, timeout: float = 240) -> Any:
    """Run `tests/distributed/NAME.py`; its last line on rank 0 is JSON."""
    return last_json(torchrun(count, f"tests/distributed/{name}.py", *arguments, timeout=timeout))
