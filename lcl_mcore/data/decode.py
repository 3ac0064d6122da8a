"""From stored images to uint8 pixels of their crop windows, on the CPU or by NVIDIA DALI.

Decoders work in any grouping: the pixels of one image never depend on the others. An image that cannot be used
becomes grey, with the reason beside it; `ImageReader` counts such failures.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lcl_mcore import optional_packages
from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.collate import ImagePlan
from lcl_mcore.data.crop import Window
from lcl_mcore.data.format import ImageDamagedError
from lcl_mcore.data.images import (
    JPEG,
    MAX_PIXELS,
    BadImageError,
    may_be_turned,
    open_image,
    orientation,
    refuse_many_scans,
    upright_rgb,
)
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.errors import ConfigError, DataError, explain

logger = logging.getLogger(__name__)
GREY = 128
MAX_THREADS = 16  # more wait for the one that holds the interpreter's lock
MAX_EXTRA, NEAR = (
    24,
    1 / 16,
)  # pixels of the result that a reduced image may begin earlier, to lie as near a whole pixel
GPU_BATCH, CPU_BATCH = 64, 4  # DALI on a CPU gains nothing from more, and holds every decoded image meanwhile
DALI_REMEDY = "pip install nvidia-dali-cuda130 (or -cuda120); the package named nvidia-dali is not NVIDIA's."


@dataclass(frozen=True)
class DecodeTask:
    """One image to decode: how to get its bytes, its upright size in pixels, the part to show."""

    read: Callable[[], bytes]
    width: int
    height: int
    window: Window


class Decoder(Protocol):
    """Decodes images in any grouping: the result of one never depends on the others."""

    name: str

    def decode(self, tasks: Sequence[DecodeTask], side: int) -> tuple[Tensor, list[str]]:
        """uint8 [n, 3, side, side], and per image the reason of its failure ('' if none; then grey)."""

    def close(self) -> None:
        """Give back threads and device memory."""


def build_decoder(config: DataConfig, device: torch.device) -> Decoder:
    """The back end that a configuration asks for; `auto` takes DALI only for a GPU.

    Raises:
        ConfigError: DALI is asked for and cannot be used.
    """
    wants_dali = config.decode_backend == "dali" or (
        config.decode_backend == "auto" and device.type == "cuda" and optional_packages.dali().usable
    )
    threads = decode_threads(config)
    return DaliDecoder(threads, device) if wants_dali else CpuDecoder(threads, device)


def decode_threads(config: DataConfig) -> int:
    """How many threads decode in this process; `auto`: its share of the cores that the node's ranks may use."""
    if config.decode_threads != "auto":
        return config.decode_threads
    return min(max(cores_of_rank(), 1), MAX_THREADS)


