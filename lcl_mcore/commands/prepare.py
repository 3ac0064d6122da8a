"""Turn a public data format into the native one, or split a prepared data set (`tools/prepare_data.py`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from pydantic import Field, NonNegativeInt, PositiveInt

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass

if TYPE_CHECKING:
    from lcl_mcore.data.prepare.records import Reader

MIN_SIDES = {"html": 64, "pairs": 32}
"""Pixels of the shorter side below which images are dropped, by format."""


@config_dataclass
class PrepareDataOptions:
    """Turn a public data format into the native one, or split a prepared data set into train and heldout.

    May be killed at any moment and started again; a second run changes nothing. Input that has changed is noticed.
    """

    format: tyro.conf.Positional[Literal["mmc4", "obelics", "omnicorpus", "pairs", "html", "split"]]
    """Format of the input: mmc4, obelics, omnicorpus, pairs or html; or split."""
    input: tyro.conf.Positional[Path]
    """Folder or file of the input; split: the prepared data set."""
    output: tyro.conf.Positional[Path]
    """Folder of the prepared data set."""
    images: Path | None = None
    """Folder of the downloaded images; by default INPUT/images."""
    max_pixels: PositiveInt = 40_000_000
    """Larger images are dropped."""
    min_side: NonNegativeInt | None = None
    """Smaller images are dropped; by default 64 pixels for html, else 32."""
    max_aspect: Annotated[float, Field(ge=1)] = 20.0
    """Narrower images are dropped."""
    shrink_to: NonNegativeInt = 0
    """Shorter side after shrinking; 0: keep."""
    max_repeats: NonNegativeInt = 0
    """Drop images used in more documents than this; 0: no limit."""
    max_duplicates: NonNegativeInt = 0
    """omnicorpus: largest allowed *_dup_count."""
    max_line_mb: PositiveInt = 128
    """mmc4: longer lines are dropped; images as base64 take a third more than their files."""
    keep_text_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep documents left without an image."""
    heldout_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """split: share of the documents that are held out."""
    seed: int = 0
    """split: which documents are held out."""
    shard_megabytes: PositiveInt = 1024
    """Size at which a shard is closed."""
    update: tyro.conf.FlagCreatePairsOff[bool] = False
    """Bring a finished data set up to date with its changed input; only what changed is prepared again."""
    workers: PositiveInt = os.cpu_count() or 1
    """Processes."""
    quiet: tyro.conf.FlagCreatePairsOff[bool] = False
    """No progress bar."""


def main() -> int:
    """Parse the command line and prepare."""
    options = arguments.parse(PrepareDataOptions)

    from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
    from lcl_mcore.data.prepare.normalise import ImageLimits
    from lcl_mcore.data.prepare.split import split

    if options.format == "split":
        parts = split(
            options.input, options.output, heldout_share=options.heldout_share, seed=options.seed, quiet=options.quiet
        )
        print(json.dumps(parts, indent=1))
        return 0
    limits = ImageLimits(
        max_pixels=options.max_pixels,
        min_side=MIN_SIDES.get(options.format, 32) if options.min_side is None else options.min_side,
        max_aspect=options.max_aspect,
        shrink_to=options.shrink_to,
    )
    rules = PrepareOptions(
        limits=limits,
        max_repeats=options.max_repeats,
        require_image=not options.keep_text_only,
        shard_bytes=options.shard_megabytes << 20,
    )
    manifest = prepare(
        build_reader(options),
        options.output,
        rules,
        workers=options.workers,
        quiet=options.quiet,
        update=options.update,
    )
    shown = (
        *("documents", "images", "bytes", "fingerprint"),
        *("seen_documents", "seen_images", "dropped_documents", "dropped_images"),
    )
    print(json.dumps({name: manifest[name] for name in shown}, indent=1))
    return 0


def build_reader(options: PrepareDataOptions) -> Reader:
    """The reader of the chosen format."""
    from lcl_mcore.data.prepare.html import HtmlReader
    from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
    from lcl_mcore.data.prepare.pairs import PairReader
    from lcl_mcore.data.prepare.parquet import ParquetReader

    if options.format == "mmc4":
        return Mmc4Reader(options.input, options.images, max_line_bytes=options.max_line_mb << 20)
    if options.format in ("obelics", "omnicorpus"):
        return ParquetReader(options.input, options.images, max_duplicates=options.max_duplicates)
    return PairReader(options.input) if options.format == "pairs" else HtmlReader(options.input)


if __name__ == "__main__":
    run_main(main)
