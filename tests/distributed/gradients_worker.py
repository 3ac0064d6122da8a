"""Trains one step in several layouts and compares losses and all gradients with the plain reference model.

Started by torchrun; rank 0 prints a JSON list with one entry per case.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from batches import SHAPES, Document, micro_batch, with_rates
from lcl_mcore.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.build import build_training
from lcl_mcore.config.schema import DataConfig, LossConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from lcl_mcore.distributed.context import detached
from lcl_mcore.distributed.device import init_process_group, pick_device
from lcl_mcore.distributed.groups import Groups, make_groups
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optimizer import Optimizer
from reference_model import ReferenceLcl, reference_grads_as_lcl, worst_gradient

ROW = 64
# Rows of the global batch, four data-parallel quarters: ragged, without images, dense, without contexts.
QUARTERS: list[list[list[Document]]] = [
    [[(5, "i", 3, "i", 4), ("i", 6)], [("i", 2, "i", "i", 3)]],
    [[(9,), (20,)], [(30,)]],
    [[(4, "i"), (3, "i"), (2, "i", 1)], [(7, "i", 2, "i")]],
    [[("i", 6)], [(8,)]],
]


# By number of processes. `stage_layers` says how many LM layers the first stage has, see `fit`.
LAYOUTS: dict[int, list[ParallelConfig]] = {
    1: [ParallelConfig()],
    2: [
        ParallelConfig(),
        ParallelConfig(pipeline_parallel_size=2, stage_layers=(0, 2), recompute_language="selective"),
        ParallelConfig(tensor_parallel_size=2, vision_parallel="tensor"),
        ParallelConfig(
            tensor_parallel_size=2, vision_parallel="tensor", sequence_parallel=True, recompute_vision="block:1"
        ),
        ParallelConfig(tensor_parallel_size=2, vision_parallel="data"),
        ParallelConfig(
            tensor_parallel_size=2, vision_parallel="data", sequence_parallel=True, recompute_vision="selective"
        ),
    ],
    4: [
        ParallelConfig(),
        ParallelConfig(
            pipeline_parallel_size=2, stage_layers=(1, 1), recompute_vision="full", recompute_language="block:1"
        ),
        ParallelConfig(pipeline_parallel_size=4, stage_layers=(1, 1, 1, 1)),
        ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, stage_layers=(1, 1), vision_parallel="data"),
        ParallelConfig(
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            stage_layers=(1, 1),
            vision_parallel="tensor",
            sequence_parallel=True,
        ),
        ParallelConfig(tensor_parallel_size=2, vision_parallel="data", sequence_parallel=True),
        ParallelConfig(tensor_parallel_size=2, vision_parallel="tensor", sequence_parallel=True),
    ],
}


def fit(shape: ModelConfig, parallel: ParallelConfig) -> tuple[ModelConfig, ParallelConfig]:
    """Give a pipeline of four stages four layers, and put what the first stage leaves on the others."""
    if parallel.stage_layers is None:
        return shape, parallel
    if parallel.pipeline_parallel_size == 4:
        return dataclasses.replace(shape, language=dataclasses.replace(shape.language, layers=4)), parallel
    first = parallel.stage_layers[0]
    return shape, dataclasses.replace(parallel, stage_layers=(first, shape.language.layers - first))


def config_for(shape: ModelConfig, parallel: ParallelConfig, **loss: Any) -> RunConfig:
    return RunConfig(
        model=shape,
        data=DataConfig(sequence_length=ROW),
        loss=LossConfig(**loss),
        parallel=dataclasses.replace(parallel, timeout_seconds=60),
        train=TrainConfig(micro_batch_size=1, global_batch_size=8, seed=3),
    )


def quarter_batches(shape: ModelConfig) -> list[list[MicroBatch]]:
    """The global batch as four lists of single-row micro-batches, with identities unique in the batch."""
    result, images, rows = [], 0, 0
    for quarter in QUARTERS:
        micros = []
        for row in quarter:
            micro = micro_batch(shape, [row], ROW, seed=10 + rows)
            n = micro.images.shape[0]
            micros.append(
                dataclasses.replace(
                    micro, image_keys=torch.arange(images, images + n), sequence_keys=torch.tensor([rows])
                )
            )
            images, rows = images + n, rows + 1
        result.append(micros)
    return result


def merge(micros: list[MicroBatch]) -> MicroBatch:
    """Several micro-batches as one."""
    joined: dict[str, Any] = {"lengths": sum((m.lengths for m in micros), ())}
    tokens = images = 0
    shifted: dict[str, list[torch.Tensor]] = {}
    for m in micros:
        for name in ("image_starts", "context_positions", "target_positions"):
            shifted.setdefault(name, []).append(getattr(m, name) + tokens)
        shifted.setdefault("context_images", []).append(m.context_images + images)
        for name in ("tokens", "positions", "images", "target_labels", "image_keys", "sequence_keys", "group_ids"):
            shifted.setdefault(name, []).append(getattr(m, name))
        tokens, images = tokens + m.tokens.shape[0], images + m.images.shape[0]
    return MicroBatch(**joined, **{name: torch.cat(parts) for name, parts in shifted.items()})


def divide(rows: list[MicroBatch], parts: int) -> list[list[MicroBatch]]:
    """Consecutive parts as equal as possible: 8 rows in 5 parts are 2 + 2 + 1 + 2 + 1."""
    edges = [-(-len(rows) * i // parts) for i in range(parts + 1)]
    return [rows[a:b] for a, b in itertools.pairwise(edges)]


def step_batch(per_rank: list[list[MicroBatch]], rank: int) -> StepBatch:
    def counts(name: str) -> tuple[int, ...]:
        return tuple(sum(getattr(m, name).shape[0] for m in micros) for micros in per_rank)

    micro_contexts = tuple(
        tuple(micros[i].context_positions.shape[0] for micros in per_rank) for i in range(len(per_rank[0]))
    )
    global_counts = GlobalCounts(
        counts("image_starts"),
        counts("context_positions"),
        counts("target_positions"),
        counts("tokens"),
        (),
        micro_contexts,
    )
    return StepBatch(tuple(per_rank[rank]), global_counts, {}, "")


def whole(model: LclModel, groups: Groups, tensor_of: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo the split over tp and pp: a tensor of every parameter under its name in the whole model."""
    result = {}
    for name, parameter in model.named_parameters():
        own = tensor_of(parameter).contiguous()
        parts = [torch.empty_like(own) for _ in range(groups.tp.size())]
        dist.all_gather(parts, own, group=groups.tp)
        if getattr(parameter, "tensor_model_parallel", False):
            result[model.canonical_name(name)] = torch.cat(parts, parameter.partition_dim)
        else:
            spread = max(float((part - parts[0]).abs().max()) for part in parts)
            assert spread <= 1e-6 * max(float(parts[0].abs().max()), 1e-3), f"{name} differs over tp: {spread}"
            result[model.canonical_name(name)] = parts[0].clone()
    stages: list[Any] = [None] * groups.pp.size()
    dist.all_gather_object(stages, result, group=groups.pp)
    for stage in stages:
        for name in stage.keys() & result.keys():  # a tied matrix has a copy on both ends
            torch.testing.assert_close(stage[name], result[name], rtol=1e-6, atol=1e-9)
        result |= stage
    return result


