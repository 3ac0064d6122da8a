"""Time and peak memory of contrastive losses, forward and backward, at the same sizes in one run.

    python benchmarks/contrastive.py --n 8192 --dim 512 --threads 1 --rounds 5 --out contrastive.json

Contenders (each restated here from its published formula, one process standing for one rank)
    naive           one N x N matrix of logits, two cross-entropies
    open_clip       local loss with gradient-carrying gather: a matrix for each direction
    lcl             the released LCL loss: a masked matrix for each direction, own rows first, fp32
    tiled           lcl_kernels.infonce(impl="tiled")
    tiled_bf16      the same with precision="bf16", on a CPU
    triton          lcl_kernels.infonce(impl="triton", precision="fp16"), on CUDA
    inf_cl          Inf-CL's passes (arXiv:2410.17243) on CUDA: each direction by itself, a sum pass and one
                    recomputing pass per operand's gradient, 20 N^2 D FLOP. Run with our fp16 kernels, so a
                    lower bound of its time: its own multiply in TF32 and accumulate in global memory.

Memory: every contender runs in a fresh process and is charged what it adds to one that already holds the inputs and
has run once at a small size: on a CPU the resident peak over the resident size before, on CUDA the same of the
allocator. Gradients of the inputs are part of it.
Time on a CPU is processor time, which says more than the clock on a shared machine: all contenders alternate in one
process, and a ratio to naive is the median of the rounds' ratios. On CUDA it is the best of repeats and rounds beside
the arithmetic floor, 8 N^2 D FLOP over the rate of a large fp16 product measured in the same process.
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
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
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


def tiled_bf16(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return infonce(image, text, scale, impl="tiled", precision="bf16")


def triton(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return infonce(image, text, scale, impl="triton", precision="fp16")


def inf_cl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Forms the gradients too and hands them over, as its backward pass would."""
    from lcl_kernels.triton_engine import TritonBlock

    x, y, s = image.detach().half(), text.detach().half(), scale.detach()
    keys, other = (torch.arange(i * len(x), (i + 1) * len(x), dtype=torch.int32, device=x.device) for i in (0, 1))
    nothing = torch.full((len(x),), torch.inf, device=x.device)
    positive = s * (x.float() * y.float()).sum(1)
    gradients = [torch.zeros_like(image), torch.zeros_like(text)]
    loss = torch.zeros((), device=x.device)
    for rows, columns, flip in ((x, y, False), (y, x, True)):
        # Different keys on both sides: here the positive stays in the sum.
        block = TritonBlock(rows, columns, keys, other, s)
        lse, _ = block.lse(columns=False)
        own, _ = block.gradients(lse, nothing, want_y=False)
        theirs, _ = TritonBlock(columns, rows, keys, other, s).gradients(nothing, lse, want_y=False)
        loss = loss + 0.5 * (lse - positive).mean()
        for target, part, positives in ((flip, own, columns), (not flip, theirs, rows)):
            gradients[target] += (part - positives.float()) * (0.5 * s / len(x))
    image.grad, text.grad = gradients
    return loss


CONTENDERS: dict[str, Loss] = {f.__name__: f for f in (naive, open_clip, lcl, tiled, tiled_bf16, triton, inf_cl)}
OF_ONE_DEVICE = {"tiled_bf16": "cpu", "triton": "cuda", "inf_cl": "cuda"}


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
    value = step(loss, *leaves)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"peak_bytes": peak, "loss": value}


