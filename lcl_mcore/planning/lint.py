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

from lcl_mcore.planning.counter import CollectiveCall


@dataclass(frozen=True)
class RankOrder:
    """Of a job: tensor-parallel ranks are neighbours, then data-parallel, then pipeline stages."""

    tp: int
    pp: int
    dp: int

    def stand_in(self, rank: int) -> int:
        """The rank of data-parallel index 0 with the same tensor and pipeline index."""
        return rank // (self.tp * self.dp) * self.tp * self.dp + rank % self.tp


def lint(logs: Mapping[int, Sequence[CollectiveCall]], order: RankOrder) -> list[str]:
    """Look for deadlocks.

    Args:
        logs: what each rank of data-parallel index 0 issued, in order; other ranks may be there, too.
        order: which ranks do the same.

    Returns:
        A sentence for each problem; none if nothing can hang.
    """
    problems = []
    for rank in [p * order.tp * order.dp + t for p in range(order.pp) for t in range(order.tp)]:
        if rank not in logs:
            problems.append(f"rank {rank} has no log: every tensor and pipeline index needs one")
    if problems:
        return problems
    return _sequences(logs, order) or _progress(logs, order)


def _is_transfer(call: CollectiveCall) -> bool:
    return call.op.startswith(("send", "recv"))


def _sequences(logs: Mapping[int, Sequence[CollectiveCall]], order: RankOrder) -> list[str]:
    """Members of each group, position by position."""
    problems: list[str] = []
    by_group: dict[tuple[str, tuple[int, ...]], dict[int, list[CollectiveCall]]] = defaultdict(dict)
    for rank, log in logs.items():
        for call in log:
            if len(call.ranks) > 1 and not _is_transfer(call):
                by_group[call.group, call.ranks].setdefault(rank, []).append(call)
    for (name, ranks), lists in by_group.items():
        known = {rank: lists.get(rank, []) for rank in ranks if rank in logs}
        first, expected = next(iter(known.items()))
        for rank, calls in known.items():
            for at, (a, b) in enumerate(zip_longest(expected, calls)):
                if a is None or b is None or a.signature != b.signature:
                    problems.append(
                        f"group {name} {_short(ranks)}: call {at} is {_text(a)} on rank {first}, {_text(b)} on {rank}"
                    )
                    break
    return problems


def _progress(logs: Mapping[int, Sequence[CollectiveCall]], order: RankOrder) -> list[str]:
    """Run all logs against each other; whoever is left waiting is stuck."""
    own = {rank: log for rank, log in logs.items() if order.stand_in(rank) == rank}
    at = dict.fromkeys(own, 0)
    mail: dict[tuple[int, int, str], deque[int]] = defaultdict(deque)

    def ready(rank: int, call: CollectiveCall) -> bool:
        if call.op.startswith("recv"):
            source = call.ranks[call.where[0]]
            return bool(mail[order.stand_in(source), rank, call.group])
        for member in {order.stand_in(r) for r in call.ranks}:
            log = own[member]
            if at[member] >= len(log) or not _meets(call, log[at[member]], order):
                return False
        return True

    moved = True
    while moved:
        moved = False
        for rank, log in own.items():
            while at[rank] < len(log):
                call = log[at[rank]]
                if call.op.startswith("send"):
                    mail[rank, order.stand_in(call.ranks[call.where[0]]), call.group].append(call.bytes)
                    at[rank] += 1
                elif not ready(rank, call):
                    break
                elif call.op.startswith("recv"):
                    size = mail[order.stand_in(call.ranks[call.where[0]]), rank, call.group].popleft()
                    if size != call.bytes:
                        return [f"rank {rank} waits for {call.bytes} bytes and is sent {size}, call {at[rank]}"]
                    at[rank] += 1
                else:
                    for member in {order.stand_in(r) for r in call.ranks}:
                        at[member] += 1
                moved = True
    return [
        f"rank {rank} waits for ever in call {at[rank]} of {len(log)}: {_text(log[at[rank]])}"
        for rank, log in own.items()
        if at[rank] < len(log)
    ] + [f"{len(left)} messages of rank {a} to {b} are never received" for (a, b, _), left in mail.items() if left]


def _meets(call: CollectiveCall, other: CollectiveCall, order: RankOrder) -> bool:
    """Whether two ranks are at the same call of the same group, or of its copies at other data-parallel indices."""
    return (
        call.group == other.group
        and call.signature == other.signature
        and {order.stand_in(r) for r in call.ranks} == {order.stand_in(r) for r in other.ranks}
    )


def _short(ranks: tuple[int, ...]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"of {len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"


def _text(call: CollectiveCall | None) -> str:
    return "missing" if call is None else f"{call.op} of {call.bytes} bytes in {call.group} ({call.phase})"
