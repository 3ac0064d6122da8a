"""Thousands of damaged and hostile files, given to the program's own readers (`python campaigns/fuzz.py`).

Each input is a sound file of one kind, changed: bytes, structure, or what kind of thing lies at its path. It is read
in a process of its own with bounds on memory and time. It may be accepted or refused with a sentence. A traceback, a
signal, an unbounded reader, anything executed, or a sound checkpoint that is gone, is a find.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from fuzz_readers import INCOMPLETE, KINDS, REFUSALS, Kind, make_sound
from jobs import facts, write

from lcl_mcore.checkpoint.hashing import hash_of
from lcl_mcore.checkpoint.store import MANIFEST, manifest_bytes, parse_manifest
from lcl_mcore.errors import LclError

CPU_SECONDS, WALL_SECONDS = 30, 180
MEMORY = 2 << 30
"""Bytes of address space that a reader may add."""
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "subprocess.Popen", "socket.connect")


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        change: how the file was changed.
        result: accepted, refused, or what was found.
        mib: memory that the reader took at most, beyond what the process had.
        seconds: processor time.
    """

    number: int
    kind: str
    change: str
    result: str
    detail: str
    mib: float = 0.0
    seconds: float = 0.0


class _Payload:
    """Pickles as a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


# --- changes of bytes


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    block = rng.choice((rng.randbytes(rng.randrange(1, 64)), data[place : place + 200], b"\xff" * 16, b"[" * 100_000))
    return data[:place] + block + data[place:]


def remove(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place + rng.randrange(1, 600) :]


def numbers(data: bytes, rng: random.Random) -> bytes:
    """Extreme integers where one may stand."""
    width, place = rng.choice((1, 2, 4, 8)), rng.randrange(len(data) + 1)
    value = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80")) * (width - 1) + rng.choice((b"\xff", b"\x7f", b"\0"))
    return data[:place] + value + data[place + width :]


def header(data: bytes, rng: random.Random) -> bytes:
    """A number in the first 600 bytes, or at the end, where formats keep their sizes."""
    if rng.random() < 0.3:
        return data[:-600] + numbers(data[-600:], rng)
    return numbers(data[:600], rng) + data[600:]


def digits(data: bytes, rng: random.Random) -> bytes:
    """A decimal number in a text becomes another."""
    places = [i for i, byte in enumerate(data[:1_000_000]) if 48 <= byte <= 57]
    if not places:
        return flip(data, rng)
    place = rng.choice(places)
    value = rng.choice((b"-1", b"9" * 30, b"1e999", b"NaN", b"0x1", b"null", b"9" * 6000, b"0", b"2147483648", b"1.5"))
    return data[:place] + value + data[place + 1 :]


def pickled(data: bytes, rng: random.Random) -> bytes:
    """A pickle that runs a command, or has a key of a million nested tuples."""
    return rng.choice((pickle.dumps(_Payload()), b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."))


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, cut, insert, remove, numbers, header, digits, pickled,
)  # fmt: skip


# --- changes of structure


def hostile_value(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((40, 400))):
        deep = [deep]
    return rng.choice(
        (
            "NaN", None, True, -1, 0, 2**31, 2**63, 10**30, 10**400, 1e308, -0.5, "", "x" * 5000, "\x00", "\ud800",
            "../../../etc/passwd", "/dev/zero", "<script>", "é" * 50, [], {}, [[]], [{}], {"": None}, {"a": {"b": {}}},
            deep, [0] * 5000, "!!python/object:os.system",
        )
    )  # fmt: skip


def restructured(tree: Any, rng: random.Random) -> Any:
    """The tree with one value somewhere in it changed."""
    places: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo and len(places) < 3000:
        node = todo.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            todo.append(value)
    if not places:
        return hostile_value(rng)
    node, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[str(hostile_value(rng))[:50]] = node[key]
        case 2 if isinstance(node, list):
            node += node * rng.choice((1, 50))
        case _:
            node[key] = hostile_value(rng)
    return tree


def duplicated_key(text: str, rng: random.Random) -> str:
    place = text.find("{")
    return text if place < 0 else text[: place + 1] + '"a": 1, "a": 2, ' + text[place + 1 :]


def structured(path: Path, data: bytes, rng: random.Random) -> bytes | None:
    """The content with one change of structure; None for a format that is not known here."""
    if path.name.endswith((".jsonl", ".json")):
        lines = data.decode().split("\n") if path.name.endswith("l") else [data.decode()]
        chosen = rng.randrange(len(lines))
        if not lines[chosen].strip():
            return flip(data, rng)
        if rng.random() < 0.1:
            lines[chosen] = duplicated_key(lines[chosen], rng)
        else:
            lines[chosen] = json.dumps(restructured(json.loads(lines[chosen]), rng))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if path.suffix == ".yaml":
        changed = restructured(yaml.safe_load(data), rng)
        try:
            written = str(yaml.safe_dump(changed, sort_keys=False))
        except RecursionError:  # JSON is YAML, and its writer goes deeper
            written = json.dumps(changed)
        return written.encode("utf-8", "surrogatepass")
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(restructured(json.loads(data[8 : 8 + size]), rng)).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]
    return None


# --- changes of what lies at the path


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def _as_end(path: Path) -> None:
    """The same content, and then a terabyte of nothing."""
    with open(path, "r+b") as file:
        file.truncate(1 << 40)


def _instead(put: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(path: Path) -> None:
        path.unlink()
        put(path)

    return replace


PATHS: dict[str, Callable[[Path], object]] = {
    "a pipe": _instead(os.mkfifo),
    "a folder": _instead(os.mkdir),
    "a link to itself": _instead(lambda path: os.symlink(path, path)),
    "a link to /dev/zero": _instead(lambda path: os.symlink("/dev/zero", path)),
    "a terabyte of zeros": _sparse,
    "a terabyte of zeros behind it": _as_end,
    "missing": os.unlink,
    "empty": lambda path: path.write_bytes(b""),
}


def change(kind: Kind, folder: Path, examples: Path, rng: random.Random) -> str:
    """Change one file of a copy; says how."""
    files = sorted(path for pattern in kind.files for path in folder.glob(pattern) if path.is_file())
    path = rng.choice(files)
    name = str(path.relative_to(folder))
    if kind.name == "checkpoint":
        (folder / "touched").write_text(path.parent.name)
    data, roll = path.read_bytes(), rng.random()
    if roll < 0.08:
        how = rng.choice(sorted(PATHS))
        PATHS[how](path)
        return f"{name}: {how}"
    if roll < 0.14:
        other = rng.choice(sorted(p for p in examples.rglob("*") if p.is_file() and p.stat().st_size < 1 << 20))
        place = rng.randrange(len(data) + 1)
        path.write_bytes(rng.choice((data[:place], b"")) + other.read_bytes()[rng.choice((0, place)) :])
        how = f"spliced with {other.name}"
    else:
        changed = structured(path, data, rng) if roll < 0.6 else None
        how = "structure"
        if changed is None:
            changed = data
            for _ in range(rng.choice((1, 1, 1, 3))):
                mutate = rng.choice(BYTES)
                changed, how = mutate(changed, rng), mutate.__name__
        path.write_bytes(changed)
    if kind.name == "checkpoint" and path.name != MANIFEST and rng.random() < 0.7:
        _reseal(path)
        how += ", manifest rewritten"
    return f"{name}: {how}"


def _reseal(path: Path) -> None:
    """As one who writes the manifest, too: hash and size of the changed file."""
    manifest = parse_manifest((path.parent / MANIFEST).read_bytes())
    data = path.read_bytes()
    if path.name in manifest.files:
        manifest.files[path.name].update({"bytes": len(data), "hash": hash_of([data])})
        (path.parent / MANIFEST).write_bytes(manifest_bytes(manifest))


# --- one input


def attempt(number: int, seed: int, examples: Path, work: Path) -> Outcome:
    """Change and read one input in a forked process."""
    kind = KINDS[number % len(KINDS)]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(examples / kind.folder, work)
    return read(number, kind, change(kind, work, examples, random.Random(f"{seed} {number}")), work)


def read(number: int, kind: Kind, how: str, work: Path) -> Outcome:
    """Read what lies in a folder in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.chdir(work)
        try:
            os.write(writer, json.dumps(_read(kind, work)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answered = pipe.read()
    _, status, used = os.wait4(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        slow = name in ("SIGALRM", "SIGXCPU")
        return Outcome(number, kind.name, how, "too slow" if slow else f"ended by {name}", "", 0.0, used.ru_utime)
    answer = json.loads(answered) if answered else {"result": "no answer", "detail": ""}
    if (work / "executed").exists():
        answer["result"] = "code was executed"
    return Outcome(number, kind.name, how, **answer)


def _read(kind: Kind, folder: Path) -> dict[str, Any]:
    """In the child: bounds, the reader, what came of it."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    executed: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        probe = event == "subprocess.Popen" and arguments[0] == sys.executable and kind.folder.startswith("vocabulary")
        if event in RUNS_CODE and not probe:
            executed.append(event)

    sys.addaudithook(watch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, begun = _memory("VmRSS"), time.process_time()
    limit = _memory("VmSize") * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WALL_SECONDS)
    detail = ""
    try:
        kind.read(folder)
        result = "accepted"
    except (LclError, *REFUSALS) as error:
        result, detail = "refused", str(error)
        if len(detail) > 3000 or detail.count("\n") > 2:
            result, detail = "a message without end", detail[:500]
    except SystemExit as error:
        result, detail = "refused", str(error)
    except BaseException as error:  # libraries written in Rust panic with exceptions of their own
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result, detail = f"traceback: {type(error).__name__}", "".join(traceback.format_exception(error))[-2500:]
    if executed:
        result, detail = "code was executed", ", ".join(executed)
    mib = max(0, _memory("VmHWM") - before) / 1024
    return {"result": result, "detail": detail, "mib": mib, "seconds": time.process_time() - begun}


def _memory(name: str) -> int:
    """A line of this process's status, in KiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0])


# --- the campaign


def run(count: int, seed: int, workers: int, first: int = 0) -> list[Outcome]:
    """Outcomes of inputs `first` to `first + count - 1`, in order."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        base = Path(name)
        make_sound(base / "sound")
        require_sound(base / "sound", base / "work")
        children = []
        for worker in range(workers):
            child = os.fork()
            if child == 0:
                with open(base / f"{worker}.jsonl", "w", encoding="utf-8") as out:
                    for number in range(first + worker, first + count, workers):
                        outcome = attempt(number, seed, base / "sound", base / f"work-{worker}")
                        out.write(json.dumps(asdict(outcome)) + "\n")
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            raise RuntimeError("a worker of the campaign itself failed")
        lines = [line for worker in range(workers) for line in (base / f"{worker}.jsonl").read_text().splitlines()]
    return sorted((Outcome(**json.loads(line)) for line in lines), key=lambda outcome: outcome.number)


def require_sound(examples: Path, work: Path) -> None:
    """The campaign shows nothing if its readers refuse what is sound."""
    for kind in KINDS:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(examples / kind.folder, work)
        if kind.name == "checkpoint":
            (work / "touched").write_text("step-00000010")
        outcome = read(-1, kind, "nothing", work)
        expected = "missing" in outcome.detail if kind.name == INCOMPLETE else outcome.result == "accepted"
        if not expected:
            raise RuntimeError(f"{kind.name}: {outcome.result} {outcome.detail}")


def finds(outcomes: list[Outcome]) -> list[Outcome]:
    """What must not happen."""
    return [outcome for outcome in outcomes if outcome.result not in ("accepted", "refused")]


def report(outcomes: list[Outcome], seed: int) -> dict[str, Any]:
    """Counts, worst memory and time of each kind, and all finds."""
    kinds = {}
    for kind in KINDS:
        own = [outcome for outcome in outcomes if outcome.kind == kind.name]
        worst = max(own, key=lambda outcome: outcome.mib, default=None)
        kinds[kind.name] = {
            "inputs": len(own),
            **Counter(outcome.result for outcome in own),
            "most_mib": round(worst.mib, 1) if worst else 0,
            "most_seconds": round(max((outcome.seconds for outcome in own), default=0.0), 2),
        }
    return {"seed": seed, "inputs": len(outcomes), "kinds": kinds, "finds": [asdict(find) for find in finds(outcomes)]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first input: to see one again")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    outcomes = run(args.inputs, args.seed, args.workers, args.first)
    result = facts(f"python campaigns/fuzz.py --inputs {args.inputs} --seed {args.seed}") | report(outcomes, args.seed)
    write(args.report, result)
    print(json.dumps(result["kinds"], indent=1))
    for find in result["finds"][:20]:
        print(f"input {find['number']} ({find['kind']}; {find['change']}): {find['result']}\n{find['detail'][-800:]}\n")
    print(f"{len(outcomes)} inputs, {len(result['finds'])} finds")
    return 1 if result["finds"] else 0


if __name__ == "__main__":
    sys.exit(main())
