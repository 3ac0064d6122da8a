"""Get real interleaved documents: Debian documentation packages, unpacked without installing them.

python tools/fetch_corpora.py OUT [PACKAGE ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcl_mcore.data.corpora import PACKAGES, fetch
from lcl_mcore.errors import LclError


def main() -> int:
    """Parse the command line and fetch."""
    listing = "\n".join(f"  {name}: {about}" for name, about in PACKAGES.items())
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"packages:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("packages", nargs="*", default=["python-skimage-doc"])
    args = parser.parse_args()
    try:
        for package in args.packages:
            print(fetch(package, args.output))
    except LclError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
