"""Can this layout deadlock? Checked on what each rank would send and receive, before any of them starts.

Two ways to hang are looked for: members of a group that do not issue the same sequence of collectives, and ranks that
wait for each other in a circle. One rank stands for all with its tensor and pipeline index, as all run the same
program. Collectives are taken as meeting points of all members, sends as buffered, receives as waiting.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from lcl_mcore.planning.counter import Event


@dataclass(frozen=True)
class Mesh:
    """Rank order of a job: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages."""

    tp: int
    pp: int
    dp: int

    def stand_in(self, rank: int) -> int:
        """The rank of data-parallel index 0 with the same tensor and pipeline index."""
        return rank // (self.tp * self.dp) * self.tp * self.dp + rank % self.tp


def lint(logs: Mapping[int, Sequence[Event]], mesh: Mesh) -> list[str]:
    """Problems found, none if the list is empty.

    Args:
        logs: what each rank of data-parallel index 0 issued, in order; other ranks may be there, too.
    """
    problems = []
    for rank in [p * mesh.tp * mesh.dp + t for p in range(mesh.pp) for t in range(mesh.tp)]:
        if rank not in logs:
            problems.append(f"rank {rank} has no log: every tensor and pipeline index needs one")
    if problems:
        return problems
    return _sequences(logs, mesh) or _progress(logs, mesh)


def _is_transfer(event: Event) -> bool:
    return event.op.startswith(("send", "recv"))


def _sequences(logs: Mapping[int, Sequence[Event]], mesh: Mesh) -> list[str]:
    """Members of each group, position by position."""
    problems: list[str] = []
    by_group: dict[tuple[str, tuple[int, ...]], dict[int, list[Event]]] = defaultdict(dict)
    for rank, log in logs.items():
        for event in log:
            if len(event.ranks) > 1 and not _is_transfer(event):
                by_group[event.group, event.ranks].setdefault(rank, []).append(event)
    for (name, ranks), lists in by_group.items():
        known = {rank: lists.get(rank, []) for rank in ranks if rank in logs}
        first, expected = next(iter(known.items()))
        for rank, events in known.items():
            for at, (a, b) in enumerate(zip_longest(expected, events)):
                if a is None or b is None or a.signature != b.signature:
                    problems.append(
                        f"group {name} {_short(ranks)}: call {at} is {_text(a)} on rank {first}, {_text(b)} on {rank}"
                    )
                    break
    return problems


def _progress(logs: Mapping[int, Sequence[Event]], mesh: Mesh) -> list[str]:
    """Run all logs against each other; whoever is left waiting is stuck."""
    own = {rank: log for rank, log in logs.items() if mesh.stand_in(rank) == rank}
    at = dict.fromkeys(own, 0)
    mail: dict[tuple[int, int, str], deque[int]] = defaultdict(deque)

    def ready(rank: int, event: Event) -> bool:
        if event.op.startswith("recv"):
            source = event.ranks[event.where[0]]
            return bool(mail[mesh.stand_in(source), rank, event.group])
        for member in {mesh.stand_in(r) for r in event.ranks}:
            log = own[member]
            if at[member] >= len(log) or not _meets(event, log[at[member]], mesh):
                return False
        return True

    moved = True
    while moved:
        moved = False
        for rank, log in own.items():
            while at[rank] < len(log):
                event = log[at[rank]]
                if event.op.startswith("send"):
                    mail[rank, mesh.stand_in(event.ranks[event.where[0]]), event.group].append(event.bytes)
                    at[rank] += 1
                elif not ready(rank, event):
                    break
                elif event.op.startswith("recv"):
                    size = mail[mesh.stand_in(event.ranks[event.where[0]]), rank, event.group].popleft()
                    if size != event.bytes:
                        return [
                            f"rank {rank} waits for {event.bytes} bytes and is sent {size}, call {at[rank]}"
                        ]
                    at[rank] += 1
                else:
                    for member in {mesh.stand_in(r) for r in event.ranks}:
                        at[member] += 1
                moved = True
    return [
        f"rank {rank} waits for ever in call {at[rank]} of {len(log)}: {_text(log[at[rank]])}"
        for rank, log in own.items()
        if at[rank] < len(log)
    ] + [
        f"{len(left)} messages of rank {a} to {b} are never received"
        for (a, b, _), left in mail.items()
        if left
    ]


def _meets(event: Event, other: Event, mesh: Mesh) -> bool:
    """Whether two ranks are at the same call of the same group, or of its copies at other data-parallel indices."""
    return (
        event.group == other.group
        and event.signature == other.signature
        and {mesh.stand_in(r) for r in event.ranks} == {mesh.stand_in(r) for r in other.ranks}
    )


def _short(ranks: tuple[int, ...]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"of {len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"


def _text(event: Event | None) -> str:
    return (
        "missing" if event is None else f"{event.op} of {event.bytes} bytes in {event.group} ({event.phase})"
    )
