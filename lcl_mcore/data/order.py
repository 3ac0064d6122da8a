"""Which document comes next: a pure function of seed, mixture and data set sizes, in constant memory.

V sample streams (one per sequence of the global batch) each read their own succession of documents. The n-th sample
of a stream takes its source from a fixed periodic schedule; the c-th sample of a stream from one source takes element
`stream + c * V` of that source's documents epoch after epoch, each epoch in an order of its own. Nothing here depends
on ranks, workers or on what was read before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lcl_mcore.errors import DataError, explain
from lcl_mcore.rng import Permutation, key64

PERIOD = 10_000


@dataclass(frozen=True)
class SampleIndex:
    """One document of the mixture: number `index` of source number `source`, in its pass `epoch`."""

    source: int
    epoch: int
    index: int


def mixture_schedule(weights: Sequence[float], period: int = PERIOD) -> list[int]:
    """`period` source numbers, each source spread evenly and as often as its weight says.

    At every place the source that is furthest behind its share comes next, so any stretch of the
    schedule has each source's share to within a document or so.

    Raises:
        DataError: a share is too small for the period.
    """
    if len(weights) == 1:
        return [0]
    total = sum(weights)
    shares = [weight / total for weight in weights]
    if min(shares) * period < 1:
        raise DataError(
            explain(
                f"weights {list(weights)}",
                f"the smallest share must be at least 1/{period} of the mixture",
                "Raise the smallest weight or remove that source.",
            )
        )
    given = [0] * len(shares)
    schedule = []
    for place in range(1, period + 1):
        source = max(range(len(shares)), key=lambda s: (shares[s] * place - given[s], -s))
        given[source] += 1
        schedule.append(source)
    return schedule


class DocumentOrder:
    """Maps (sample stream, number of the sample) to a document of the mixture."""

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        names: Sequence[str],
        *,
        streams: int,
        seed: int,
        shuffle: bool = True,
        block: int = 1,
    ) -> None:
        for name, size in zip(names, sizes, strict=True):
            if size <= 0:
                raise DataError(explain(f"source {name}", "holds no documents", "Prepare it again."))
        self.sizes = list(sizes)
        self.names = list(names)
        self.streams = streams
        self.seed = seed
        self.shuffle = shuffle
        self.block = block
        self._schedule = np.array(mixture_schedule(weights), dtype=np.int32)
        # [source, place]: how often the source stands in places 0..place-1 of one period
        scheduled = self._schedule[None, :] == np.arange(len(sizes))[:, None]
        self._before = np.pad(np.cumsum(scheduled, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        self._permutation = lru_cache(maxsize=4 * len(sizes))(self._new_permutation)

    def source(self, stream: int, n: int) -> int:
        """Number of the source of the n-th document of a stream."""
        return int(self._schedule[(n + self._phase(stream)) % len(self._schedule)])

    def _phase(self, stream: int) -> int:
        """Streams start at different places of the schedule."""
        return stream * len(self._schedule) // self.streams

    def sample(self, stream: int, n: int) -> SampleIndex:
        """The n-th document of a stream."""
        phase = self._phase(stream)
        place = n + phase
        source = int(self._schedule[place % len(self._schedule)])
        earlier = self._total(source, place) - self._total(source, phase)
        element = stream + earlier * self.streams
        epoch, i = divmod(element, self.sizes[source])
        return SampleIndex(source, epoch, self._document(source, epoch, i))

    def _total(self, source: int, place: int) -> int:
        """How often `source` is scheduled in places 0..place-1."""
        before = self._before[source]
        periods, rest = divmod(place, len(self._schedule))
        return periods * int(before[-1]) + int(before[rest])

    def _document(self, source: int, epoch: int, i: int) -> int:
        """The i-th document of one epoch: blocks of neighbours in permuted order."""
        if not self.shuffle:
            return i
        whole = self.sizes[source] // self.block * self.block
        if i >= whole:
            return i  # the last, incomplete block keeps its place
        permutation = self._permutation(source, epoch)
        block, offset = divmod(i, self.block)
        return permutation(block) * self.block + offset

    def _new_permutation(self, source: int, epoch: int) -> Permutation:
        blocks = self.sizes[source] // self.block
        return Permutation(blocks, key64(self.seed, "epoch order", self.names[source], epoch))