def cores_of_rank() -> int:
    """CPU cores for each rank of this node, which share what this process may run on."""
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class ImageReader:
    """Pixels for image plans, in their order. Too many failures one after the other stop the run."""

    def __init__(self, config: DataConfig, mixture: Mixture, image_size: int, device: torch.device) -> None:
        self._config = config
        self._mixture = mixture
        self._decoder = build_decoder(config, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._side = image_size
        self._consecutive = 0

    @property
    def decoder_name(self) -> str:
        """Which back end decodes."""
        return self._decoder.name

    def begin(self, images: Sequence[ImagePlan]) -> Callable[[], tuple[Tensor, list[bool]]]:
        """Start to read and decode, in other threads; what is returned waits for it, and is to be called in order.

        Returns:
            Gives uint8 [n, 3, H, W], and which of them failed (these are grey); raises `DataError` when
            `max_consecutive_failures` images failed one after the other.
        """
        decoding = self._thread.submit(self._decoder.decode, [self._task(image) for image in images], self._side)
        return partial(self._finish, images, decoding)

    def read(self, images: Sequence[ImagePlan]) -> tuple[Tensor, list[bool]]:
        """`begin`, and wait."""
        return self.begin(images)()

    def _finish(
        self, images: Sequence[ImagePlan], decoding: Future[tuple[Tensor, list[str]]]
    ) -> tuple[Tensor, list[bool]]:
        pixels, reasons = decoding.result()
        for image, reason in zip(images, reasons, strict=True):
            self._consecutive = self._consecutive + 1 if reason else 0
            if not reason:
                continue
            logger.warning("%s: %s; a grey image takes its place", image.where, reason)
            if self._consecutive >= self._config.max_consecutive_failures:
                remedy = "Check the storage, or prepare the data set again."
                rule = f"the {self._consecutive}th image in succession that cannot be used, last: {reason}"
                raise DataError(explain(image.where, rule, remedy))
        return pixels, [bool(reason) for reason in reasons]

    def close(self) -> None:
        """End the decoder's threads."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def _task(self, image: ImagePlan) -> DecodeTask:
        document = image.document
        entry = document.stored.images[image.number]
        read = partial(
            self._mixture.datasets[document.source].image,
            document.stored,
            document.members,
            image.number,
            verify=self._config.verify_images,
        )
        return DecodeTask(read, entry.width, entry.height, image.window)


# --- the CPU ---


class CpuDecoder:
    """libjpeg-turbo for ordinary JPEGs, Pillow for everything else; resized by torch's bicubic kernel."""

    name = "cpu"

    def __init__(self, threads: int, device: torch.device) -> None:
        self._threads = threads
        self._pinned = device.type == "cuda"  # copies to the device then do not wait
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(self, tasks: Sequence[DecodeTask], side: int) -> tuple[Tensor, list[str]]:
        """All images, on the pool's threads, each into its place."""
        pixels = torch.empty((len(tasks), 3, side, side), dtype=torch.uint8, pin_memory=self._pinned)
        places = pixels.unbind()
        reasons = [""] * len(tasks)
        numbers = iter(range(len(tasks)))  # every thread takes the next one

        def work() -> None:
            for i in numbers:
                reasons[i] = _decode_into(places[i], tasks[i], side)

        for worker in [self._pool.submit(work) for _ in range(min(self._threads, len(tasks)))]:
            worker.result()
        return pixels, reasons

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _decode_into(target: Tensor, task: DecodeTask, side: int) -> str:
    """Fill `target` [3, side, side]; grey and a reason if that fails."""
    try:
        target.copy_(decode_one(task.read(), task, side))
        return ""
    except (BadImageError, ImageDamagedError) as error:
        target.fill_(GREY)
        return str(error)


def decode_one(content: bytes, task: DecodeTask, side: int) -> Tensor:
    """The crop window of one image, resized bicubically with antialiasing: uint8 [3, side, side].

    Raises:
        BadImageError: it cannot be decoded, or has another size than its manifest entry says.
    """
    window = task.window
    if _is_ordinary_jpeg(content, task):
        reduction = _reduction(window, side)
        try:
            if reduction is not None:
                return reduction.resize(_reduced_jpeg(content, task, reduction.eighths), side)
            return resize(simplejpeg.decode_jpeg(content, "RGB"), window, side)
        except ValueError:  # Pillow says what is wrong with it, or knows better
            pass
    return resize(_any_format(content, task), window, side)


def _is_ordinary_jpeg(content: bytes, task: DecodeTask) -> bool:
    """Whether libjpeg-turbo alone shows it as it is meant: upright, of the size in the manifest."""
    if not content.startswith(JPEG):
        return False
    refuse_many_scans(content)
    if may_be_turned(content) and orientation(open_image(content)) != 1:
        return False
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return False
    return (width, height) == (task.width, task.height) and width * height <= MAX_PIXELS


def _reduced_jpeg(content: bytes, task: DecodeTask, eighths: int) -> NDArray[np.uint8]:
    """Decoded at `eighths`/8 of its size, rounded up."""
    height, width = math.ceil(task.height * eighths / 8), math.ceil(task.width * eighths / 8)
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, "RGB", min_height=height, min_width=width, min_factor=2)
    return pixels


