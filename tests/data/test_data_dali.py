"""DALI: what it refuses is counted, decoded by the CPU and in the end ends the run; on a GPU it has its own stream.

Pipelines are stood in for here, so these tests need no DALI; `test_data_decode.py` runs the real one on a CPU.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from corpora import config, image_bytes
from lcl_mcore import optional_packages
from lcl_mcore.data import image_reader
from lcl_mcore.data.crop import Window
from lcl_mcore.data.dali import CPU_BATCH, DaliDecoder
from lcl_mcore.data.decode import CpuDecoder, DecodeTask
from lcl_mcore.data.image_reader import build_decoder
from lcl_mcore.distributed import device
from lcl_mcore.distributed.device import SideStream, take_over
from lcl_mcore.errors import ConfigError, DataError

CPU = torch.device("cpu")
SIDE = 32


class Recorded:
    """A side stream that writes down what happens on it."""

    handle = 1234

    def __init__(self) -> None:
        self.log: list[str] = []

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        self.log.append("enter")
        yield
        self.log.append("leave")

    def mark(self) -> None:
        self.log.append("mark")


class Output:
    """A tensor list of DALI: what `as_tensor` gives is the pipeline's own memory."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels

    def as_tensor(self) -> torch.Tensor:
        return self.pixels


class Pipeline:
    """Gives every image the brightness of its width; refuses batches as `refuse` says."""

    def __init__(self, log: list[str], refuse: Any) -> None:
        self.log, self.refuse, self.fed = log, refuse, {}
        self.memory = torch.empty(CPU_BATCH, 3, SIDE, SIDE, dtype=torch.uint8)

    def feed_input(self, name: str, values: list[np.ndarray]) -> None:
        self.fed[name] = values

    def run(self, stream: int) -> tuple[Output]:
        self.log.append(f"run on {stream}")
        count = len(self.fed["encoded"])
        if self.refuse(self.fed["encoded"]):
            raise RuntimeError("Error in nvimgcodec: bad image\n  at 0x1234\n")
        for i in range(count):
            self.memory[i] = int(self.fed["shape"][i][1])
        return (Output(self.memory[:count]),)


@pytest.fixture
def dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_packages, "dali", lambda: optional_packages.Probe("nvidia-dali", True, "2.4", "ok"))


def decoder(monkeypatch: pytest.MonkeyPatch, refuse: Any = lambda encoded: False) -> tuple[DaliDecoder, Recorded]:
    side = Recorded()
    made = DaliDecoder(1, CPU, side, resize_inside=True)  # type: ignore[arg-type]

    def build(self: DaliDecoder, size: int) -> Pipeline:
        side.log.append("build")
        return Pipeline(side.log, refuse)

    monkeypatch.setattr(DaliDecoder, "_build", build)
    return made, side


def tasks(count: int, broken: tuple[int, ...] = ()) -> list[DecodeTask]:
    made = []
    for n in range(count):
        content = image_bytes(n, 40 + n, 50)
        content = b"nothing" if n in broken else content
        made.append(DecodeTask(lambda content=content: content, 40 + n, 50, Window(0, 0, 40 + n, 50)))  # type: ignore[misc]
    return made


@pytest.mark.usefixtures("dali")
def test_batches_run_on_the_side_stream_and_land_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    made, side = decoder(monkeypatch)
    indexed: list[Any] = []
    write = torch.Tensor.__setitem__
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda t, at, v: (indexed.append(at), write(t, at, v))[1])
    pixels, reasons = made.decode(tasks(10, broken=(5,)), SIDE)
    made.close()
    assert side.log == ["enter", "build", *["run on 1234"] * 3, "leave"]
    assert [bool(reason) for reason in reasons] == [n == 5 for n in range(10)]
    assert pixels[:, 0, 0, 0].tolist() == [128 if n == 5 else 40 + n for n in range(10)]
    assert all(isinstance(at, int) for at in indexed)  # the stand-in's own; a list would make the host wait


