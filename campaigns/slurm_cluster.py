"""A real SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, in a folder of its own.

Nothing is installed and no system folder is touched. Debian's packages are fetched with `apt-get download`
(3.5 MB) and unpacked beside each other; a configuration, a key, free ports and a state folder are made for
one cluster, and everything is stopped at the end. Any user may do it; root is not needed.

    with Cluster(folder, packages) as slurm:
        job = slurm.submit("--wrap", "hostname")
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "libmunge2",
    "libhwloc15",
    "liblua5.1-0",
)
NODES = ("n1", "n2")
GRACE_SECONDS = 60
"""What a pre-empted job gets between the request to stop and the end."""

CONFIGURATION = """
ClusterName=lcl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PluginDir={plugins}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,default_queue_depth=10
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=30
SlurmdTimeout=60
MinJobAge=600
PropagateResourceLimits=NONE
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=120 State=UP
"""


def unpack_packages(cache: Path) -> Path:
    """Fetch and unpack what is missing; returns the folder that holds `usr/`.

    Raises:
        RuntimeError: no apt here, or a package could not be fetched; says which command failed and how.
        subprocess.SubprocessError: fetching took too long, or an archive is damaged.
    """
    root = cache / "root"
    if (cache / "complete").exists():
        return root
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"no {tool} here: the SLURM test unpacks Debian's packages {', '.join(PACKAGES)}")
    cache.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "-qq", "download", *PACKAGES]
    done = subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}. Needs package lists (apt-get update) "
            "and a mirror of Debian 12."
        )
    for archive in sorted(cache.glob("*.deb")):
        subprocess.run(["dpkg", "-x", archive, root], check=True, timeout=60)
    (cache / "complete").touch()
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """The daemons and the commands of one cluster."""

    def __init__(self, folder: Path, root: Path, cpus: int = 2) -> None:
        self.folder, self.root, self.cpus = folder.resolve(), root.resolve(), cpus
        library = next(self.root.glob("usr/lib/*/slurm-wlm"))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))} | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{library}:{library.parent}",
            "PATH": f"{self.root}/usr/bin:{os.environ['PATH']}",
        }
        self.plugins = library
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        folder, sbin = self.folder, self.root / "usr/sbin"
        (folder / "state").mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._daemon(
            sbin / "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.socket",
            f"--key-file={key}",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        )
        self.wait_for(lambda: (folder / "munge.socket").exists(), "munged's socket", 20)
        host = socket.gethostname()
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={self.cpus} "
            f"RealMemory=1000 State=UNKNOWN"
            for name in NODES
        ]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=host,
                controller_port=free_port(),
                folder=folder,
                user=getpass.getuser(),
                plugins=self.plugins,
                nodes="\n".join(nodes),
                grace=GRACE_SECONDS,
            )
        )
        self._daemon(sbin / "slurmctld-wlm", "-D", "-i")
        for name in NODES:
            (folder / f"spool-{name}").mkdir()
            self._daemon(sbin / "slurmd-wlm", "-D", "-N", name, "-d", sbin / "slurmstepd-wlm")
        self.wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "IDLE"), "two idle nodes", 60)

    def _daemon(self, *command: str | Path) -> None:
        log = open(self.folder / f"{Path(command[0]).name}-{len(self.daemons)}.out", "wb")  # noqa: SIM115
        self.daemons.append(
            subprocess.Popen(
                [str(word) for word in command],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        log.close()

    def stop(self) -> None:
        """Cancel what runs, then stop the daemons that this object started."""
        try:
            if len(self.daemons) > 1:
                self._cancel_all()
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
            for daemon in reversed(self.daemons):
                try:
                    daemon.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self.daemons.clear()

    def _cancel_all(self) -> None:
        self.call("scancel", "--signal=KILL", "--full", "--user", getpass.getuser(), check=False)
        self.call("scancel", "--user", getpass.getuser(), check=False)
        deadline = time.monotonic() + 30
        while self.call("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.5)

    def call(
        self,
        *command: str | Path,
        check: bool = True,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Run one of SLURM's commands; its standard output."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment | (environment or {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path | None = None, **extra: str) -> str:
        """`sbatch`; the job's number."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, environment=extra).strip()

    def job(self, number: str) -> dict[str, str]:
        """Everything `scontrol show job` says, by name."""
        text = self.call("scontrol", "show", "job", "-o", number)
        return dict(re.findall(r"(\w+(?:/\w+)?)=(\S*)", text))

    def node_states(self) -> dict[str, str]:
        text = self.call("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        return {name: state.upper().rstrip("*") for name, state in map(str.split, text.splitlines())}

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float) -> float:
        """Wait until `condition()` is true; the seconds it took.

        Raises:
            TimeoutError: it did not come; names what was waited for and where the logs are.
        """
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"{what}: not seen in {seconds:g} s; logs in {self.folder}")
            time.sleep(0.2)
        return time.monotonic() - started

    def signal_processes(self, pattern: str, number: signal.Signals, most: int) -> list[int]:
        """Signal up to `most` processes of this cluster's jobs whose command line matches; their ids."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                ours = f"SLURM_CONF={self.folder}/".encode() in (entry / "environ").read_bytes()
            except OSError:
                continue
            if ours and re.search(pattern, line):
                found.append(int(entry.name))
        for pid in found[:most]:
            os.kill(pid, number)
        return found[:most]
