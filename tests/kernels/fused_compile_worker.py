"""Compiles the fused element-wise Triton kernels for GPUs that are not here; writes what each uses as JSON.

Usage: fused_compile_worker.py RESULT.json [CAPABILITY ...]. A process of its own, because Triton must not be in
interpreter mode here. The committed table: --commit HASH benchmarks/results/fused-kernels-compiled.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from lcl_kernels import triton_fused_ops as ops
from lcl_kernels.triton_fused import REDUCE_TILE, VOCABULARY_LAUNCH, block_of, warps_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compile_worker import resources

INTEGERS = ("rows", "row_tokens", "threshold", "per_program", "programs", "vocab_start", "valid")
POINTERS = {"*i64": ("RowKeys", "Labels"), "*fp32": ("RowScale", "Parts", "Mean", "Rstd", "Lse", "Target", "Factors")}
TOWERS = {"vision": {"GAIN": True, "ROW_SCALE": True, "DROPOUT": False}}
TOWERS["language"] = {"GAIN": False, "ROW_SCALE": False, "DROPOUT": True}


def type_of(argument: str, element: str) -> str:
    if argument in INTEGERS:
        return "i32"
    if argument in ("factor", "eps"):
        return "fp32"
    return next((kind for kind, names in POINTERS.items() if argument in names), element)


def compile_one(
    name: str, constants: dict[str, Any], options: dict[str, int], element: str, capability: int
) -> dict[str, Any]:
    kernel = getattr(ops, f"{name}_kernel")
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], values[(position,)] = "constexpr", constants[argument]
            continue
        signature[argument] = type_of(argument, element)
        if signature[argument].startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    narrow = re.findall(r"(?:ld|st)\.global(?:\.L1::\w+)?\.b16", ptx)  # one element of half precision at a time
    return {
        "kernel": name,
        "element": element.removeprefix("*"),
        "width": constants.get("H", constants.get("F", constants.get("V"))),
        "options": sorted(key for key, value in constants.items() if value is True),
        "capability": capability,
        "threads": 32 * options["num_warps"],
        "shared": compiled.metadata.shared,
        "two_byte_accesses": len(narrow),
    } | resources(ptx, capability)


def jobs() -> Iterator[tuple[str, dict[str, Any], dict[str, int], str]]:
    """Kernel, constants, launch options and element type, at the widths of the recipes."""
    for width, tower, element in (
        (384, "vision", "*bf16"),
        (1024, "vision", "*bf16"),
        (1024, "vision", "*fp32"),
        (768, "language", "*bf16"),
    ):
        block, warps = block_of(width), {"num_warps": warps_of(block_of(width))}
        flags = {"H": width, "BIAS": True, "NORM": True, **TOWERS[tower]}
        yield "residual_forward", {"BLOCK": block, "ROWS": 4, **flags}, warps, element
        yield "residual_backward", {"BLOCK": block, **flags}, warps, element
    reduced = {"H": 1024, "BIAS": True, "GAIN": True, "NORM": True, **REDUCE_TILE}
    yield "residual_reduce", reduced, {"num_warps": 4}, "*bf16"
    for gelu, width in ((True, 4096), (False, 3072)):
        shape = {"F": width, "BLOCK": 1024, "BIAS": True, "GELU": gelu}
        yield "activation_forward", {**shape, "ROWS": 8}, {"num_warps": 4}, "*bf16"
        yield "activation_backward", shape, {"num_warps": 4}, "*bf16"
    yield "activation_reduce", {"F": 4096, **REDUCE_TILE}, {"num_warps": 4}, "*bf16"
    for sums, gradient in ((True, True), (True, False), (False, True)):
        launch = dict(VOCABULARY_LAUNCH)
        flags = {"V": 50272, "BLOCK": launch.pop("BLOCK"), "BIAS": False, "SUM": sums, "GRADIENT": gradient}
        yield "vocabulary", flags, launch, "*bf16"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("result", type=Path)
    parser.add_argument("capabilities", type=int, nargs="*", default=[80, 90, 100])
    parser.add_argument("--commit", help="of the sources: writes the table that is committed")
    arguments = parser.parse_args()
    rows = [compile_one(*job, capability) for capability in arguments.capabilities for job in jobs()]
    text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
    if arguments.commit:
        command = f"python tests/kernels/fused_compile_worker.py --commit HASH {arguments.result}"
        head = {
            "command": command,
            "commit": arguments.commit,
            "triton": triton.__version__,
            "measured_on_a_gpu": False,
        }
        text = json.dumps(head, indent=1)[:-2] + f',\n "kernels": {text}\n}}'
    arguments.result.write_text(text + "\n")


if __name__ == "__main__":
    main()
