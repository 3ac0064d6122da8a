"""One rank of the multi-process tests: runs every case on its mesh and writes what it measured as JSON.

Usage: mesh_worker.py RANK WORLD FOLDER. Reads FOLDER/cases.json, writes FOLDER/rank{RANK}.json.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lcl_kernels import DistributedInfoNCE, infonce_reference, linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FEATURES, WIDTH = 12, 24
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "broadcast")


class Encoder(nn.Module):
    """Two linear towers and a learned scale: the smallest model with every kind of gradient."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image = nn.Linear(FEATURES, WIDTH)
        self.text = nn.Linear(FEATURES, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normal = nn.functional.normalize
        return normal(self.image(x), dim=-1), normal(self.text(y), dim=-1), self.log_scale.exp()


class Mesh:
    """Process groups of a DP x TP mesh, TP ranks adjacent; all ranks create all groups in one order."""

    def __init__(self, dp: int, tp: int) -> None:
        rank = dist.get_rank()
        self.dp_rank, self.tp_rank = rank // tp, rank % tp
        dp_groups = [dist.new_group([d * tp + t for d in range(dp)]) for t in range(tp)]
        tp_groups = [dist.new_group([d * tp + t for t in range(tp)]) for d in range(dp)]
        self.dp_group, self.tp_group = dp_groups[self.tp_rank], tp_groups[self.dp_rank]
        self.dp, self.tp = dp, tp


def relative(ours: Tensor, truth: Tensor) -> float:
    """Frobenius error relative to the truth (absolute where the truth is zero)."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-6))


def forbid_collectives() -> Any:
    """Context in which any collective of the loss raises."""
    failing = {name: mock.Mock(side_effect=AssertionError(f"{name} in backward")) for name in COLLECTIVES}
    return mock.patch.multiple(dist, **failing)


def run_contrastive(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    counts, total = case["counts"], sum(case["counts"])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(total, FEATURES, generator=generator)
    y = x + 0.3 * torch.randn(total, FEATURES, generator=generator)
    # Groups cross rank borders; every fourth pair is in none.
    groups = torch.where(torch.arange(total) % 4 == 3, -1, torch.arange(total) // 3 * 10**12 + 7)
    start = sum(counts[: mesh.dp_rank])
    mine = slice(start, start + counts[mesh.dp_rank])
    loss_function = DistributedInfoNCE(
        mesh.dp_group,
        mesh.tp_group,
        weighting=case["weighting"],
        schedule=case["schedule"],
        precision=case.get("precision", "fp32"),
        reduce_size=mesh.dp,
    )
    model = Encoder(case["scale"])
    ddp = DistributedDataParallel(model, process_group=mesh.dp_group)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        image, text, scale = ddp(x[mine], y[mine])
        pending = loss_function.begin(counts, WIDTH, group_ids=groups[mine] if case["groups"] else None)
        pending.start_image(image)
        pending.start_text(text)
        return pending.finish(scale), image, text

    loss, _, _ = step()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    # A second step must repeat bit for bit, and its loss must not communicate in backward.
    again, image, text = step()
    with forbid_collectives():
        d_image, d_text = torch.autograd.grad(again, (image, text), retain_graph=True)
    with torch.no_grad():
        silent, _, _ = step()

    exact = Encoder(case["scale"]).double()
    image64, text64, scale64 = exact(x.double(), y.double())
    weights = torch.cat(
        [
            torch.full((c,), 1 / total if case["weighting"] == "image" else 1 / (c * sum(k > 0 for k in counts)))
            for c in counts
            if c
        ]
        or [torch.zeros(0)]
    )
    truth = infonce_reference(
        image64, text64, scale64, weights=weights.double(), group_ids=groups if case["groups"] else None
    )
    truth.backward()
    errors = {name: relative(gradients[name], p.grad) for name, p in exact.named_parameters()}
    return {
        "loss": loss.item(),
        "truth": truth.item(),
        "errors": errors,
        "finite": all(bool(g.isfinite().all()) for g in gradients.values()),
        "repeat": again.item() == loss.item() and silent.item() == loss.item(),
        "row_gradients": [list(d_image.shape), list(d_text.shape)],
    }


def run_cross_entropy(case: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    rows, width, shard = case["rows"], 16, case["shard"]
    vocab, padded = case["vocab"], shard * mesh.tp
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(padded, width, generator=generator)
    bias = torch.randn(padded, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::7] = -100
    factors = torch.rand(rows, generator=generator)
    start = mesh.tp_rank * shard

    h = hidden.clone().requires_grad_()
    w = weight[start : start + shard].clone().requires_grad_()
    b = bias[start : start + shard].clone().requires_grad_()
    loss = linear_cross_entropy(
        h,
        w,
        labels,
        row_weights=factors,
        vocab_start=start,
        tp_group=mesh.tp_group,
        valid_vocab=vocab,
        chunk_rows=case["chunk"],
        bias=b,
    )
    with forbid_collectives():
        (2.0 * loss).backward()

    h64, w64, b64 = (t.double().requires_grad_() for t in (hidden, weight, bias))
    truth = linear_cross_entropy_reference(h64, w64, labels, row_weights=factors, valid_vocab=vocab, bias=b64)
    (2.0 * truth).backward()
    mine = slice(start, start + shard)
    padding = w.grad[max(vocab - start, 0) :]
    return {
        "loss": loss.item(),
        "truth": truth.item(),
        "errors": {
            "hidden": relative(h.grad, h64.grad),
            "weight": relative(w.grad, w64.grad[mine]),
            "bias": relative(b.grad, b64.grad[mine]),
        },
        "padding": float(padding.abs().max()) if padding.numel() else 0.0,
    }


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    meshes: dict[tuple[int, int], Mesh] = {}
    results = []
    for case in json.loads((folder / "cases.json").read_text()):
        shape = (case["dp"], case["tp"])
        if shape not in meshes:
            meshes[shape] = Mesh(*shape)
        run = run_cross_entropy if case["kind"] == "cross_entropy" else run_contrastive
        results.append(run(case, meshes[shape]))
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