@pytest.mark.usefixtures("dali")
def test_a_refused_batch_is_logged_decoded_on_the_cpu_and_the_pipeline_made_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work = tasks(8)
    cut = work[2].read()[:700]
    work[2] = DecodeTask(lambda: cut, work[2].width, work[2].height, work[2].window)
    made, side = decoder(monkeypatch, lambda encoded: any(len(content) == 700 for content in encoded))
    with caplog.at_level(logging.WARNING):
        pixels, reasons = made.decode(work, SIDE)
    wanted, _ = CpuDecoder(1, CPU).decode(work[:4], SIDE)
    assert torch.equal(pixels[:4], wanted)
    assert pixels[4:, 0, 0, 0].tolist() == [44, 45, 46, 47]
    assert [bool(reason) for reason in reasons] == [n == 2 for n in range(8)]
    assert side.log == ["enter", "build", "run on 1234", "build", "run on 1234", "leave"]
    assert [record.getMessage() for record in caplog.records] == [
        "DALI refused a batch (Error in nvimgcodec: bad image), number 1; of its 4 images the CPU decoded all but 1"
    ]
    made.close()


@pytest.mark.usefixtures("dali")
def test_refusing_good_images_again_and_again_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = decoder(monkeypatch, lambda encoded: True)
    made.decode(tasks(8), SIDE)
    with pytest.raises(DataError) as stopped:
        made.decode(tasks(4), SIDE)
    assert str(stopped.value) == (
        "DALI: refused 3 batches in succession in which every image can be decoded, last: Error in nvimgcodec: bad "
        "image. Use --data.decode-backend cpu."
    )
    made.close()


@pytest.mark.usefixtures("dali")
def test_a_pipeline_that_cannot_be_built_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = decoder(monkeypatch)

    def fail(self: DaliDecoder, size: int) -> None:
        raise RuntimeError("CUDA driver version is insufficient\nstack")

    monkeypatch.setattr(DaliDecoder, "_build", fail)
    with pytest.raises(ConfigError) as refused:
        made.decode(tasks(2), SIDE)
    assert str(refused.value) == (
        "DALI: its pipeline cannot be built on cpu (CUDA driver version is insufficient). Use --data.decode-backend "
        "cpu, or a DALI that fits the driver."
    )
    made.close()


@pytest.mark.skipif(not optional_packages.dali().usable, reason="DALI is an optional extra of 700 MB")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_real_one_does_not_build_without_its_gpu() -> None:
    made = DaliDecoder(1, torch.device("cuda", 0), SideStream(CPU))
    with pytest.raises(ConfigError, match=r"^DALI: its pipeline cannot be built on cuda:0 \("):
        made._pipeline(SIDE)
    made.close()


@pytest.mark.usefixtures("dali")
@pytest.mark.parametrize(
    ("kind", "cores", "asked", "taken"),
    [("cuda", 16, "auto", "cpu"), ("cuda", 3, "auto", "dali"), ("cpu", 3, "auto", "cpu"), ("cuda", 16, "dali", "dali")],
)
def test_auto_takes_dali_for_a_gpu_with_few_cores(
    kind: str, cores: int, asked: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_reader, "cores_of_rank", lambda: cores)
    made = build_decoder(config(decode_backend=asked), torch.device(kind), SideStream(CPU))
    assert made.name == taken
    made.close()


class Stream:
    """What torch offers of a CUDA stream, written down."""

    cuda_stream = 77

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def record_event(self) -> str:
        self.log.append(f"event on {self.name}")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class OnDevice:
    """A tensor on the device."""

    is_cuda = True

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record_stream(self, stream: Stream) -> None:
        self.log.append(f"memory kept for {stream.name}")


def test_training_takes_over_by_an_event_and_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    side = Stream(log, "side")
    monkeypatch.setattr(device.torch.cuda, "Stream", lambda where: side)
    monkeypatch.setattr(device.torch.cuda, "current_stream", lambda: Stream(log, "training"))
    beside = SideStream(torch.device("cuda", 0))
    assert beside.handle == 77
    take_over([OnDevice(log), torch.zeros(1)], beside.mark())  # type: ignore[list-item]
    assert log == ["event on side", "training waits for event of side", "memory kept for training"]


def test_a_cpu_has_no_side_stream() -> None:
    beside = SideStream(CPU)
    with beside.current():
        assert (beside.handle, beside.mark()) == (None, None)
    take_over([torch.zeros(1)], beside.mark())
