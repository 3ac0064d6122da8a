"""Builds runs in bf16 from files, in several layouts of one launch, and compares this rank's master weights.

Arguments: a folder with `model.safetensors` and `config.yaml`, and one with an encoder of timm. The first rank prints,
per layout, first for the model and then for the encoder, how many elements of masters were compared over all ranks, how
many differ from the file, how many parameters are not their master rounded, and how many masters bf16 could hold.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lcl_mcore.build import build_training
from lcl_mcore.checkpoint.shards import WEIGHTS, training_shards
from lcl_mcore.checkpoint.weights_file import VOCABULARY, read_consolidated
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.config.schema import ParallelConfig
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import make_groups
from lcl_mcore.interop.init_from import read_encoder

LAYOUTS = {
    "dp4": ParallelConfig(),
    "tp2-dp2-sp": ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, vision_parallel="tensor"),
    "tp2-pp2": ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2),
}


def compare(folder: Path, source: Path, parallel: ParallelConfig) -> list[int]:
    device = pick_device("cpu")
    groups = make_groups(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, 60, 1)
    config = read_config(folder / "config.yaml")
    config = replace(config, parallel=parallel, train=replace(config.train, precision="bf16"))
    training = build_training(config, detached(device, groups), init_from=source)
    stored = read_consolidated(source) if source == folder else read_encoder(source, config.model.vision)[0]
    counts = torch.zeros(4, dtype=torch.int64)
    for shard in training_shards(training.model, training.optimizer, (groups.tp.rank(), groups.tp.size())):
        name = shard.key.removeprefix(WEIGHTS)
        if name not in stored:  # a moment, or not the encoder's
            continue
        for box in shard.boxes(shard.flat):
            whole = stored[name]
            if name in VOCABULARY:  # padding rows are zero
                whole = torch.cat((whole, whole.new_zeros(box.shape[0] - len(whole), *whole.shape[1:])))
            place = tuple(slice(a, a + n) for a, n in zip(box.offset, box.tensor.shape, strict=True))
            counts[0] += box.tensor.numel()
            counts[1] += int((box.tensor != whole[place]).sum())
            counts[3] += int((box.tensor == box.tensor.bfloat16()).sum())
    for parameter, start, (master, _, _) in training.optimizer.owned():
        held = parameter.detach().view(-1)[start : start + master.numel()]
        counts[2] += int((held != master.view(-1).to(held.dtype)).sum())
    dist.all_reduce(counts, group=groups.host_control)
    return counts.tolist()


def main() -> None:
    init_process_group(pick_device("cpu"), 60)
    found: dict[str, list[list[int]]] = {}
    for name, parallel in LAYOUTS.items():
        for source in map(Path, sys.argv[1:]):
            found.setdefault(name, []).append(compare(Path(sys.argv[1]), source, parallel))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
