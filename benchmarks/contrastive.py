"""Time and peak memory of contrastive losses, forward and backward, at the same sizes in one run.

    python benchmarks/contrastive.py --n 16384 --dim 768 --out benchmarks/results/contrastive-cpu.json

Contenders (each restated here from its published formula, one process standing for one rank)
    naive           one N x N matrix of logits, two cross-entropies
    open_clip       local loss with gradient-carrying gather: a matrix for each direction
    lcl             the released LCL loss: a masked matrix for each direction, own rows first, fp32
    tiled           lcl_kernels.infonce(impl="tiled")
    triton          lcl_kernels.infonce(impl="triton", precision="fp16"), on CUDA
    inf_cl          Inf-CL's passes (arXiv:2410.17243) on CUDA: each direction by itself, a sum pass and one
                    recomputing pass per operand's gradient, 20 N^2 D FLOP. Run with our fp16 kernels, so a
                    lower bound of its time: its own multiply in TF32 and accumulate in global memory.

Every contender runs in a fresh process. Memory is what it adds to a process that already holds the inputs and
has run once at a small size: on a CPU the resident peak over the resident size before, on CUDA the same of
the allocator. Gradients of the inputs are part of it. Time is the best of repeats and rounds; on a CPU the CPU
time is given too, because it says more than the clock on a shared machine. On CUDA the arithmetic floor is
8 N^2 D FLOP over the rate of a large fp16 product measured in the same process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lcl_kernels import infonce
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def open_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    all_image, all_text = image.clone(), text.clone()  # what the gather returns
    labels = torch.arange(len(image), device=image.device)
    per_image = scale * image @ all_text.T
    per_text = scale * text @ all_image.T
    return (cross_entropy(per_image, labels) + cross_entropy(per_text, labels)) / 2


def lcl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    valid = torch.ones(len(image), dtype=torch.bool, device=image.device)  # rows that are not padding
    labels = torch.arange(len(image), device=image.device)
    losses = []
    for rows, columns in ((image.float(), text.float()), (text.float(), image.float())):
        logits = scale * (rows @ columns.clone().T)
        losses.append(cross_entropy(logits.masked_fill(~valid[None, :], -torch.inf), labels))
    return (losses[0] + losses[1]) / 2


def tiled(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return infonce(image, text, scale, impl="tiled", precision="fp16" if image.is_cuda else "fp32")


def triton(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return infonce(image, text, scale, impl="triton", precision="fp16")


def inf_cl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Forms the gradients too and hands them over, as its backward pass would."""
    from lcl_kernels import triton_engine as engine

    x, y, s = image.detach().half(), text.detach().half(), scale.detach()
    keys, other = (torch.arange(i * len(x), (i + 1) * len(x), dtype=torch.int32, device=x.device) for i in (0, 1))
    nothing = torch.full((len(x),), torch.inf, device=x.device)
    positive = s * (x.float() * y.float()).sum(1)
    gradients = [torch.zeros_like(image), torch.zeros_like(text)]
    loss = torch.zeros((), device=x.device)
    for rows, columns, flip in ((x, y, False), (y, x, True)):
        # Different keys on both sides: here the positive stays in the sum.
        lse, _ = engine.block_lse(rows, columns, keys, other, s, columns=False)
        own, _ = engine.block_gradients(rows, columns, keys, other, s, lse, nothing, want_y=False)
        theirs, _ = engine.block_gradients(columns, rows, keys, other, s, nothing, lse, want_y=False)
        loss = loss + 0.5 * (lse - positive).mean()
        for target, part, positives in ((flip, own, columns), (not flip, theirs, rows)):
            gradients[target] += (part - positives.float()) * (0.5 * s / len(x))
    image.grad, text.grad = gradients
    return loss


CONTENDERS: dict[str, Loss] = {f.__name__: f for f in (naive, open_clip, lcl, tiled, triton, inf_cl)}
CUDA_ONLY = ("triton", "inf_cl")


