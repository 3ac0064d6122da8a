"""The pixels of a step's images: which back end decodes them, on how many threads, and what too many failures mean."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from lcl_mcore import optional_packages
from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.collate import ImagePlan
from lcl_mcore.data.dali import DaliDecoder
from lcl_mcore.data.decode import CpuDecoder, Decoder, DecodeTask
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.distributed.device import SideStream, take_over
from lcl_mcore.errors import DataError, explain

logger = logging.getLogger(__name__)
MAX_THREADS = 16  # more wait for the one that holds the interpreter's lock
ENOUGH_CORES = 4  # of one rank: they decode 2,000 images/s, more than a GPU trains on, and take nothing from it


def build_decoder(config: DataConfig, device: torch.device, side_stream: SideStream) -> Decoder:
    """The back end that a configuration asks for; `auto` takes DALI for a GPU with too few cores beside it.

    Args:
        side_stream: what DALI uses on a GPU.

    Raises:
        ConfigError: DALI is asked for and cannot be used.
    """
    few_cores = device.type == "cuda" and cores_of_rank() < ENOUGH_CORES
    threads = decode_threads(config)
    if config.decode_backend == "dali" or (
        config.decode_backend == "auto" and few_cores and optional_packages.dali().usable
    ):
        return DaliDecoder(threads, device, side_stream)
    return CpuDecoder(threads, device)


def decode_threads(config: DataConfig) -> int:
    """How many threads decode in this process; `auto`: its share of the cores that the node's ranks may use."""
    if config.decode_threads != "auto":
        return config.decode_threads
    return min(max(cores_of_rank(), 1), MAX_THREADS)


def cores_of_rank() -> int:
    """CPU cores for each rank of this node, which share what this process may run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class ImageReader:
    """Pixels for image plans, in their order. Too many failures one after the other stop the run.

    Attributes:
        side_stream: where device pixels are made; who uses them takes them over (`distributed.device.take_over`).
    """

    def __init__(self, config: DataConfig, mixture: Mixture, image_size: int, device: torch.device) -> None:
        self._config = config
        self._mixture = mixture
        self.side_stream = SideStream(device)
        self._decoder = build_decoder(config, device, self.side_stream)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")
        self._image_size = image_size
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
        decoding = self._thread.submit(self._decoder.decode, [self._task(image) for image in images], self._image_size)
        return partial(self._finish, images, decoding)

    def read(self, images: Sequence[ImagePlan]) -> tuple[Tensor, list[bool]]:
        """`begin` and wait; the current stream may use the pixels."""
        pixels, failed = self.begin(images)()
        take_over([pixels], self.side_stream.mark())
        return pixels, failed

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
