"""Trains one step in several layouts and compares losses and all gradients with the plain reference model.

Started by torchrun; rank 0 prints a JSON list with one entry per case.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "models"), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.distributed.param_and_grad_buffer import shard_buffer

from batches import SHAPES, Document, micro_batch, with_rates
from lcl_mcore.config.data import DataConfig
from lcl_mcore.config.model import ModelConfig
from lcl_mcore.config.run import LossConfig, ParallelConfig, RunConfig, TrainConfig
from lcl_mcore.data.batch import GlobalCounts, MicroBatch, StepBatch
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.parallel.groups import Groups, make_groups
from lcl_mcore.platform.device import init_process_group, pick_device
from lcl_mcore.training.build import build_model
from lcl_mcore.training.optimizer import Optimizer, wrap_data_parallel
from lcl_mcore.training.step import TrainStep
from reference_model import ReferenceLcl, reference_grads_as_lcl, worst_gradient

ROW = 64
# Rows of the global batch, four data-parallel quarters: ragged, without images, dense, without contexts.
QUARTERS: list[list[list[Document]]] = [
    [[(5, "i", 3, "i", 4), ("i", 6)], [("i", 2, "i", "i", 3)]],
    [[(9,), (20,)], [(30,)]],
    [[(4, "i"), (3, "i"), (2, "i", 1)], [(7, "i", 2, "i")]],
    [[("i", 6)], [(8,)]],
]


def config_for(shape: ModelConfig, tp: int, sp: bool, **loss: Any) -> RunConfig:
    return RunConfig(
        model=shape,
        data=DataConfig(sequence_length=ROW),
        loss=LossConfig(**loss),
        parallel=ParallelConfig(tensor=tp, sequence=sp, timeout_seconds=60),
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
            micros.append(dataclasses.replace(
                micro, image_keys=torch.arange(images, images + n), row_keys=torch.tensor([rows])))  # fmt: skip
            images, rows = images + n, rows + 1
        result.append(micros)
    return result


def merge(micros: list[MicroBatch]) -> MicroBatch:
    """Several micro-batches as one."""
    joined: dict[str, Any] = {"lengths": sum((m.lengths for m in micros), ())}
    tokens = images = 0
    shifted: dict[str, list[torch.Tensor]] = {}
    for m in micros:
        for name in ("image_starts", "context_rows", "target_rows"):
            shifted.setdefault(name, []).append(getattr(m, name) + tokens)
        shifted.setdefault("context_images", []).append(m.context_images + images)
        for name in ("tokens", "positions", "images", "target_labels", "image_keys", "row_keys", "group_ids"):
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
        tuple(micros[i].context_rows.shape[0] for micros in per_rank) for i in range(len(per_rank[0]))
    )
    global_counts = GlobalCounts(
        counts("image_starts"),
        counts("context_rows"),
        counts("target_rows"),
        counts("tokens"),
        (),
        micro_contexts,
    )
    return StepBatch(tuple(per_rank[rank]), global_counts, {}, "")


def full_gradients(model: LclModel, ddp: Any, groups: Groups) -> dict[str, torch.Tensor]:
    """Undo both shardings: gather the reduced shards over dp, then the parameters' shares over tp."""
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            own = shard_buffer(bucket.grad_data, groups.dp.size())[groups.dp.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, own, group=groups.dp)
    result = {}
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(parameter.main_grad) for _ in range(groups.tp.size())]
        dist.all_gather(parts, parameter.main_grad.contiguous(), group=groups.tp)
        if getattr(parameter, "tensor_model_parallel", False):
            result[name] = torch.cat(parts, parameter.partition_dim)
        else:
            spread = max(float((part - parts[0]).abs().max()) for part in parts)
            assert spread <= 1e-6 * max(float(parts[0].abs().max()), 1e-3), (
                f"{name} differs over tp: {spread}"
            )
            result[name] = parts[0]
    return result


def full_state(model: LclModel, groups: Groups) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(groups.tp.size())]
        dist.all_gather(parts, parameter.detach().contiguous(), group=groups.tp)
        split = getattr(parameter, "tensor_model_parallel", False)
        state[name] = torch.cat(parts, parameter.partition_dim) if split else parts[0].clone()
    return state


def run_case(
    shape: ModelConfig, groups: Groups, sp: bool, micros: int, mean: str, **loss: Any
) -> dict[str, Any]:
    """One step in one layout; errors relative to the reference on the whole batch."""
    device = pick_device("cpu")
    tp = groups.tp.size()
    config = config_for(shape, tp, sp, mean=mean, **loss)
    model, _ = build_model(config, device, groups)
    with torch.no_grad():  # zeros and ones would hide mistakes
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                generator = torch.Generator().manual_seed(len(name))
                whole = torch.randn(parameter.shape[0] * tp, generator=generator)
                split = getattr(parameter, "tensor_model_parallel", False)
                share = whole.chunk(tp)[groups.tp.rank()] if split else whole[: parameter.shape[0]]
                parameter += 0.1 * share
    state = full_state(model, groups)
    ddp = wrap_data_parallel(model, config.parallel, groups)
    optimizer = Optimizer(ddp, config.optim, torch.float32, groups)
    train = TrainStep(config, model, ddp, optimizer, groups)
    dp = groups.dp.size()
    quarters = quarter_batches(shape)
    per_rank = [[m for q in quarters[4 * r // dp : 4 * (r + 1) // dp] for m in q] for r in range(dp)]
    grouped = [[merge(part) for part in divide(rows, micros)] for rows in per_rank]
    ddp.train()
    optimizer.zero_grad()
    contrastive, generation = train.accumulate_gradients(0, step_batch(grouped, groups.dp.rank()))
    finalize_model_grads([ddp], pg_collection=groups.megatron)
    dist.all_reduce(generation, group=groups.dp)
    gradients = full_gradients(model, ddp, groups)
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
        result |= {
            "expected": [t.item() for t in theirs],
            "worst_gradient": worst,
            "worst_name": name,
        }
    elif stochastic:
        result["gradient_sum"] = sum(float(g.abs().sum()) for g in gradients.values())
    return result


def cases(groups: Groups, sp: bool, last: bool) -> Iterator[dict[str, Any]]:
    """All cases of one layout; those of other implementations and weights in the `last` one only."""
    most = 8 * groups.tp.size() // dist.get_world_size()  # micro-batches that a rank's rows allow
    for name, shape in SHAPES.items():
        for micros, mean in itertools.product((1, 2, 5), ("global", "rank")):
            if micros <= most:
                case = {"shape": name, "micros": micros, "mean": mean}
                yield case | run_case(shape, groups, sp, micros, mean)
        if last:
            for micros, options in EXTRA:
                case = {"shape": name, "micros": micros, "mean": "global", **options}
                yield case | run_case(shape, groups, sp, micros, "global", **options)
    for micros in (1, 2):
        case = {"shape": "dropping", "micros": micros, "mean": "global"}
        yield case | run_case(with_rates(SHAPES["opt"], 0.3, 0.2), groups, sp, micros, "global")


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
    results = []
    for tp in (1, 2)[:world]:
        groups = make_groups(tp, 1, 60, 1)  # once per layout: each set of groups costs threads
        for sp in (False, True)[:tp]:
            results += [
                {"tp": tp, "sp": sp, "world": world} | case
                for case in cases(groups, sp, last=tp == min(world, 2))
            ]
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