def full_gradients(model: LclModel, ddp: Any, optimizer: Optimizer, groups: Groups) -> dict[str, torch.Tensor]:
    """Gather the reduced shards over dp, then undo the other splits."""
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            own = shard_buffer(bucket.grad_data, groups.dp.size())[groups.dp.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=groups.dp)
    return whole(model, groups, lambda parameter: parameter.main_grad)


def run_case(
    shape: ModelConfig, groups: Groups, parallel: ParallelConfig, micros: int, mean: str, **loss: Any
) -> dict[str, Any]:
    """One step in one layout; errors relative to the reference on the whole batch."""
    device = pick_device("cpu")
    tp = groups.tp.size()
    shape, parallel = fit(shape, parallel)
    config = config_for(shape, parallel, averaging=mean, **loss)
    training = build_training(config, detached(device, groups))
    model, ddp, optimizer, train = training.model, training.ddp, training.optimizer, training.step
    with torch.no_grad():  # zeros and ones would hide mistakes
        for local, parameter in model.named_parameters():
            name = model.canonical_name(local)
            if "norm" in name or name.endswith("bias"):
                generator = torch.Generator().manual_seed(len(name))
                noise = torch.randn(parameter.shape[0] * tp, generator=generator)
                split = getattr(parameter, "tensor_model_parallel", False)
                share = noise.chunk(tp)[groups.tp.rank()] if split else noise[: parameter.shape[0]]
                parameter += 0.1 * share
    state = whole(model, groups, lambda parameter: parameter.detach())
    dp = groups.dp.size()
    quarters = quarter_batches(shape)
    per_rank = [[m for q in quarters[4 * r // dp : 4 * (r + 1) // dp] for m in q] for r in range(dp)]
    grouped = [[merge(part) for part in divide(rows, micros)] for rows in per_rank]
    ddp.train()
    optimizer.zero_grad()
    contrastive, generation = train.forward_backward(train.prepare(0, step_batch(grouped, groups.dp.rank())))
    finalize_model_grads([ddp], pg_collection=groups.megatron)
    optimizer.shards.prepare_grads()
    optimizer.sum_vision_copies()
    for losses in (contrastive, generation):  # known on the last stage alone, zero on the others
        dist.all_reduce(losses, group=groups.pp)
    dist.all_reduce(generation, group=groups.dp)
    gradients = full_gradients(model, ddp, optimizer, groups)
    result: dict[str, Any] = {"contrastive": contrastive.item(), "generation": generation.item()}
    stochastic = shape.vision.drop_path > 0 or shape.language.dropout > 0
    if dist.get_rank() == 0 and not stochastic:
        reference = ReferenceLcl(shape)
        reference.load_lcl_state(state)
        theirs = reference.losses(per_rank, mean)
        if loss.get("negatives") == "micro_batch":  # the mean of what each forward pass sees by itself
            each = [reference.losses([ms[i] for ms in grouped], mean)[0] for i in range(micros)]
            theirs = (torch.stack(each).mean(), theirs[1])
        total = config.loss.contrastive_weight * theirs[0] + config.loss.generation_weight * theirs[1]
        total.backward()
        worst, name = worst_gradient(gradients, reference_grads_as_lcl(reference))
        result |= {"expected": [t.item() for t in theirs], "worst_gradient": worst, "worst_name": name}
    elif stochastic:
        result["gradient_sum"] = sum(float(g.abs().sum()) for g in gradients.values())
    return result


def cases(groups: Groups, parallel: ParallelConfig, last: bool) -> Iterator[dict[str, Any]]:
    """All cases of one layout; those of other implementations and weights in the `last` one only."""
    most = (
        8 * parallel.tensor_parallel_size * parallel.pipeline_parallel_size // dist.get_world_size()
    )  # micro-batches of a rank's rows
    for name, shape in SHAPES.items():
        several = 2 if most > 1 else 1
        ways = ((1, "global"), (2, "global"), (5, "global"), (several, "rank"))
        for micros, mean in ways if name == "opt" else ((several, "global"),):
            if micros <= most and (micros < 5 or parallel.pipeline_parallel_size == 1):  # a pipeline's have equal sizes
                case = {"shape": name, "micros": micros, "mean": mean}
                yield case | run_case(shape, groups, parallel, micros, mean)
        for micros, options in EXTRA if last or parallel.pipeline_parallel_size == 2 else ():
            if parallel.pipeline_parallel_size == 1 or "negatives" not in options:
                case = {"shape": name, "micros": micros, "mean": "global", **options}
                yield case | run_case(shape, groups, parallel, micros, "global", **options)
    dropping, _ = fit(with_rates(SHAPES["opt"], 0.3, 0.2), parallel)
    deep = dataclasses.replace(dropping, language=dataclasses.replace(dropping.language, layers=4))
    for shape, micros in ((dropping, 1), (dropping, 2), (deep, 1))[: 3 if parallel.pipeline_parallel_size == 1 else 2]:
        case = {"shape": "dropping", "micros": micros, "mean": "global", "layers": shape.language.layers}
        yield case | run_case(shape, groups, parallel, micros, "global")


EXTRA: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {"contrastive_impl": "reference", "generation_impl": "reference"}),
    (1, {"contrastive_weight": 0.0}),
    (1, {"generation_weight": 0.0}),
    (2, {"negatives": "micro_batch"}),
)


def main() -> None:
    device = pick_device("cpu")
    init_process_group(device, 60)
    world = dist.get_world_size()
    results, layouts = [], LAYOUTS[world]
    for (tp, pp), group in itertools.groupby(
        layouts, key=lambda item: (item.tensor_parallel_size, item.pipeline_parallel_size)
    ):
        groups = make_groups(tp, pp, 60, 1)  # once per mesh: each set of groups costs threads
        for parallel in group:
            place = {
                "tp": tp,
                "pp": pp,
                "sp": parallel.sequence_parallel,
                "vision": parallel.vision_parallel,
                "world": world,
            }
            results += [place | case for case in cases(groups, parallel, last=parallel is layouts[-1])]
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