def inputs(n: int, dim: int, scale: float, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Half-aligned pairs, as in the middle of training."""
    generator = torch.Generator(device).manual_seed(0)
    image = normalize(torch.randn(n, dim, generator=generator, device=device), dim=1)
    text = torch.randn(n, dim, generator=generator, device=device).mul_(dim**-0.5).add_(image, alpha=0.5)
    text = normalize(text, dim=1)
    return (image.requires_grad_(), text.requires_grad_(), torch.tensor(scale, device=device, requires_grad=True))


def step(loss: Loss, *leaves: Tensor) -> float:
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    if value.requires_grad:
        value.backward()
    return value.item()


def measure_cpu(loss: Loss, args: argparse.Namespace) -> dict[str, Any]:
    leaves = inputs(args.n[0], args.dim, args.scale, "cpu")
    step(loss, *inputs(256, args.dim, args.scale, "cpu"))
    before = resident_bytes()
    clock, processor = [], []
    for _ in range(args.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        value = step(loss, *leaves)
        clock.append(time.perf_counter() - wall)
        processor.append(time.process_time() - cpu)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"seconds": min(clock), "cpu_seconds": min(processor), "peak_bytes": peak, "loss": value}


def resident_bytes() -> int:
    """Memory resident now. The peak so far would be wrong: making the inputs has raised it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure_cuda(loss: Loss, args: argparse.Namespace) -> dict[str, Any]:
    step(loss, *inputs(1024, args.dim, args.scale, "cuda"))
    leaves = inputs(args.n[0], args.dim, args.scale, "cuda")
    step(loss, *leaves)
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(args.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        value = step(loss, *leaves)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    floor = 8 * args.n[0] ** 2 * args.dim / matrix_rate()
    return {
        "seconds": min(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated() - before,
        "loss": value,
        "floor_seconds": floor,
        "times_floor": min(seconds) / floor,
    }


def matrix_rate(size: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of an fp16 product on this GPU, measured over about as long as a loss takes."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return repeats * 2 * size**3 / (start.elapsed_time(end) / 1e3)


def hardware(device: str) -> dict[str, Any]:
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    found: dict[str, Any] = {"cpu": model, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def spawn(name: str, n: int, args: argparse.Namespace) -> dict[str, Any]:
    """One contender at one size in a process of its own; an out-of-memory failure is a result."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--n", str(n)]
    for option in ("dim", "scale", "device", "threads", "repeats"):
        command += [f"--{option}", str(getattr(args, option))]
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"contender": name, "n": n, "load_before": load}
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return result | {"error": f"not done in {args.timeout} s"}
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines()
        return result | {"error": lines[-1] if lines else f"exit status {run.returncode}"}
    return result | json.loads(run.stdout.splitlines()[-1])


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result from several runs of a contender: the least time, the largest memory."""
    good = [r for r in runs if "error" not in r]
    if not good:
        return runs[0]
    merged = dict(good[0])
    for key in ("seconds", "cpu_seconds", "load_before", "times_floor"):
        if key in merged:
            merged[key] = min(r[key] for r in good)
    merged["peak_bytes"] = max(r["peak_bytes"] for r in good)
    return merged


def compare(results: list[dict[str, Any]]) -> None:
    """Add every result's ratio to naive at the same size."""
    base = {r["n"]: r for r in results if r["contender"] == "naive" and "seconds" in r}
    for result in results:
        reference = base.get(result["n"])
        if reference is None or "seconds" not in result:
            continue
        result["time_over_naive"] = result["seconds"] / reference["seconds"]
        if "cpu_seconds" in result:
            result["cpu_time_over_naive"] = result["cpu_seconds"] / reference["cpu_seconds"]
        result["memory_over_naive"] = result["peak_bytes"] / max(reference["peak_bytes"], 1)


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'N':>7} {'contender':>10} {'seconds':>9} {'vs naive':>9} {'peak MB':>9} {'vs naive':>9}  floor"]
    for r in results:
        if "error" in r:
            lines.append(f"{r['n']:>7} {r['contender']:>10} {r['error'][:60]}")
            continue
        ratios = [f"{r[k]:9.3f}" if k in r else " " * 9 for k in ("time_over_naive", "memory_over_naive")]
        floor = f"{r['times_floor']:.2f}x" if "times_floor" in r else ""
        start = f"{r['n']:>7} {r['contender']:>10} {r['seconds']:9.4f} {ratios[0]}"
        lines.append(f"{start} {r['peak_bytes'] / 1e6:9.1f} {ratios[1]}  {floor}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of contrastive losses.")
    parser.add_argument("--n", type=int, nargs="+", default=[16384], help="pairs; several sizes are allowed")
    parser.add_argument("--dim", type=int, default=768, help="embedding width")
    parser.add_argument("--scale", type=float, default=30.0, help="logit scale")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=1, help="runs of which the best counts")
    parser.add_argument("--rounds", type=int, default=1, help="passes over all contenders, the best counts")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that can run")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one contender")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--one", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.one:
        measure = measure_cuda if args.device == "cuda" else measure_cpu
        print(json.dumps(measure(CONTENDERS[args.one], args)))
        return
    names = args.contenders or [c for c in CONTENDERS if args.device == "cuda" or c not in CUDA_ONLY]

    from lcl_mcore.diagnostics.environment import source_commit

    runs: dict[tuple[int, str], list[dict[str, Any]]] = {}
    report: dict[str, Any] = {
        "benchmark": "contrastive",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **source_commit(),
        "device": args.device,
        "hardware": hardware(args.device),
        "dim": args.dim,
        "scale": args.scale,
        "repeats": args.repeats,
        "rounds": args.rounds,
        "results": [],
    }
    for n, _, name in itertools.product(args.n, range(args.rounds), names):
        runs.setdefault((n, name), []).append(spawn(name, n, args))
        report["results"] = [best(done) for done in runs.values()]
        compare(report["results"])
        if args.out:  # after each: a time limit loses nothing
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["results"]))


if __name__ == "__main__":
    main()
