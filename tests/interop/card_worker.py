"""Runs the model card's snippets, in a process without megatron-core.

Arguments: a folder with `snippets.json`, a list of [shape, format or "llava", snippet]; `found.safetensors` holds what
they call `tokens` and `mean`, and what a LLaVA's own projector is given.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from lcl_mcore.distributed.cpu import make_torchvision_importable
from lcl_mcore.export.encoder import random_images

HELD = make_torchvision_importable()

import open_clip
import timm
import transformers

TEXT = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HOLE = 63


def read_by_llava(names: dict[str, Any], pixels: torch.Tensor) -> torch.Tensor:
    """Generate a token for each image; the input of the projector's first matrix."""
    llava, seen = names["llava"].eval(), []
    projector = llava.model.multi_modal_projector
    own = projector[1] if isinstance(projector, torch.nn.Sequential) else projector
    own.linear_1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    llava.config.image_token_id = llava.model.config.image_token_id = HOLE
    tokens = torch.full((len(pixels), llava.config.image_seq_length + 2), HOLE)
    tokens[:, 0], tokens[:, -1] = 1, 2
    llava(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens))
    return seen[0].contiguous()


@torch.no_grad()
def main(folder: Path) -> None:
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in random_images(48)]
    found, pixels = {}, torch.empty(0)
    for shape, name, snippet in json.loads((folder / "snippets.json").read_text()):
        names: dict[str, Any] = {
            "copy": copy,
            "images": images,
            "open_clip": open_clip,
            "text_config": transformers.LlamaConfig(**TEXT),
            "timm": timm,
            "torch": torch,
            "transformers": transformers,
        }
        exec(snippet, names)
        if name == "llava":
            found[f"{shape}/llava"] = read_by_llava(names, pixels)
            continue
        pixels = names["pixels"]
        found |= {f"{shape}/{name}/{key}": names[key].contiguous() for key in ("tokens", "mean") if key in names}
    save_file(found, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
