"""What this machine offers, what each part of the trainer will use, and why not something faster.

Nothing here needs more than the standard library to be imported, so that a broken torch or megatron-core
becomes a line of the report instead of a traceback.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcl_mcore import optional_packages
from lcl_mcore.diagnostics import environment
from lcl_mcore.diagnostics.preflight import Preflight, format_preflight, run_preflight

PACKAGE = "lcl-mcore"
IMPORTS = ("torch", "megatron.core", "lcl_kernels")
"""Checked by importing: their binaries can be broken although the right version is installed."""

IMPOSTORS = {
    "apex": (
        "apex.optimizers",
        "the package `apex` on PyPI is an unrelated web toolkit. Remove it (pip uninstall apex); NVIDIA "
        "Apex is built from https://github.com/NVIDIA/apex, and nothing here requires it.",
    ),
    "nvidia-dali": (
        "nvidia.dali",
        "the package `nvidia-dali` on PyPI is a placeholder. Remove it (pip uninstall nvidia-dali) and "
        "install nvidia-dali-cuda130 or nvidia-dali-cuda120.",
    ),
}


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        name: what was looked at.
        found: its version, or what it is.
        ok: whether it serves.
        reason: why it does not, or what it is used for.
    """

    name: str
    found: str
    ok: bool = True
    reason: str = ""


@dataclass
class Report:
    """Everything the doctor found, in the order of the printed blocks."""

    system: list[Line] = field(default_factory=list)
    required: list[Line] = field(default_factory=list)
    optional: list[Line] = field(default_factory=list)
    parts: list[Line] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    preflight: Preflight | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether training can start here."""
        return not self.errors and all(line.ok for line in self.required)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"healthy": self.healthy, **dataclasses.asdict(self)}


def check_requirements(requirements: Sequence[str], remedy: str) -> list[Line]:
    """Compare what is installed with what is required.

    Args:
        requirements: strings such as `torch>=2.10`; those of extras are skipped.
        remedy: what to do about one that does not fit.
    """
    from packaging.requirements import Requirement

    lines = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(Line(requirement.name, "missing", False, f"{wanted} is required. {remedy}"))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        lines.append(Line(requirement.name, version, fits, "" if fits else f"{wanted} is required. {remedy}"))
    return lines


def check_required() -> list[Line]:
    """Python, every declared dependency, and whether the central ones import."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return [Line(PACKAGE, "missing", False, "The package is not installed here. Run: pip install -e .")]
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return [Line("packaging", "missing", False, "Run: pip install packaging")]
    python, wanted = platform.python_version(), metadata["Requires-Python"]
    fits = SpecifierSet(wanted).contains(python)
    lines = [Line("python", python, fits, "" if fits else f"Python {wanted} is required.")]
    remedy = "Install again: pip install -e ."
    lines += check_requirements(importlib.metadata.requires(PACKAGE) or [], remedy)
    for module in IMPORTS:
        try:
            importlib.import_module(module)
        except Exception as error:  # packages that do not fit raise whatever they like
            other = optional_packages.half_installed(error)
            reason = other or f"does not import: {optional_packages.first_line(error)}. {remedy}"
            lines.append(Line(module, "broken", False, reason))
    return lines


def find_impostors() -> list[str]:
    """Packages of another origin installed under the name of an NVIDIA package."""
    found = []
    for name, (module, advice) in IMPOSTORS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if optional_packages.why_not_imported(module):
            found.append(f"{name} {version}: {advice}")
    return found


def describe_system() -> tuple[list[Line], list[str]]:
    """Machine, torch and GPUs, and warnings about how they fit together. torch must import."""
    host, versions, driver = environment.host(), environment.versions(), environment.driver()["driver"]
    lines = [
        Line("cpu", f"{host['cpu']}, {host['cores']} cores"),
        Line("torch", f"{versions['torch']}, CUDA {versions['cuda'] or 'none'}"),
        Line("driver", driver or "none"),
    ]
    gpus = environment.gpus()
    for index, gpu in enumerate(gpus):
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(Line(f"gpu {index}", f"{gpu['name']}, {memory}, compute capability {gpu['capability']}"))
    if gpus or not driver:
        return lines, []
    if versions["cuda"] is None:
        return lines, ["There is a GPU driver, but this torch is built for CPU: install a CUDA build of torch."]
    return lines, [f"This torch is built for CUDA {versions['cuda']}, but sees no GPU with driver {driver}."]


