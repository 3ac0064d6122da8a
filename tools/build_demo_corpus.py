"""Render the demo corpus (OpenMoji images with their names) into a folder.

    python tools/build_demo_corpus.py OUT

Makes OUT/train, OUT/heldout and OUT/tokenizer.json. May be interrupted and started again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lcl_mcore.data.demo_corpus import build
from lcl_mcore.errors import LclError


def main() -> int:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--heldout-share", type=float, default=0.1, help="share of the concepts kept for evaluation"
    )
    parser.add_argument("--variants", type=int, default=6, help="images per concept, skin tones included")
    parser.add_argument("--vocabulary", type=int, default=1_500, help="text ids of the trained tokenizer")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--quiet", action="store_true", help="no progress line")
    args = parser.parse_args()
    try:
        result = build(
            args.output,
            heldout_share=args.heldout_share,
            variants=args.variants,
            vocabulary=args.vocabulary,
            workers=args.workers,
            quiet=args.quiet,
        )
    except LclError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
