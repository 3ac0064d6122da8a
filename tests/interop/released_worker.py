"""Both losses of imported released weights, split over the tensor-parallel ranks that torchrun started.

    torchrun --nproc-per-node 2 tests/interop/released_worker.py FOLDER

Rank 0 prints them as JSON; FOLDER holds `model.safetensors`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from lcl_kernels import infonce_reference

from lcl_mcore.checkpoint.weights_file import load_consolidated, read_consolidated
from lcl_mcore.config.schema import ParallelConfig, single_process
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.losses.generation import generation_loss_sum
from lcl_mcore.models.backends import choose_backends
from lcl_mcore.models.lcl import LclModel


def main() -> None:
    """Load this rank's share, run the batch of rank 0, print."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent / "models")]
    from test_released import SHAPE, released_batch

    device = pick_device("cpu")
    init_process_group(device, 60)
    tp = dist.get_world_size()
    groups = make_groups(tp, 1, 60, 1)
    parallel = ParallelConfig(tensor_parallel_size=tp, vision_parallel="tensor")
    config = replace(single_process(SHAPE), parallel=parallel)
    model = LclModel(config, groups, device.device, choose_backends(config, device.device))
    load_consolidated(model, read_consolidated(Path(sys.argv[1])), groups.tp.rank(), tp)
    batch = released_batch(0)
    with torch.no_grad():
        features, hidden = model(batch)
        image, context = model.image_embeds(batch, features.vectors), model.context_embeds(batch, hidden)
        contrastive = infonce_reference(image, context, model.temperature())
        generation = generation_loss_sum(
            model.language.targets(hidden, batch.target_positions),
            model.language.head_weight,
            batch.target_labels,
            vocab_start=model.language.vocab_range[0],
            vocab_size=SHAPE.language.vocab_size,
            tp_group=groups.tp,
        )
    if dist.get_rank() == 0:
        rows = tuple(model.language.head_weight.shape)
        print(json.dumps([contrastive.item(), generation.item() / len(batch.target_positions), rows]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
