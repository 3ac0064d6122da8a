"""Decoding by NVIDIA DALI: on a GPU beside training, and on a CPU for tests of the same pipeline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from lcl_mcore import optional_packages
from lcl_mcore.data.crop import Window
from lcl_mcore.data.decode import GREY, DecodeTask, decode_one, is_ordinary_jpeg, resize
from lcl_mcore.data.format import ImageDamagedError
from lcl_mcore.data.images import BadImageError, open_image
from lcl_mcore.distributed.device import SideStream
from lcl_mcore.errors import ConfigError, DataError, explain

logger = logging.getLogger(__name__)
GPU_BATCH, CPU_BATCH = 64, 4  # DALI on a CPU gains nothing from more, and holds every decoded image meanwhile
MAX_REFUSALS = 3
REMEDY = "pip install nvidia-dali-cuda130 (or -cuda120); the package named nvidia-dali is not NVIDIA's."
PLACEHOLDER = simplejpeg.encode_jpeg(np.full((16, 16, 3), GREY, dtype=np.uint8)), Window(0, 0, 16, 16)
"""Stands in a batch for an image that cannot be read."""


class DaliDecoder:
    """Decode and crop in one operator of NVIDIA DALI, then a bicubic resize with antialiasing.

    On a GPU (JPEG by nvJPEG) the pipeline also resizes. Without one its resize is six times slower than torch's
    vectorised kernel, so the pipeline ends after decoder and crop, and torch resizes. Crop windows are fed per image,
    so the output of one image does not depend on which others are in its batch, and DALI holds no random state.

    DALI gives back nothing of a batch with one bad image. That batch is decoded image by image on the CPU, and the
    pipeline is built anew. Where the CPU finds nothing wrong, again and again, the fault is DALI's and ends the run.

    Args:
        threads: for reading and for DALI's CPU operators.
        device: where it decodes; the pixels stay there.
        side_stream: on which it does so; whoever uses the pixels takes them over.
        resize_inside: whether DALI's own operator resizes (default: on a GPU).

    Raises:
        ConfigError: DALI is not installed.
    """

    name = "dali"

    def __init__(
        self, threads: int, device: torch.device, side_stream: SideStream, *, resize_inside: bool | None = None
    ) -> None:
        probe = optional_packages.dali()
        if not probe.usable:
            raise ConfigError(
                explain("data.decode_backend = dali", f"DALI cannot be imported ({probe.reason})", REMEDY)
            )
        self._threads = threads
        self._device = device
        self._side_stream = side_stream
        self._on_gpu = device.type == "cuda"
        self._resize_inside = self._on_gpu if resize_inside is None else resize_inside
        self._batch = GPU_BATCH if self._on_gpu else CPU_BATCH
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pipelines: dict[int, Any] = {}
        self._refused = 0
        self._refused_in_vain = 0

    def decode(self, tasks: Sequence[DecodeTask], side: int) -> tuple[Tensor, list[str]]:
        """Images in batches of bounded size; the result lies where DALI decodes.

        Raises:
            ConfigError: DALI cannot build its pipeline here.
            DataError: it refuses batch after batch of images that the CPU decodes.
        """
        contents = list(self._pool.map(_read, tasks))
        reasons = [content if isinstance(content, str) else "" for content in contents]
        with self._side_stream.current():
            pixels = torch.empty((len(tasks), 3, side, side), dtype=torch.uint8, device=self._device)
            for start in range(0, len(tasks), self._batch):
                part = slice(start, start + self._batch)
                reasons[part] = self._decode_batch(tasks[part], contents[part], pixels[part])
        return pixels, reasons

    def close(self) -> None:
        """End the threads and drop the pipelines."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pipelines.clear()

    def _decode_batch(self, tasks: Sequence[DecodeTask], contents: Sequence[bytes | str], out: Tensor) -> list[str]:
        """Fill `out` [n, 3, H, W]; why an image could not be used ('' if it could)."""
        readable = [
            (content, task.window) if isinstance(content, bytes) else PLACEHOLDER
            for task, content in zip(tasks, contents, strict=True)
        ]
        pipeline = self._pipeline(out.shape[-1])
        try:
            self._run(pipeline, readable, out)
            self._refused_in_vain = 0
        except RuntimeError as error:
            del self._pipelines[out.shape[-1]]
            return self._decode_on_cpu(tasks, contents, out, _first_line(error))
        for target, content in zip(out, contents, strict=True):
            if isinstance(content, str):
                target.fill_(GREY)
        return [content if isinstance(content, str) else "" for content in contents]

    def _decode_on_cpu(
        self, tasks: Sequence[DecodeTask], contents: Sequence[bytes | str], out: Tensor, cause: str
    ) -> list[str]:
        """What DALI refused as a whole, image by image."""
        reasons = [_decode_into(*each) for each in zip(out, contents, tasks, strict=True)]
        bad = [reason for reason, content in zip(reasons, contents, strict=True) if reason and content != reason]
        self._refused += 1
        self._refused_in_vain = 0 if bad else self._refused_in_vain + 1
        message = "DALI refused a batch (%s), number %d; of its %d images the CPU decoded all but %d"
        logger.warning(message, cause, self._refused, len(tasks), sum(map(bool, reasons)))
        if self._refused_in_vain >= MAX_REFUSALS:
            rule = f"refused {MAX_REFUSALS} batches in succession in which every image can be decoded, last: {cause}"
            raise DataError(explain("DALI", rule, "Use --data.decode-backend cpu."))
        return reasons

    def _run(self, pipeline: Any, batch: Sequence[tuple[bytes, Window]], out: Tensor) -> None:
        pipeline.feed_input("encoded", [np.frombuffer(content, dtype=np.uint8) for content, _ in batch])
        pipeline.feed_input("anchor", [np.array([w.top, w.left], dtype=np.float32) for _, w in batch])
        pipeline.feed_input("shape", [np.array([w.height, w.width], dtype=np.float32) for _, w in batch])
        (output,) = pipeline.run(self._side_stream.handle)
        if self._resize_inside:
            out.copy_(torch.from_dlpack(output.as_tensor()))  # its memory belongs to the pipeline
            return
        for i, target in enumerate(out):
            crop = output.at(i)
            target.copy_(resize(crop, Window(0, 0, *crop.shape[1::-1]), out.shape[-1]))

    def _pipeline(self, side: int) -> Any:
        """The pipeline of one image size, built when it is first needed."""
        if side not in self._pipelines:
            try:
                self._pipelines[side] = self._build(side)
            except RuntimeError as error:
                rule = f"its pipeline cannot be built on {self._device} ({_first_line(error)})"
                remedy = "Use --data.decode-backend cpu, or a DALI that fits the driver."
                raise ConfigError(explain("DALI", rule, remedy)) from error
        return self._pipelines[side]

    def _build(self, side: int) -> Any:
        from nvidia.dali import fn
        from nvidia.dali import types as dali_types
        from nvidia.dali.pipeline import Pipeline

        types: Any = dali_types  # its constants are made at import time
        pipeline: Any = Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if self._on_gpu else None,
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
                device="mixed" if self._on_gpu else "cpu",
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
    """The image's bytes, or why it cannot be used. The look at the header keeps huge images from DALI."""
    try:
        content = task.read()
        if not is_ordinary_jpeg(content, task):
            open_image(content)
        return content
    except (ImageDamagedError, BadImageError) as error:
        return str(error)


def _decode_into(target: Tensor, content: bytes | str, task: DecodeTask) -> str:
    """Fill `target` [3, side, side] on the CPU; grey and a reason if that fails."""
    reason = content if isinstance(content, str) else ""
    if isinstance(content, bytes):
        try:
            target.copy_(decode_one(content, task, target.shape[-1]))
        except BadImageError as error:
            reason = str(error)
    if reason:
        target.fill_(GREY)
    return reason


def _first_line(error: Exception) -> str:
    """DALI's messages go on with a stack of C++ calls."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
