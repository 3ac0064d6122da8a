"""The wheel alone, away from the checkout: train on two processes, then export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the content of the wheel, and nothing else."""
    source, wheels, site = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site"))
    for name in ("lcl_mcore", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", wheels, source]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_files_to_an_exported_encoder(installed: Path, arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    where = run("-c", "import lcl_mcore, lcl_kernels; print(lcl_mcore.__file__, lcl_kernels.__file__)")
    assert where.stdout == f"{installed}/lcl_mcore/__init__.py {installed}/lcl_kernels/__init__.py\n"
    flags = arguments(tmp_path / "run", "--steps", "2")[1:]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    trained = run(*two, "-m", "lcl_mcore.commands.pretrain", *flags)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert f"checkpoint {tmp_path}/run/checkpoints/step-00000002 complete after" in trained.stdout
    exported = run("-m", "lcl_mcore", "export", "run", "--out", "encoder", "--formats", "full")
    assert (exported.returncode, exported.stdout) == (0, "encoder/full\nencoder/README.md\n"), exported.stderr[-3000:]
    assert {path.name for path in (tmp_path / "encoder" / "full").iterdir()} >= {"model.safetensors", "config.yaml"}
