"""Reads and decodes the images of planned rows; turns failures into grey images and a count."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.collate import ImagePlan
from lcl_mcore.data.decode import Decoder, Job
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.errors import DataError, explain

logger = logging.getLogger(__name__)


class ImageReader:
    """Pixels for image plans, in their order. Too many failures in a row stop the run."""

    def __init__(self, config: DataConfig, mix: Mixture, decoder: Decoder, image_size: int) -> None:
        self._config = config
        self._mix = mix
        self._decoder = decoder
        self._side = image_size
        self._in_a_row = 0

    def read(self, images: Sequence[ImagePlan]) -> tuple[Tensor, list[bool]]:
        """uint8 [n, 3, H, W], and which of them failed."""
        pixels, reasons = self._decoder.decode([self._job(image) for image in images], self._side)
        for image, reason in zip(images, reasons, strict=True):
            self._in_a_row = self._in_a_row + 1 if reason else 0
            if not reason:
                continue
            logger.warning("%s: %s; a grey image takes its place", image.where, reason)
            if self._in_a_row >= self._config.max_consecutive_failures:
                remedy = "Check the storage, or prepare the data set again."
                rule = f"the {self._in_a_row}th image in a row that cannot be used, last: {reason}"
                raise DataError(explain(image.where, rule, remedy))
        return pixels, [bool(reason) for reason in reasons]

    def close(self) -> None:
        """End the decoder's threads."""
        self._decoder.close()

    def _job(self, image: ImagePlan) -> Job:
        laid = image.laid
        entry = laid.document.images[image.number]
        read = partial(
            self._mix.datasets[laid.source].image,
            laid.document,
            laid.members,
            image.number,
            verify=self._config.verify_images,
        )
        return Job(read, entry.width, entry.height, image.window)
