"""A plan as text: every section that holds predictions says so."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from lcl_mcore.planning.planner import PREDICTED

GIB = 2**30
WIDTH = 80


def size(value: float) -> str:
    """Bytes for people: 1.50 GiB, 12.3 MiB, 4.00 KiB."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def asked_text(plan: dict[str, Any]) -> str:
    """What `tools/plan.py` prints about the requested layout.

    Args:
        plan: from `planner.make_plan`.
    """
    return "\n".join(_wrapped(_lines(plan)))


def layouts_text(plan: dict[str, Any]) -> str:
    """What it prints at the end: all layouts, and what is assumed."""
    return "\n".join(_wrapped(_layout_lines(plan)))


def _wrapped(lines: Iterator[str]) -> Iterator[str]:
    """Lines of at most `WIDTH` columns; what goes on is indented by four more than its beginning."""
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        yield from textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]


def _head(title: str) -> str:
    """Of a section that holds predictions, which all but the first two lines are in."""
    return f"{title} [{PREDICTED}]"


def _lines(plan: dict[str, Any]) -> Iterator[str]:
    layout, step, memory = plan["layout"], plan["step"], plan["memory"]
    yield f"{plan['recipe']} on {plan['gpus']} {plan['gpu']}, {layout['precision']}: {layout['flags']}"
    yield (
        f"tp {layout['tensor_parallel_size']}, pp {layout['pipeline_parallel_size']}, "
        f"dp {layout['data_parallel_size']}; {layout['sequences_per_step']} sequences a step, "
        f"{layout['micro_batches']} micro-batches a rank, {layout['micro_batches_counted']} of them counted"
    )
    ranks = plan["lint"]["ranks"]
    yield f"built and run end to end on fake process groups of {plan['gpus']} ranks: rank {', '.join(map(str, ranks))}"
    yield ""
    yield _head("in short")
    outcome = "fits" if memory["fits"] else "DOES NOT FIT"
    yield (
        f"  {outcome}: {size(memory['peak_bytes'])} of tensors at most, {size(memory['usable_bytes'])} usable of "
        f"{size(memory['gpu_bytes'])}"
    )
    yield f"  step {duration(step['seconds'])}, MFU {step['mfu']:.1%}; bottleneck: {step['bottleneck']}"
    yield from _run_lines(plan)
    yield ""
    yield _head("memory per rank at its peak")
    for rank in memory["ranks"]:
        tensor, pipeline, _ = rank["tensor_pipeline_data"]
        parts = ", ".join(f"{name} {size(value)}" for name, value in rank["peak_by_part"].items() if value)
        yield (
            f"  rank {rank['rank']} (tp {tensor}, stage {pipeline}), {rank['parameters']:,} parameters: "
            f"{size(rank['peak_bytes'])}"
        )
        yield f"    {parts}"
    yield ""
    yield _head(f"step time of rank {step['slowest_rank']}, the slowest")
    for cause, seconds in step["seconds_by_cause"].items():
        yield f"  {duration(seconds):>10}  {seconds / step['seconds']:>5.1%}  {cause}"
    for name, seconds in step["hidden_communication_seconds"].items():
        yield f"  {duration(seconds):>10}   hidden  communication: {name}"
    yield f"  {duration(step['host_seconds']):>10}  of the host beside {duration(step['device_seconds'])} of the device"
    yield ""
    yield _head("FLOPs")
    yield f"  {plan['flops']['model_flops_per_step'] / 1e15:.2f} PFLOP a step that the model needs"
    for rank in plan["flops"]["executed_per_counted_step"]:
        parts = ", ".join(f"{name} {value / 1e12:.2f}" for name, value in rank.items() if name != "rank")
        yield f"  rank {rank['rank']} executes TFLOP: {parts}"
    yield ""
    yield _head("communication per counted step")
    for line in plan["communication"]:
        yield (
            f"  rank {line['rank']}: {line['purpose']}, {line['op']} in {line['group']} ({line['members']} members): "
            f"{line['calls']} calls, {size(line['bytes'])}, {duration(line['seconds_alone'])} alone"
        )
    yield ""
    yield _head("deadlocks")
    lint = plan["lint"]
    if lint["problems"]:
        yield from (f"  PROBLEM {problem}" for problem in lint["problems"])
    else:
        yield (
            f"  none: every member of each group issues the same sequence ({sum(lint['calls'])} calls of "
            f"{len(lint['ranks'])} ranks)"
        )
    yield ""


def _layout_lines(plan: dict[str, Any]) -> Iterator[str]:
    yield _head("layouts, fastest first")
    yield "  a star: every rank counted; the others are estimated from one rank of a stage"
    for item in plan["layouts"]:
        fits = size(item["peak_bytes"]) if item["fits"] else f"{size(item['peak_bytes'])}, does not fit"
        star = "*" if item["all_counted"] else " "
        yield f"  {star} {duration(item['seconds']):>9}  MFU {item['mfu']:.1%}  {fits}  {item['flags']}"
    yield ""
    yield "assumptions"
    yield from (f"  {line}" for line in plan["assumptions"])


def _run_lines(plan: dict[str, Any]) -> Iterator[str]:
    run, data, expected = plan["run"], plan["input"], plan["reliability"]
    cost = "" if run["cost"] is None else f", cost {run['cost']:,.0f}"
    yield f"  {run['steps']:,} steps: {run['days']:.2f} days with failures, {run['gpu_hours']:,.0f} GPU hours{cost}"
    yield (
        f"  input: {data['images_per_second']:,.0f} images/s, {data['storage_bytes_per_second'] / 1e9:.2f} GB/s of "
        f"storage, {data['decode_cores']:,.0f} cores ({data['decode_cores_per_gpu']:.2f} per GPU)"
    )
    yield (
        f"  checkpoint: {size(expected['checkpoint_bytes'])} in {duration(expected['stall'])}, every "
        f"{expected['checkpoint_every_steps']} steps ({duration(expected['interval'])})"
    )
    yield (
        f"  expected ETTR {expected['ettr']:.2%} with a failure every {expected['mtbf'] / 3600:.1f} h; "
        f"{expected['best_ettr']:.2%} when saving every {duration(expected['best_interval'])}"
    )
