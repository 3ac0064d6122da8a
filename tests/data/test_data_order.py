"""The order of documents: a pure function with the promised proportions, in constant memory."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from lcl_mcore.data.order import DocumentOrder, SampleIndex, mixture_schedule
from lcl_mcore.errors import DataError
from lcl_mcore.rng import KeyedRandom, Permutation, key64


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_permutation_is_a_bijection(n: int) -> None:
    permutation = Permutation(n, "test", n)
    assert sorted(permutation(i) for i in range(n)) == list(range(n))


def test_permutation_looks_random() -> None:
    n = 4000
    values = np.array([Permutation(n, 1)(i) for i in range(n)])
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(n), values)[0, 1]) < 0.05
    assert (np.array([Permutation(n, 2)(i) for i in range(n)]) == values).sum() < 10


def test_keys_separate_types_and_boundaries() -> None:
    assert key64(1) != key64("1")
    assert key64("ab", "c") != key64("a", "bc")
    numbers = [KeyedRandom("u", i).uniform() for i in range(2000)]
    assert abs(np.mean(numbers) - 0.5) < 0.02
    assert abs(np.std(numbers) - 12**-0.5) < 0.02
    assert KeyedRandom(3).sample(10, 10) == list(range(10))
    assert len(set(KeyedRandom(4).sample(50, 6))) == 6


def test_schedule_follows_weights_everywhere() -> None:
    schedule = np.array(mixture_schedule([0.7, 0.2, 0.1]))
    for source, share in enumerate([0.7, 0.2, 0.1]):
        given = np.cumsum(schedule == source)
        wanted = share * np.arange(1, len(schedule) + 1)
        assert np.abs(given - wanted).max() < 1.5
    with pytest.raises(DataError, match="smallest share"):
        mixture_schedule([1.0, 1e-6])


def test_each_epoch_shows_every_document_once() -> None:
    order = DocumentOrder([30, 20], [0.5, 0.5], ["a", "b"], streams=4, seed=3)
    samples = [order.sample(stream, n) for stream in range(4) for n in range(400)]
    assert max(Counter(samples).values()) == 1
    first = {sample.index for sample in samples if sample.source == 1 and sample.epoch == 0}
    assert first == set(range(20))
    epochs = [
        [s.index for s in (order.sample(0, n) for n in range(2000)) if s == SampleIndex(0, e, s.index)] for e in (0, 1)
    ]
    assert epochs[0] != epochs[1]


def test_every_stream_sees_the_whole_mixture() -> None:
    order = DocumentOrder([1000, 1000], [0.5, 0.5], ["a", "b"], streams=2, seed=3)
    for stream in (0, 1):
        counts = Counter(order.sample(stream, n).source for n in range(100))
        assert counts == {0: 50, 1: 50}


def test_blocks_of_neighbours_stay_together() -> None:
    order = DocumentOrder([103], [1.0], ["a"], streams=1, seed=1, block=10)
    indices = [order.sample(0, n).index for n in range(103)]
    assert sorted(indices) == list(range(103))
    assert all(indices[i] + 1 == indices[i + 1] for i in range(100) if i % 10 != 9)
    assert indices[:100] != list(range(100))


def test_a_hundred_million_documents_need_no_table() -> None:
    order = DocumentOrder([100_000_000], [1.0], ["a"], streams=1024, seed=1)
    indices = {order.sample(1000, n).index for n in range(2000)}
    assert len(indices) == 2000
    assert max(indices) > 95_000_000
    assert min(indices) < 5_000_000


@pytest.mark.parametrize(("block", "digest"), [(1, "b40cc64b8a04754e"), (10, "def600daa05b18f9")])
def test_the_order_is_that_of_earlier_versions(block: int, digest: str) -> None:
    """Computed at commit 02e64cf: saved positions would otherwise go on with other documents."""
    order = DocumentOrder([1003, 500, 77], [0.5, 0.3, 0.2], ["a", "b", "c"], streams=6, seed=11, block=block)
    samples = [order.sample(stream, n) for stream in range(6) for n in range(500)]
    found = hashlib.sha256(repr([(s.source, s.epoch, s.index) for s in samples]).encode()).hexdigest()
    assert found[:16] == digest