def alternate_cpu(names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Times of all contenders, one call each in every round; the first call of each is not counted."""
    for name in names:
        step(CONTENDERS[name], *inputs(256, args.dim, args.scale, "cpu"))
    leaves = inputs(args.n[0], args.dim, args.scale, "cpu")
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            clock, processor = time.perf_counter(), time.process_time()
            step(CONTENDERS[name], *leaves)
            rounds[name].append((time.perf_counter() - clock, time.process_time() - processor))
    return {
        name: {
            "seconds": min(clock for clock, _ in taken),
            "cpu_seconds": min(processor for _, processor in taken),
            "cpu_seconds_rounds": [processor for _, processor in taken],
        }
        for name, taken in rounds.items()
    }


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


def spawn(names: Sequence[str], n: int, args: argparse.Namespace, what: str = "memory") -> dict[str, Any]:
    """What a process of its own prints for these contenders at one size; an out-of-memory failure is a result."""
    command = [sys.executable, "-W", "ignore", __file__, "--inside", what, "--contenders", *names, "--n", str(n)]
    for option in ("dim", "scale", "device", "threads", "repeats", "rounds"):
        command += [f"--{option}", str(getattr(args, option))]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {args.timeout} s"}
    if run.returncode != 0:
        lines = run.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {run.returncode}"}
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def measurements(names: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Size, contender and result as they come; several results of one pair are parts of one (:func:`best`)."""
    if args.device == "cuda":
        for n, _, name in itertools.product(args.n, range(args.rounds), names):
            yield n, name, spawn([name], n, args)
        return
    for n in args.n:
        able = []
        for name in names:
            memory = {"load_before": os.getloadavg()[0]} | spawn([name], n, args)
            if "error" not in memory:
                able.append(name)
            yield n, name, memory
        times = spawn(able, n, args, "time") if able else {}
        for name in able:
            yield n, name, times.get(name, times)


def best(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result from several of a contender: the least time, the largest memory."""
    good = [r for r in runs if "error" not in r]
    if not good:
        return runs[0]
    merged = {key: value for run in good for key, value in run.items()}
    for key, choose in (("seconds", min), ("times_floor", min), ("peak_bytes", max)):
        if key in merged:
            merged[key] = choose(r[key] for r in good if key in r)
    if "seconds" not in merged:
        merged |= next((r for r in runs if "error" in r), {})
    return merged


def compare(results: list[dict[str, Any]]) -> None:
    """Add every result's ratio to naive at the same size."""
    base = {r["n"]: r for r in results if r["contender"] == "naive" and "seconds" in r}
    for result in results:
        reference = base.get(result["n"])
        if reference is None or "seconds" not in result:
            continue
        if "cpu_seconds_rounds" in result:
            pairs = zip(result["cpu_seconds_rounds"], reference["cpu_seconds_rounds"], strict=True)
            result["cpu_time_over_naive"] = median(ours / naive for ours, naive in pairs)
        else:
            result["time_over_naive"] = result["seconds"] / reference["seconds"]
        result["memory_over_naive"] = result["peak_bytes"] / max(reference["peak_bytes"], 1)


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'N':>7} {'contender':>10} {'seconds':>9} {'vs naive':>9} {'peak MB':>9} {'vs naive':>9}  floor"]
    for r in results:
        if "seconds" not in r:
            lines.append(f"{r['n']:>7} {r['contender']:>10} {r.get('error', 'no time')[:60]}")
            continue
        time_ratio = "cpu_time_over_naive" if "cpu_seconds" in r else "time_over_naive"
        ratios = [f"{r[k]:9.3f}" if k in r else " " * 9 for k in (time_ratio, "memory_over_naive")]
        floor = f"{r['times_floor']:.2f}x" if "times_floor" in r else ""
        start = f"{r['n']:>7} {r['contender']:>10} {r.get('cpu_seconds', r['seconds']):9.4f} {ratios[0]}"
        lines.append(f"{start} {r['peak_bytes'] / 1e6:9.1f} {ratios[1]}  {floor}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of contrastive losses.")
    parser.add_argument("--n", type=int, nargs="+", default=[16384], help="pairs; several sizes are allowed")
    parser.add_argument("--dim", type=int, default=768, help="embedding width")
    parser.add_argument("--scale", type=float, default=30.0, help="logit scale")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=1, help="on CUDA: runs in a process, of which the best counts")
    parser.add_argument("--rounds", type=int, default=1, help="passes over all contenders")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), help="default: all that can run")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one contender")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--inside", choices=("memory", "time"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.inside:
        loss = CONTENDERS[args.contenders[0]]
        if args.device == "cuda":
            print(json.dumps(measure_cuda(loss, args)))
        else:
            found = measure_cpu(loss, args) if args.inside == "memory" else alternate_cpu(args.contenders, args)
            print(json.dumps(found))
        return
    names = args.contenders or [c for c in CONTENDERS if OF_ONE_DEVICE.get(c, args.device) == args.device]

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
    for n, name, result in measurements(names, args):
        runs.setdefault((n, name), []).append({"contender": name, "n": n} | result)
        report["results"] = [best(done) for done in runs.values()]
        compare(report["results"])
        if args.out:  # after each: a time limit loses nothing
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["results"]))


if __name__ == "__main__":
    main()