def _any_format(content: bytes, task: DecodeTask) -> NDArray[np.uint8]:
    """Pillow, with everything that a file may say of how it is shown."""
    image = open_image(content)
    size = image.size[::-1] if orientation(image) > 4 else image.size
    if size != (task.width, task.height):
        raise BadImageError("wrong size", f"{size}, the manifest says {(task.width, task.height)}")
    return np.array(upright_rgb(image))  # a copy, because Pillow's pixels are read-only


def resize(pixels: NDArray[np.uint8], window: Window, side: int) -> Tensor:
    """The window of uint8 [h, w, 3] as [3, side, side], bicubic with antialiasing.

    For uint8 with interleaved colours torch has a vectorised kernel; it agrees with Pillow's.
    """
    part = pixels[window.top : window.top + window.height, window.left : window.left + window.width]
    planes = torch.from_numpy(part).permute(2, 0, 1)[None]
    return functional.interpolate(planes, size=(side, side), mode="bicubic", antialias=True)[0]


# --- JPEGs decoded at a reduced scale, which spares most of the inverse transform and of the resize ---


@dataclass(frozen=True)
class ReducedAxis:
    """Pixels `first` to `last` - 1 are resized by `factor`; the window begins behind `extra` pixels of the result."""

    first: int
    last: int
    extra: int
    factor: float


@dataclass(frozen=True)
class _Reduction:
    """A scale at which a JPEG is decoded, and what its rows and columns then need."""

    eighths: int
    rows: ReducedAxis
    columns: ReducedAxis

    def resize(self, pixels: NDArray[np.uint8], side: int) -> Tensor:
        """Like `resize`, from the reduced image."""
        rows, columns = self.rows, self.columns
        above, left = max(-rows.first, 0), max(-columns.first, 0)
        part = pixels[rows.first + above : rows.last, columns.first + left : columns.last]
        if above or left:
            part = np.pad(part, ((above, 0), (left, 0), (0, 0)), "edge")
        planes = torch.from_numpy(part).permute(2, 0, 1)[None]
        factors = (rows.factor, columns.factor)
        resized = functional.interpolate(planes, scale_factor=factors, mode="bicubic", antialias=True)[0]
        return resized[:, rows.extra : rows.extra + side, columns.extra : columns.extra + side]


def _reduction(window: Window, side: int) -> _Reduction | None:
    """The smallest scale that leaves a pixel for each one shown; None if that is more than half the size."""
    least = math.ceil(8 * side / min(window.width, window.height))
    for eighths in range(least, 5):
        scale = eighths / 8
        rows = reduced_axis(window.top * scale, window.height * scale, side)
        columns = reduced_axis(window.left * scale, window.width * scale, side)
        if rows and columns:
            return _Reduction(eighths, rows, columns)
    return None


def reduced_axis(begin: float, length: float, side: int) -> ReducedAxis | None:
    """One axis of a window whose edges lie between pixels.

    Whole pixels instead would move the image by several levels of brightness. torch can end between pixels, but must
    begin with a whole one: so the result begins earlier, where it comes near one. None if that is nowhere.
    """
    step = length / side
    for extra in range(MAX_EXTRA):
        first = round(begin - extra * step)
        if abs(begin - extra * step - first) <= NEAR:
            factor = (extra + side) / (begin + length - first) * (1 + 1e-12)  # torch rounds the number of pixels down
            return ReducedAxis(first, math.ceil(begin + length), extra, factor)
    return None


# --- DALI ---


