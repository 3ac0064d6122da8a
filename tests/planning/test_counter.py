"""What single operators count: FLOPs and dtype of what is multiplied, bytes of what is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lcl_mcore.hardware import find_gpu
from lcl_mcore.planning.cluster import make_cluster
from lcl_mcore.planning.counter import OperatorCall, StepCounter
from lcl_mcore.planning.request import Assumptions

CAPACITY, ROWS, WORDS, WIDTH = 5, 40, 1000, 16
META = torch.device("meta")


def counted(run: Callable[[], object], device: str) -> OperatorCall:
    """The one operator that this runs."""
    counter = StepCounter(torch.device(device))
    with counter:
        run()
    (call,) = counter.operators
    assert counter.operators[call] == 1
    return call


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=META)


def test_a_half_precision_matmul_into_fp32_is_rated_at_half_precision() -> None:
    """As the loss accumulates weight gradients: the sum is read and written once, in fp32."""
    into = torch.empty(ROWS, WORDS, device=META)
    call = counted(
        lambda: torch.addmm(into, bf16(ROWS, WIDTH), bf16(WIDTH, WORDS), out_dtype=torch.float32, out=into), "meta"
    )
    assert (call.kind, call.dtype, call.flops) == ("matmul", "bfloat16", 2 * ROWS * WIDTH * WORDS)
    assert call.bytes == 2 * (ROWS * WIDTH + WIDTH * WORDS) + 2 * 4 * ROWS * WORDS
    cluster = make_cluster(find_gpu("h100"), Assumptions(memory=1e9))  # no time for memory
    assert cluster.seconds(call) == pytest.approx(call.flops / (0.6 * 989.4e12))


def test_a_matmul_does_not_read_what_it_writes() -> None:
    out = torch.empty(ROWS, WORDS, device=META)
    call = counted(lambda: torch.mm(bf16(ROWS, WIDTH), bf16(WIDTH, WORDS), out_dtype=torch.float32, out=out), "meta")
    assert call.bytes == 2 * (ROWS * WIDTH + WIDTH * WORDS) + 4 * ROWS * WORDS


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_selecting_operators_touch_what_the_index_names(device: str) -> None:
    """Logits [40, 1000] and one label a row: 40 numbers are touched, not 40,000."""
    logits = torch.zeros(ROWS, WORDS, device=device)
    labels = torch.zeros(ROWS, 1, dtype=torch.int64, device=device)
    minus = torch.zeros(ROWS, 1, device=device)
    index, numbers = 8 * ROWS, 4 * ROWS
    assert counted(lambda: logits.gather(1, labels), device).bytes == numbers + index + numbers
    assert counted(lambda: logits.scatter_(1, labels, minus), device).bytes == numbers + index + numbers
    # Read, add, write.
    assert counted(lambda: logits.scatter_add_(1, labels, minus), device).bytes == 2 * numbers + index + numbers
    assert counted(lambda: logits.scatter_(1, labels, 1.0), device).bytes == numbers + index


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_looking_rows_up_touches_these_rows(device: str) -> None:
    table = torch.zeros(WORDS, WIDTH, device=device)
    words = torch.zeros(CAPACITY, dtype=torch.int64, device=device)
    rows = torch.zeros(CAPACITY, WIDTH, device=device)
    expected = 2 * 4 * CAPACITY * WIDTH + 8 * CAPACITY  # read, write, index
    assert counted(lambda: table.index_select(0, words), device).bytes == expected
    assert counted(lambda: torch.nn.functional.embedding(words, table), device).bytes == expected
    assert counted(lambda: table[words], device).bytes == expected
    assert counted(lambda: table.index_copy_(0, words, rows), device).bytes == expected
    assert counted(lambda: table.index_add_(0, words, rows), device).bytes == expected + 4 * CAPACITY * WIDTH


def test_other_operators_read_and_write_whole_tensors() -> None:
    a, b = (torch.zeros(ROWS, WORDS) for _ in range(2))
    assert counted(lambda: a + b, "cpu").bytes == 3 * 4 * ROWS * WORDS
    assert counted(lambda: a.add_(b), "cpu").bytes == 3 * 4 * ROWS * WORDS
    assert counted(lambda: a + b[:1].expand(ROWS, WORDS), "cpu").bytes == (2 * ROWS + 1) * 4 * WORDS


def test_an_operator_of_our_own_is_one_pass_over_what_it_takes_makes_and_changes() -> None:
    """Also where it changes an argument in place and returns something else."""
    with torch.library._scoped_library("counted", "DEF") as library:
        library.define("loss_(Tensor(a!) logits, Tensor labels) -> Tensor")
        library.impl("loss_", lambda logits, labels: logits.new_empty(labels.shape[0], dtype=torch.float32), "Meta")
        logits, labels = bf16(ROWS, WORDS), torch.empty(ROWS, dtype=torch.int64, device=META)
        results: list[Tensor] = []
        call = counted(lambda: results.append(torch.ops.counted.loss_(logits, labels)), "meta")
    assert (call.kind, call.bytes) == ("other", 2 * 2 * ROWS * WORDS + 8 * ROWS + 4 * ROWS)
    assert results[0].shape == (ROWS,)