def choose_parts(precision: str) -> list[Line]:
    """Which implementation every part of a run uses on this machine. All required packages must import.

    Args:
        precision: "fp32", "bf16" or "fp8".
    """
    import torch
    from lcl_kernels.infonce import select_engine

    from lcl_mcore.config.schema import DataConfig
    from lcl_mcore.data.image_reader import ENOUGH_CORES, build_decoder
    from lcl_mcore.distributed.device import SideStream
    from lcl_mcore.fused_adam import choose_adam
    from lcl_mcore.models.backends import choose_elementwise, choose_gradient_fusion, choose_layers

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    _, choices = choose_layers(dtype)
    lines = [Line(choice.part, choice.backend, True, choice.reason) for choice in choices]
    te = optional_packages.transformer_engine()
    if precision == "fp8" and not te.usable:
        lines[0] = Line("layers", "none", False, f"fp8 needs Transformer Engine: {te.reason}")
    device = "cuda" if environment.gpus() else "cpu"
    adam = choose_adam("auto", torch.device(device))
    fusion = choose_gradient_fusion(True, choices[0].backend, dtype, torch.device(device))
    residual = choose_elementwise("auto", torch.device(device))
    lines += [Line(choice.part, choice.backend, True, choice.reason) for choice in (residual, adam, fusion)]
    engine = select_engine("auto", torch.empty(0, device=device))
    name = "reference" if engine is None else engine.name
    reason = "contrastive" if name == "triton" else f"contrastive; triton: {optional_packages.triton().reason}"
    lines.append(Line("loss", name, True, reason))
    lines.append(Line("", "chunked", True, "vocabulary cross-entropy, logits never stored whole"))
    decoder = build_decoder(DataConfig(), torch.device(device), SideStream(torch.device("cpu")))
    dali = optional_packages.dali()
    why_not = dali.reason if not dali.usable else f"for a GPU with fewer than {ENOUGH_CORES} cores"
    reason = "" if decoder.name == "dali" else f"libjpeg-turbo and Pillow on threads; dali: {why_not}"
    lines.append(Line("decode", decoder.name, True, reason))
    decoder.close()
    return lines


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence megatron-core's warnings on import about every package it does without: the report names them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def examine(
    precision: str | None = None, folder: Path | None = None, megabytes: float | None = None, min_bandwidth: float = 0.0
) -> Report:
    """Look at everything; under torchrun also at links, clocks, equal software and the run folder.

    Collective over torchrun's processes.

    Args:
        precision: "fp32", "bf16" or "fp8" [bf16 with a GPU, else fp32].
        folder: run folder to try from every node.
        megabytes: size of the trial all-reduce, see `run_preflight`.
        min_bandwidth: smallest acceptable bus bandwidth, see `run_preflight`.
    """
    report = Report()
    with _quiet():
        report.required = check_required()
        report.warnings = find_impostors()
        if not report.healthy:
            return report
        report.system, advice = describe_system()
        report.warnings += advice
        report.optional = [
            Line(p.name, p.version or "missing", p.usable, p.reason) for p in optional_packages.all_probes()
        ]
        report.parts = choose_parts(precision or ("bf16" if environment.gpus() else "fp32"))
        report.errors += [f"{line.name}: {line.reason}" for line in report.parts if not line.ok]
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            try:
                report.preflight = run_preflight(folder, megabytes, min_bandwidth)
            except RuntimeError as error:  # what torch raises for every failure of a process group
                report.errors.append(f"all-reduce failed on rank {os.environ['RANK']}: {error}")
            else:
                report.errors += report.preflight.errors
                report.warnings += report.preflight.warnings
    return report


def format_report(report: Report) -> str:
    """The report for people."""
    blocks = []
    for title, lines in (
        ("system", report.system),
        ("required", report.required),
        ("optional", report.optional),
        ("this run would use", report.parts),
    ):
        rows = [_format(line, title != "this run would use") for line in lines]
        if rows:
            blocks.append("\n".join([title, *rows]))
    if report.preflight is not None:
        blocks.append("\n".join(format_preflight(report.preflight)))
    blocks += [f"WARNING {text}" for text in report.warnings]
    broken = [f"{line.name}: {line.found}. {line.reason}" for line in report.required if not line.ok]
    blocks += [f"ERROR {text}" for text in broken + report.errors]
    blocks.append("ready to train" if report.healthy else "not ready to train")
    return "\n\n".join(blocks)


def _format(line: Line, marked: bool) -> str:
    mark = "" if not marked else "ok  " if line.ok else "no  "
    reason = "" if line.reason in ("", "ok") else f"  {line.reason}"
    return f"  {mark}{line.name:<24}{line.found:<20}{reason}".rstrip()
