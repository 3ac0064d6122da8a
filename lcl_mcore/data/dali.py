"""NVIDIA DALI as a decoder: on the GPU where there is one (JPEG by nvJPEG), else its CPU operators.

On a GPU the pipeline also resizes. Without one its resize is six times slower than torch's vectorised
kernel, so the pipeline ends after decoder and crop, and torch resizes. Crop windows are fed per image,
so the output of one image does not depend on which others are in its batch, and DALI holds no random
state. DALI stops a whole batch at one bad image; that batch is then decoded image by image with
Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lcl_mcore.data.dataset import ImageDamagedError
from lcl_mcore.data.decode import GREY, Job, decode_one, resize
from lcl_mcore.data.images import BadImageError, open_image
from lcl_mcore.errors import ConfigError, explain

GPU_BATCH, CPU_BATCH = 64, 4  # a CPU gains nothing from more, and holds every decoded image meanwhile
REMEDY = "pip install nvidia-dali-cuda130 (or -cuda120); the package named nvidia-dali is not NVIDIA's."


def installed() -> bool:
    """Whether NVIDIA's own package is there."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class DaliDecoder:
    """Decode and crop in one operator, then a bicubic resize with antialiasing.

    resize_inside   whether DALI's own operator resizes (default: on a GPU)
    """

    name = "dali"

    def __init__(self, threads: int, *, resize_inside: bool | None = None) -> None:
        if not installed():
            raise ConfigError(explain("data.decode_backend = dali", "nvidia.dali cannot be imported", REMEDY))
        self._threads = threads
        self._on_gpu = torch.cuda.is_available()
        self._resize_inside = self._on_gpu if resize_inside is None else resize_inside
        self._batch = GPU_BATCH if self._on_gpu else CPU_BATCH
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._pipelines: dict[int, Any] = {}

    def decode(self, jobs: Sequence[Job], side: int) -> tuple[Tensor, list[str]]:
        """Images in batches of bounded size; the result lies on the GPU if DALI decodes there."""
        contents = list(self._pool.map(_read, jobs))
        pixels = torch.full((len(jobs), 3, side, side), GREY, dtype=torch.uint8, device=self._device())
        reasons = [content if isinstance(content, str) else "" for content in contents]
        good = [i for i, content in enumerate(contents) if isinstance(content, bytes)]
        for start in range(0, len(good), self._batch):
            part = good[start : start + self._batch]
            batch = [(jobs[i], contents[i]) for i in part]
            try:
                pixels[part] = self._run(batch, side)
            except RuntimeError:  # one of them cannot be decoded, and DALI gives back none
                for i in part:
                    decoded = _one_by_one(jobs[i], contents[i], side)
                    if isinstance(decoded, str):
                        reasons[i] = decoded
                    else:
                        pixels[i] = decoded.to(pixels.device)
        return pixels, reasons

    def close(self) -> None:
        """Give back threads and pipelines."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pipelines.clear()

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self._on_gpu else torch.device("cpu")

    def _run(self, batch: Sequence[tuple[Job, Any]], side: int) -> Tensor:
        if side not in self._pipelines:
            self._pipelines[side] = self._build(side)
        pipeline = self._pipelines[side]
        windows = [job.window for job, _ in batch]
        pipeline.feed_input("encoded", [np.frombuffer(content, dtype=np.uint8) for _, content in batch])
        pipeline.feed_input("anchor", [np.array([w.top, w.left], dtype=np.float32) for w in windows])
        pipeline.feed_input("shape", [np.array([w.height, w.width], dtype=np.float32) for w in windows])
        (output,) = pipeline.run()
        if not self._resize_inside:
            crops = [output.at(i) for i in range(len(batch))]
            return torch.stack([resize(torch.from_numpy(crop), side) for crop in crops])
        # The memory belongs to the pipeline until its next run.
        return torch.from_dlpack(output.as_tensor()).clone()

    def _build(self, side: int) -> Any:
        from nvidia.dali import fn
        from nvidia.dali import types as dali_types
        from nvidia.dali.pipeline import Pipeline

        types: Any = dali_types  # its constants are made at import time
        pipeline: Any = Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=torch.cuda.current_device() if self._on_gpu else None,
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


def _read(job: Job) -> bytes | str:
    """The image's bytes, or why it cannot be used. The header check keeps huge images from DALI."""
    try:
        content = job.read()
        open_image(content)
        return content
    except (ImageDamagedError, BadImageError) as error:
        return str(error)


def _one_by_one(job: Job, content: Any, side: int) -> Tensor | str:
    try:
        return decode_one(content, job, side)
    except BadImageError as error:
        return str(error)
