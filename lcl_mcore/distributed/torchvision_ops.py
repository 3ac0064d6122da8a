"""Makes torchvision importable beside a torch that its compiled part was not built for.

PyPI's torchvision is built for CUDA; with the CPU build of torch its library does not load, and its import then
fails because it attaches shape rules to operators that library would have declared. timm, open_clip and parts of
transformers import torchvision for its image transforms only. Declaring the names is enough for that.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import torch


@functools.cache
def make_importable() -> torch.library.Library | None:
    """Call before importing timm, open_clip or transformers; does nothing where torchvision is whole or absent.

    Returns:
        What holds the declarations alive, None if there is nothing to declare.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    rules = folder / "_meta_registrations.py"
    names = (
        re.findall(r'register_fake\("torchvision::(\w+)"\)', rules.read_text("utf-8"))
        if rules.is_file()
        else []
    )
    if not names or _compiled_part_loads(folder):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in names:
        library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    return library


def _compiled_part_loads(folder: Path) -> bool:
    """Whether torchvision's operators come from its own library, as they should."""
    for path in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
        except OSError:
            continue
        return True
    return False
