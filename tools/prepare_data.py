"""Turn a public data format into the native one, or split a prepared set into train and heldout.

    python tools/prepare_data.py {mmc4,obelics,omnicorpus,pairs,html} INPUT OUTPUT
    python tools/prepare_data.py split PREPARED OUTPUT --heldout-share 0.1

May be killed at any moment and started again; a second run changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from lcl_mcore.data.images import MAX_PIXELS
from lcl_mcore.data.prepare.engine import PrepareOptions, Reader, prepare
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
from lcl_mcore.data.prepare.normalise import ImageLimits
from lcl_mcore.data.prepare.pairs import PairReader
from lcl_mcore.data.prepare.parquet import ParquetReader
from lcl_mcore.data.prepare.split import split
from lcl_mcore.errors import LclError

MIN_SIDES = {"html": 64, "pairs": 32}


def build_reader(args: argparse.Namespace) -> Reader:
    """The reader of the chosen format."""
    if args.format == "mmc4":
        return Mmc4Reader(args.input, args.images)
    if args.format in ("obelics", "omnicorpus"):
        return ParquetReader(args.input, args.images, max_duplicates=args.max_duplicates)
    return PairReader(args.input) if args.format == "pairs" else HtmlReader(args.input)


def main() -> int:
    """Parse the command line and prepare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("format", choices=["mmc4", "obelics", "omnicorpus", "pairs", "html", "split"])
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--images", type=Path, help="folder of the downloaded images (default: INPUT/images)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="larger images are dropped")
    parser.add_argument("--min-side", type=int, help="smaller images are dropped (default: by format)")
    parser.add_argument("--max-aspect", type=float, default=20.0, help="narrower images are dropped")
    parser.add_argument("--shrink-to", type=int, default=0, help="shorter side after shrinking (0: keep)")
    parser.add_argument(
        "--max-repeats", type=int, default=0, help="drop images used in more documents than this"
    )
    parser.add_argument(
        "--max-duplicates", type=int, default=0, help="omnicorpus: largest allowed *_dup_count"
    )
    parser.add_argument("--keep-text-only", action="store_true", help="keep documents left without an image")
    parser.add_argument("--heldout-share", type=float, default=0.1, help="split: share of the documents")
    parser.add_argument("--seed", type=int, default=0, help="split: which documents are held out")
    parser.add_argument("--shard-megabytes", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()
    limits = ImageLimits(
        max_pixels=args.max_pixels,
        min_side=MIN_SIDES.get(args.format, 32) if args.min_side is None else args.min_side,
        max_aspect=args.max_aspect,
        shrink_to=args.shrink_to,
    )
    options = PrepareOptions(
        limits=limits,
        max_repeats=args.max_repeats,
        require_image=not args.keep_text_only,
        shard_bytes=args.shard_megabytes << 20,
    )
    try:
        if args.format == "split":
            parts = split(
                args.input, args.output, heldout_share=args.heldout_share, seed=args.seed, quiet=args.quiet
            )
            print(json.dumps(parts, indent=1))
            return 0
        manifest = prepare(build_reader(args), args.output, options, workers=args.workers, quiet=args.quiet)
    except LclError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    shown = ("documents", "images", "bytes", "fingerprint", "dropped_documents", "dropped_images")
    print(json.dumps({name: manifest[name] for name in shown}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
