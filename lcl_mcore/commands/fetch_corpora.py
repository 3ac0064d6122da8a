"""Get real interleaved documents: Debian documentation packages (`tools/fetch_corpora.py`)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import tyro

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import require_writable

PACKAGES = {
    "python-skimage-doc": "BSD-3-Clause, 46 MB: 141 pages with images",
    "opencv-doc": "Apache-2.0, 96 MB: tutorials with photographs",
    "python-sklearn-doc": "BSD-3-Clause, 50 MB: 537 pages with images",
    "dataset-fashion-mnist": "MIT, 31 MB: 70,000 labelled images for evaluation",
}

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
    require_writable(options.output, "OUTPUT")
    for package in options.packages:
        print(fetch(package, options.output))
    return 0


def fetch(package: str, folder: Path) -> Path:
    """Unpack one package below `folder`; does nothing if it is there.

    Returns:
        The folder of its files.

    Raises:
        DataError: another package, no apt-get or dpkg-deb, or the download failed.
    """
    if package not in PACKAGES:
        raise DataError(explain(package, f"is not one of {', '.join(PACKAGES)}", "Choose one of these."))
    folder = folder.resolve()  # the commands below run in a folder of their own
    target = folder / package
    if target.is_dir():
        return target
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DataError(explain(tool, "is not installed", "Run this on Debian, Ubuntu or in such a container."))
    downloads, part = folder / ".download", folder / f".{package}.part"
    downloads.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(part, ignore_errors=True)
    patience = ["-o", "Acquire::http::Timeout=30", "-o", "Acquire::Retries=2"]
    _run(["apt-get", "download", package, *patience], downloads)
    archives = sorted(downloads.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    if not archives:
        raise DataError(explain(package, "was not downloaded", "Run apt-get update first."))
    _run(["dpkg-deb", "-x", str(archives[-1]), str(part)], folder)
    part.replace(target)
    archives[-1].unlink()
    return target


def _run(command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(explain(" ".join(command), f"failed: {last}", "Run apt-get update, check the network."))


if __name__ == "__main__":
    run_main(main)
