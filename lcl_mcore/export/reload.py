"""Loads exported encoders in a process of its own, as their users would, and returns their features.

The process matters: megatron-core on a CPU needs stand-ins for CUDA calls, beside which other packages' loaders
do not work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcl_mcore.config.base import from_dict, to_dict
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError, explain
from lcl_mcore.export.formats import FORMATS

SECONDS = 1800.0


@dataclass(frozen=True)
class ReloadRequest:
    """One folder to load: its format (a key of `FORMATS`), the encoder's shape, and uint8 images [n, 3, S, S]."""

    format: str
    folder: Path
    shape: VisionConfig
    images: Tensor


def reload_features(requests: Sequence[ReloadRequest]) -> list[Tensor]:
    """Features of every request's images, fp32 [n, P, h] each.

    Raises:
        CheckpointError: a package failed to load what was written for it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({str(i): r.images.contiguous() for i, r in enumerate(requests)}, folder / "images.safetensors")
        items = [[r.format, str(r.folder.resolve()), to_dict(r.shape)] for r in requests]
        (folder / "requests.json").write_text(json.dumps(items), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "lcl_mcore.export.reload", str(folder)],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise CheckpointError(
                explain(
                    "the exported files",
                    f"could not be loaded again ({last})",
                    "Report this with the versions of the packages.",
                )
            )
        features = load_file(folder / "features.safetensors")
    return [features[str(i)] for i in range(len(items))]


@torch.no_grad()
def main(folder: Path) -> None:
    """Answer the requests that lie in `folder`."""
    from lcl_mcore.distributed.cpu import make_torchvision_importable

    held = make_torchvision_importable()
    images = load_file(folder / "images.safetensors")
    features = {}
    for i, (name, place, tree) in enumerate(json.loads((folder / "requests.json").read_text("utf-8"))):
        shape = from_dict(VisionConfig, tree, "requests.json")
        features[str(i)] = FORMATS[name].features(shape, Path(place), images[str(i)]).contiguous()
    save_file(features, folder / "features.safetensors")
    del held


if __name__ == "__main__":
    main(Path(sys.argv[1]))