class DaliDecoder:
    """Decode and crop in one operator of NVIDIA DALI, then a bicubic resize with antialiasing.

    On a GPU (JPEG by nvJPEG) the pipeline also resizes. Without one its resize is six times slower than torch's
    vectorised kernel, so the pipeline ends after decoder and crop, and torch resizes. Crop windows are fed per image,
    so the output of one image does not depend on which others are in its batch, and DALI holds no random state. DALI
    stops a whole batch at one bad image; that batch is then decoded image by image on the CPU.

    Args:
        threads: for reading and for DALI's CPU operators.
        device: where it decodes; the pixels stay there.
        resize_inside: whether DALI's own operator resizes (default: on a GPU).

    Raises:
        ConfigError: DALI is not installed.
    """

    name = "dali"

    def __init__(self, threads: int, device: torch.device, *, resize_inside: bool | None = None) -> None:
        probe = optional_packages.dali()
        if not probe.usable:
            raise ConfigError(
                explain("data.decode_backend = dali", f"DALI cannot be imported ({probe.reason})", DALI_REMEDY)
            )
        self._threads = threads
        self._device = device
        on_gpu = device.type == "cuda"
        self._resize_inside = on_gpu if resize_inside is None else resize_inside
        self._batch = GPU_BATCH if on_gpu else CPU_BATCH
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pipelines: dict[int, Any] = {}

    def decode(self, tasks: Sequence[DecodeTask], side: int) -> tuple[Tensor, list[str]]:
        """Images in batches of bounded size; the result lies on the GPU if DALI decodes there."""
        contents = list(self._pool.map(_read, tasks))
        pixels = torch.full((len(tasks), 3, side, side), GREY, dtype=torch.uint8, device=self._device)
        reasons = [content if isinstance(content, str) else "" for content in contents]
        good = [i for i, content in enumerate(contents) if isinstance(content, bytes)]
        for start in range(0, len(good), self._batch):
            part = good[start : start + self._batch]
            batch = [(tasks[i], contents[i]) for i in part]
            try:
                pixels[part] = self._run(batch, side)
            except RuntimeError:  # one of them cannot be decoded, and DALI gives back none
                for i in part:
                    decoded = _one_by_one(tasks[i], contents[i], side)
                    if isinstance(decoded, str):
                        reasons[i] = decoded
                    else:
                        pixels[i] = decoded.to(pixels.device)
        return pixels, reasons

    def close(self) -> None:
        """End the threads and drop the pipelines."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pipelines.clear()

    def _run(self, batch: Sequence[tuple[DecodeTask, Any]], side: int) -> Tensor:
        if side not in self._pipelines:
            self._pipelines[side] = self._build(side)
        pipeline = self._pipelines[side]
        windows = [task.window for task, _ in batch]
        pipeline.feed_input("encoded", [np.frombuffer(content, dtype=np.uint8) for _, content in batch])
        pipeline.feed_input("anchor", [np.array([w.top, w.left], dtype=np.float32) for w in windows])
        pipeline.feed_input("shape", [np.array([w.height, w.width], dtype=np.float32) for w in windows])
        (output,) = pipeline.run()
        if not self._resize_inside:
            crops = [output.at(i) for i in range(len(batch))]
            return torch.stack([resize(crop, Window(0, 0, *crop.shape[1::-1]), side) for crop in crops])
        # The memory belongs to the pipeline until its next run.
        return torch.from_dlpack(output.as_tensor()).clone()

    def _build(self, side: int) -> Any:
        from nvidia.dali import fn
        from nvidia.dali import types as dali_types
        from nvidia.dali.pipeline import Pipeline

        types: Any = dali_types  # its constants are made at import time
        on_gpu = self._device.type == "cuda"
        pipeline: Any = Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            anchor = fn.external_source(name="anchor", dtype=types.FLOAT, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.FLOAT, ndim=1)
            window = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                axis_names="HW",
                normalized_anchor=False,
                normalized_shape=False,
            )
            output: Any = window
            if self._resize_inside:
                output = fn.resize(window, size=(side, side), interp_type=types.INTERP_CUBIC, antialias=True)
                output = fn.transpose(output, perm=[2, 0, 1])
            pipeline.set_outputs(output)
        pipeline.build()
        return pipeline


def _read(task: DecodeTask) -> bytes | str:
    """The image's bytes, or why it cannot be used. The header check keeps huge images from DALI."""
    try:
        content = task.read()
        open_image(content)
        return content
    except (ImageDamagedError, BadImageError) as error:
        return str(error)


def _one_by_one(task: DecodeTask, content: Any, side: int) -> Tensor | str:
    try:
        return decode_one(content, task, side)
    except BadImageError as error:
        return str(error)
