"""Compiles every Triton kernel for every configured GPU generation, without a GPU; writes resource use as
JSON.

Usage: compile_worker.py RESULT.json [CAPABILITY ...]. A process of its own, because Triton must not be in
interpreter mode here and keeps its cache and options per process.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from lcl_kernels import triton_ops as ops
from lcl_kernels.triton_config import SHARED_MEMORY, config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DEPTH = 768
OPERANDS = ("X", "Y", "A", "B", "G")
INTEGER_POINTERS = ("XKey", "YKey", "XRange", "YRange", "Flag")
INTEGERS = ("M", "N", "K", "ldg", "tiles_per_split", "a_row", "a_col", "accumulate", "parts", "length")
# Sizes that the launcher cannot promise to be multiples of 16 stay unmarked; row strides of G are rounded up.
DIVISIBLE = ("ldg",)
STORES = {"2": r"STG\.E\.U16", "4": r"STG\.E$", "8": r"STG\.E\.64", "16": r"STG\.E\.128"}


def compile_one(name: str, kernel: Any, precision: str, capability: int, constants: dict[str, Any]) -> dict[str, Any]:
    element = {"fp16": "fp16", "bf16": "bf16"}.get(precision, "fp32")
    shape = config(name, precision, capability)
    described = {"X": (shape.rows, shape.depth), "Y": (shape.columns, shape.depth), "G": (shape.rows, shape.columns)}
    signature, attributes, values = {}, {}, {}
    for position, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            values[(position,)] = constants[argument]
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument == "gain":
            signature[argument] = "fp32"
        elif argument in INTEGER_POINTERS:
            signature[argument] = "*i32"
        elif argument in described and shape.tma:
            signature[argument] = f"tensordesc<{element}{list(described[argument])}>"
        else:
            signature[argument] = f"*{element}" if argument in OPERANDS else "*fp32"
        if signature[argument].startswith("*") or argument in DIVISIBLE:
            attributes[(position,)] = [["tt.divisibility", 16]]
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": name,
        "precision": precision,
        "capability": capability,
        "columns": constants.get("COLS"),
        "tile": [shape.rows, shape.columns, shape.depth],
        "threads": 32 * shape.warps,
        "stages": shape.stages,
        "shared": compiled.metadata.shared,
    } | resources(compiled.asm["ptx"], capability)


def instructions(machine_code: str) -> dict[str, Any]:
    """What of the machine code tells how data move and how much there is to do beside the products."""
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", machine_code, re.MULTILINE)

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, name)) for name in names)

    return {
        "instructions": len(names),
        "matrix_instructions": count(r"HGMMA|HMMA|UTC\w*MMA"),
        "loads_by_descriptor": count("UTMALDG"),
        "loads_to_shared_by_thread": count("LDGSTS"),
        "stores_by_descriptor": count("UTMASTG"),
        "stores_to_global": {width: number for width, suffix in STORES.items() if (number := count(suffix))},
        "exponentials": count(r"MUFU\.EX2"),
        "shuffles": count("SHFL"),
    }


def resources(ptx: str, capability: int) -> dict[str, Any]:
    """Registers and spilled bytes as the bundled assembler reports them, and counts of instructions."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        report = ""
        # The PTX version decides which of the two assemblers understands the text.
        for tool in ("ptxas-blackwell", "ptxas"):
            if not (tools / tool).exists():
                continue
            target = re.search(r"\.target (\w+)", ptx)
            assert target
            run = subprocess.run(
                [str(tools / tool), "-v", f"-arch={target.group(1)}", str(path), "-o", str(path) + ".cubin"],
                capture_output=True,
                text=True,
            )
            report = run.stdout + run.stderr
            if run.returncode == 0:
                code = subprocess.run(
                    [tools / "nvdisasm", "-c", f"{path}.cubin"], capture_output=True, text=True
                ).stdout
                break
        else:
            raise RuntimeError(f"no assembler accepted sm_{capability}: {report[-2000:]}")
    numbers = {
        "registers": r"Used (\d+) registers",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
    }
    matrix = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)))
    found: dict[str, Any] = {"matrix": matrix} | instructions(code)
    for key, pattern in numbers.items():
        match = re.search(pattern, report)
        if match is None:
            raise RuntimeError(f"no {key} in the assembler's report: {report[-2000:]}")
        found[key] = int(match.group(1))
    return found


def jobs(precision: str, capability: int) -> list[tuple[str, Any, dict[str, Any]]]:
    def tile(name: Any) -> dict[str, Any]:
        shape = config(name, precision, capability)
        return {"BM": shape.rows, "BN": shape.columns, "BD": shape.depth, "TMA": shape.tma}

    dot = {"PREC": "tf32x3" if precision == "tf32x3" else "ieee"}
    work: list[tuple[str, Any, dict[str, Any]]] = []
    for columns in (True, False):
        shared = {"D": DEPTH, "COLS": columns, **dot}
        work.append(("sums", ops.sums_kernel, shared | tile("sums")))
        work.append(("fallback", ops.fallback_lse_kernel, shared | tile("fallback")))
    work.append(("gradient", ops.gradient_kernel, {"D": DEPTH, "GROUP": 8, **dot} | tile("gradient")))
    if precision == "tf32x3":
        blocks = {key: value for key, value in tile("matmul").items() if key != "TMA"}
        work.append(("matmul", ops.matmul_kernel, dot | blocks))
    return work


def main() -> None:
    capabilities = [int(c) for c in sys.argv[2:]] or list(SHARED_MEMORY)
    results = [
        compile_one(name, kernel, precision, capability, constants)
        for capability in capabilities
        # Blackwell's table differs in half precision only.
        for precision in (("fp16",) if capability == 100 else ("fp16", "tf32x3", "fp32"))
        for name, kernel, constants in jobs(precision, capability)
    ]
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
