"""Optional packages, looked for in this one place; each answer carries its reason.

Nothing else in the package probes for them. `lcl_kernels` stands alone and looks for Triton itself.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import traceback
from dataclasses import dataclass

OPTIONAL = {
    "transformer_engine": (
        "transformer-engine",
        "transformer_engine",
        "transformer-engine-cu13",
        "transformer-engine-cu12",
    ),
    "flash_attn": ("flash-attn",),
    "apex": ("apex",),
    "triton": ("triton",),
    "nvidia.dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
}
"""Packages that are imported where they are found, here or in megatron-core, and the names they are installed under."""


@dataclass(frozen=True)
class Probe:
    """What is known about an optional package.

    Attributes:
        name: as the doctor prints it.
        usable: whether it can be used here.
        version: of the installed distribution; empty if there is none.
        reason: why it cannot be used, or "ok".
    """

    name: str
    usable: bool
    version: str
    reason: str


def first_line(error: BaseException) -> str:
    """Kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0]}"


def why_not_imported(module: str) -> str:
    """'' if `module` imports, else one line. Packages that do not fit this machine raise whatever they like."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return half_installed(error) or first_line(error)
    return ""


def half_installed(error: BaseException) -> str:
    """What to do about the optional package whose import raised this error; '' if it was raised elsewhere.

    megatron-core imports what it finds and expects an ImportError from what is not there: a package whose compiled part
    is missing (Transformer Engine without its torch extension) raises something else, through every import on the way.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    importing = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    for package, distributions in OPTIONAL.items():
        left_over = isinstance(error, importlib.metadata.PackageNotFoundError) and error.name in distributions
        if left_over or any(f"{name}.".startswith(f"{package}.") for name in importing):
            installed = [name for name in distributions if _version((name,))]
            found = f"{package} {_version(distributions)}".strip()
            remove = f"pip uninstall {' '.join(installed)}" if installed else f"delete the folder {package}"
            return f"{found} is there but does not load ({first_line(error)}). Install it whole, or {remove}."
    return ""


def _import(module: str, attribute: str | None = None) -> str | None:
    """None if `module` (and `attribute` in it) imports, else one line saying why not."""
    reason = why_not_imported(module)
    if reason:
        return reason
    imported = importlib.import_module(module)
    if attribute and not hasattr(imported, attribute):
        return f"{module} is installed but has no `{attribute}`: not the package expected under that name"
    return None


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _probe(name: str, module: str, attribute: str | None, distributions: tuple[str, ...], cuda: bool) -> Probe:
    """Import `module` and look for `attribute` in it.

    Args:
        distributions: names under which the package may be installed.
        cuda: whether it is of use only where there is a CUDA device.
    """
    version = _version(distributions)
    reason = _import(module, attribute)
    if reason is None and cuda and not cuda_capability():
        reason = "installed, but no CUDA device is visible"
    return Probe(name, reason is None, version, reason or "ok")


def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@functools.cache
def transformer_engine() -> Probe:
    return _probe(
        "transformer-engine",
        "transformer_engine.pytorch",
        "TransformerLayer",
        ("transformer-engine", "transformer_engine"),
        cuda=True,
    )


@functools.cache
def flash_attn() -> Probe:
    return _probe("flash-attn", "flash_attn", "flash_attn_varlen_func", ("flash-attn",), cuda=True)


@functools.cache
def torch_varlen() -> Probe:
    """torch's own variable-length flash attention (torch >= 2.10)."""
    probe = _probe("torch varlen attention", "torch.nn.attention.varlen", "varlen_attn", ("torch",), cuda=True)
    capability = cuda_capability()
    if probe.usable and capability is not None and capability < (8, 0):
        return Probe(probe.name, False, probe.version, "needs a GPU of compute capability 8.0 or newer")
    return probe


ADAM_MODULES = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}
"""Where the fused optimizers are, by the names of `optim.optimizer_backend`."""


def _steered(probe: Probe, module: str) -> Probe:
    """The probe of a `FusedAdam`, usable only if learning rate and skip flag can stay on the device."""
    if not probe.usable:
        return probe
    kind = importlib.import_module(module).FusedAdam
    for function, argument in ((kind.__init__, "capturable"), (kind.step, "grad_scaler")):
        if argument not in inspect.signature(function).parameters:
            return Probe(probe.name, False, probe.version, f"its FusedAdam has no `{argument}`: too old")
    return probe


@functools.cache
def te_adam() -> Probe:
    """Transformer Engine's fused optimizer."""
    found = transformer_engine()
    if not found.usable:
        return found
    names = ("transformer-engine", "transformer_engine")
    module = ADAM_MODULES["te"]
    return _steered(_probe("transformer-engine", module, "FusedAdam", names, cuda=True), module)


@functools.cache
def apex_adam() -> Probe:
    """Apex's fused optimizer; its Python part imports without the CUDA extensions that it needs."""
    found = apex()
    missing = _import("amp_C", "multi_tensor_adam_capturable") if found.usable else None
    if missing:
        return Probe(found.name, False, found.version, f"built without CUDA extensions: {missing}")
    return _steered(found, ADAM_MODULES["apex"])


@functools.cache
def apex_gradient_fusion() -> Probe:
    """Apex's matmul that adds a weight's gradient to an fp32 buffer; megatron-core's linear layers use it."""
    module = "fused_weight_gradient_mlp_cuda"
    return _probe("apex gradient fusion", module, "wgrad_gemm_accum_fp32", ("apex",), cuda=True)


@functools.cache
def apex() -> Probe:
    """NVIDIA Apex; the package called `apex` on PyPI is an unrelated web toolkit."""
    return _probe("apex (NVIDIA)", "apex.optimizers", "FusedAdam", ("apex",), cuda=True)


@functools.cache
def triton() -> Probe:
    return _probe("triton", "triton", "jit", ("triton",), cuda=True)


@functools.cache
def dali() -> Probe:
    return _probe(
        "nvidia-dali", "nvidia.dali", "pipeline_def", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), cuda=False
    )


def installed(name: str, module: str, distribution: str) -> Probe:
    """Whether a package is there, without importing it: these take seconds to import and are seldom used."""
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that `module` is in
        found = False
    return Probe(name, found, _version((distribution,)), "ok" if found else f"{module} is not installed")


def export_packages() -> tuple[Probe, ...]:
    """What tools/export_encoder.py checks its files with, and what evaluation fits and scores with."""
    return (
        installed("timm", "timm", "timm"),
        installed("open_clip", "open_clip", "open_clip_torch"),
        installed("transformers", "transformers", "transformers"),
        installed("pycocoevalcap", "pycocoevalcap", "pycocoevalcap"),
        installed("scikit-learn", "sklearn", "scikit-learn"),
    )


@functools.cache
def megatron_version() -> str:
    return _version(("megatron-core",))


def all_probes() -> tuple[Probe, ...]:
    return (transformer_engine(), flash_attn(), torch_varlen(), apex(), triton(), dali(), *export_packages())
