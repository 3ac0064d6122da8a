"""Forks processes that have torch, megatron-core and the trainer imported, which takes seconds in each new process.

Standard input is a socket of packets, one JSON object each after `ready`. `launch.py` is the other side. It sends

    {"script", "arguments", "environment", "folder"}    with the file descriptors of both output streams

and receives {"started": pid}; and, whenever a process has ended, {"ended": pid, "code": as `subprocess` has it,
"cpu": seconds}. When the other side has closed the socket, what still runs is killed.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import lcl_mcore.evaluation.heldout
import lcl_mcore.trainer  # noqa: F401

POLL_SECONDS = 0.01
LARGEST_PACKET = 1 << 20


def fork(job: dict[str, Any], streams: list[int]) -> int:
    """In the child the streams, folder, variables and words of the job are in place, and 0 is returned."""
    pid = os.fork()
    if not pid:
        os.setsid()
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
            os.dup2(file, number)
        os.environ.clear()
        os.environ.update(job["environment"])
        os.chdir(job["folder"])
        random.seed()
        sys.argv = [job["script"], *job["arguments"]]
        sys.path[0] = job["folder"] if job["script"] == "-m" else str(Path(job["script"]).resolve().parent)
    for file in streams:
        os.close(file)
    return pid


def serve(channel: socket.socket) -> str:
    """Answer until the other side has gone. Returns in children only, with the script to run."""
    running: set[int] = set()

    def answer(**values: Any) -> None:
        channel.send(json.dumps(values).encode())

    while True:
        if select.select([channel], [], [], POLL_SECONDS if running else None)[0]:
            packet, streams, _, _ = socket.recv_fds(channel, LARGEST_PACKET, 2)
            if not packet:
                for pid in running:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            job = json.loads(packet)
            pid = fork(job, streams)
            if not pid:
                channel.close()
                return str(job["script"])
            running.add(pid)
            answer(started=pid)
        for pid in list(running):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                answer(ended=pid, code=os.waitstatus_to_exitcode(status), cpu=usage.ru_utime + usage.ru_stime)


def run(script: str) -> int:
    """The script, or the module after "-m", as `__main__`; its exit code, with a traceback as of an interpreter."""
    try:
        if script == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    gc.freeze()  # children do not copy what the collector would only look at
    channel = socket.socket(fileno=os.dup(0))
    channel.send(b"ready")
    code = run(serve(channel))
    threading._shutdown()  # what an interpreter does at its end, but for taking modules apart, which takes a second
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
