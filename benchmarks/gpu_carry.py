"""Carry what a GPU machine without a network lacks: packed into a folder here, used from it there.

    python benchmarks/gpu_carry.py .gpu --python 3.12 --has torch numpy    # `make gpu-carry`
    python tools/gpu_report.py --carried .gpu                              # there

The folder holds the wheels of every dependency of this package at the version that is installed here, but for those
that the machine has. A folder or archive `te` beside them (`transformer_engine`, `transformer_engine_torch`, built for
that machine's torch) is put on the path as well. Needs only the standard library and pip.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

PACKAGE = "lcl-mcore"
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis")
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014", "1"))
NEEDED = re.compile(r"^([A-Za-z0-9._-]+)")


def wheels(has: set[str]) -> list[str]:
    """`name==version` of what this package and its tests need, without `has` and what only those need."""
    pinned: dict[str, str] = {}
    waiting = [PACKAGE, *TEST_TOOLS]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in pinned or name in has:
            continue
        try:
            pinned[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform or Python
            continue
        required = importlib.metadata.requires(name) or []
        waiting += [m[1] for text in required if "extra ==" not in text and (m := NEEDED.match(text))]
    return sorted(f"{name}=={version}" for name, version in pinned.items() if name != PACKAGE)


def pack(folder: Path, python: str, has: set[str]) -> None:
    """Download the wheels for this version of Python."""
    words = ["download", "-q", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for platform in PLATFORMS:
        words += ["--platform", platform]
    words += ["--dest", str(folder / "wheels"), *wheels(has)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)


def unpack(carried: Path, folder: Path, root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Install what was carried into `folder`, without a network.

    Returns:
        The environment in which the package of the checkout `root` imports, and what Transformer Engine wants on top;
        apart, since megatron-core does not import beside one that does not load.
    """
    site = folder / "site"
    words = ["install", "-q", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", str(site)]
    files = sorted(str(wheel) for wheel in (carried / "wheels").glob("*.whl"))
    subprocess.run([sys.executable, "-m", "pip", *words, *files], check=True)
    (site / "lcl_kernels").symlink_to(root / "kernels")
    path = os.pathsep.join([str(root), str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    te = (carried / "te").resolve()
    if (archive := carried / "te.tar.xz").is_file():
        te = folder / "te"
        with tarfile.open(archive) as file:
            file.extractall(te, filter="data")
    return {"PYTHONPATH": path}, transformer_engine(te, path) if te.is_dir() else {}


def transformer_engine(folder: Path, path: str) -> dict[str, str]:
    """Environment of Transformer Engine outside site-packages, which looks for NVIDIA's libraries beside itself."""
    found = importlib.util.find_spec("nvidia")
    libraries = Path(next(iter(found.submodule_search_locations or [""]))) if found else Path("/usr/local/cuda")
    homes = dict.fromkeys(("CUDNN_HOME", "NVRTC_HOME", "CURAND_HOME", "CUBLAS_HOME", "CUDART_HOME"), str(libraries))
    loaded = [*map(str, sorted(libraries.glob("*/lib"))), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return homes | {"PYTHONPATH": f"{path}{os.pathsep}{folder}", "LD_LIBRARY_PATH": os.pathsep.join(loaded)}


def main() -> None:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="version there")
    parser.add_argument("--has", nargs="*", default=["torch", "numpy"], help="packages that are installed there")
    args = parser.parse_args()
    pack(args.folder, args.python, set(args.has))
    size = sum(wheel.stat().st_size for wheel in (args.folder / "wheels").glob("*.whl"))
    print(f"{args.folder}: {size / 1e6:.0f} MB of wheels")


if __name__ == "__main__":
    main()
