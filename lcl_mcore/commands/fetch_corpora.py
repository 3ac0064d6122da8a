"""Get real interleaved documents: Debian documentation packages (`tools/fetch_corpora.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass
from lcl_mcore.data.corpora import PACKAGES, fetch

_ABOUT = "; ".join(f"{name} ({about})" for name, about in PACKAGES.items())


@config_dataclass
class FetchOptions:
    """Get real interleaved documents: Debian documentation packages, unpacked without installing them."""

    output: tyro.conf.Positional[Path]
    """Folder to unpack into."""
    packages: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(help=f"Packages: {_ABOUT}.")] = (
        "python-skimage-doc",
    )


def main() -> int:
    """Parse the command line and fetch."""
    options = arguments.parse(FetchOptions)
    for package in options.packages:
        print(fetch(package, options.output))
    return 0
