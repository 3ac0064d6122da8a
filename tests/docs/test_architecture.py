"""The package as a whole: imports exist and go one way, and each kind of question about the machine has one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module_name(path: Path) -> str:
    """Dotted name of a file of the packages `lcl_mcore` and `lcl_kernels`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts[0] = "lcl_kernels"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(p): p for folder in ("lcl_mcore", "kernels") for p in (ROOT / folder).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of our own that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys() or {node.module}
    return found & FILES.keys()


def bound_names(path: Path) -> set[str]:
    """Names that a module defines or imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name.partition(".")[0])
    return found


def test_what_is_imported_exists() -> None:
    """mypy does not report a module of our own that is gone: missing imports are ignored for optional packages."""
    names = {module: bound_names(path) for module, path in FILES.items()}
    missing = []
    scripts = ("tools", "benchmarks", "campaigns", "examples", "tests")
    paths = [*FILES.values(), *(path for folder in scripts for path in (ROOT / folder).rglob("*.py"))]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wanted: list[tuple[str, str]] = []
            if isinstance(node, ast.Import):
                wanted = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                wanted = [(node.module, alias.name) for alias in node.names]
            for module, name in wanted:
                ours = module.partition(".")[0] in ("lcl_mcore", "lcl_kernels")
                there = module in names and (not name or name in names[module] or f"{module}.{name}" in names)
                if ours and not there:
                    missing.append(f"{path.relative_to(ROOT)}: {module} {name}".rstrip())
    assert missing == []


def hidden_calls(code: str) -> list[str]:
    """Functions called for the value of a local variable of their own name: in a function that is a NameError."""
    found = []
    for function in ast.walk(ast.parse(code)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value is not None:
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
                    bound = {name.id for name in names if isinstance(name.ctx, ast.Store)}
                    calls = [call.func for call in ast.walk(node.value) if isinstance(call, ast.Call)]
                    found += [call.id for call in calls if isinstance(call, ast.Name) and call.id in bound]
    return found


def test_no_local_name_hides_the_function_that_gives_its_value() -> None:
    """Neither ruff nor mypy sees it in a generator, and a line for CUDA alone is first run on a GPU."""
    assert hidden_calls("def f(x):\n    pinned = tuple(pinned(y) for y in x)\n") == ["pinned"]
    folders = ("lcl_mcore", "kernels", "tools", "benchmarks", "campaigns", "examples", "tests")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): hidden_calls(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: names for path, names in found.items() if names} == {}


def test_imports_have_no_circle() -> None:
    try:
        list(TopologicalSorter({name: imported(path) for name, path in FILES.items()}).static_order())
    except CycleError as error:
        pytest.fail(f"files import each other in a circle: {' -> '.join(error.args[1])}")


# Modules that tell CUDA from CPU or ask torch.cuda, each with its reason. `distributed/device.py` is the place for it.
CUDA_MODULES = {
    "distributed/device.py": "the one place",
    "distributed/cpu.py": "stands in for torch.cuda where there is no GPU",
    "diagnostics/environment.py": "reports on the GPUs themselves",
    "diagnostics/preflight.py": "a trial all-reduce of a size that suits the links",
    "hardware.py": "trial matmuls of a size that suits the device",
    "optional_packages.py": "some packages are of use only with a GPU, or with a new one",
    "batch.py": "only host tensors can be pinned",
    "metrics.py": "on CUDA a step's numbers are read one step late",
    "train_step.py": "on CUDA the contrastive loss exchanges halves",
    "fused_adam.py": "fused optimizers work on CUDA only",
    "models/backends.py": "gradient accumulation fusion works on CUDA only",
    "models/layers.py": "megatron-core's layers take the current CUDA device unless told otherwise",
    "models/transformer_config.py": "tells them",
    "checkpoint/shards.py": "one event behind the copies of all shards",
    "data/dali.py": "DALI decodes on a GPU or on the CPU",
    "data/decode.py": "pixels for a GPU lie in pinned memory",
    "data/image_reader.py": "DALI is taken for a GPU alone",
    "data/loader.py": "the current CUDA device is a thread's own",
}

# Modules that look for packages, each with its reason. `optional_packages.py` is the place for it.
PROBING_MODULES = {
    "optional_packages.py": "the one place",
    "diagnostics/health.py": "reports on required packages, which may be broken or missing",
    "diagnostics/environment.py": "versions of packages, for reports",
    "distributed/cpu.py": "reads in torchvision's folder which operators to declare",
    "storage.py": "fsspec imports the package of a URL's protocol, and raises if it is missing",
}


# Modules that parse or read whole files themselves, each with its reason. What others wrote goes through `untrusted.py`
# in bounds: regular files of limited size, no key twice.
RAW_READERS = {
    "untrusted.py": "the one place",
    "json_lines.py": "the one place for lines of JSON, each of bounded length",
    "data/tokenizer.py": "what the tokenizers library has just written",
    "data/loader.py": "our own values, as JSON gives them back",
    "data/prepare/prepare_plan.py": "our own values, as JSON gives them back",
    "data/prepare/job_records.py": "records of this preparation, which are typed",
    "data/prepare/split.py": "the manifest that this command wrote",
    "data/prepare/repeated.py": "keys that this job wrote, plain numbers",
    "checkpoint/weights_file.py": "safetensors, looked at before",
    "interop/init_from.py": "safetensors, looked at before",
    "interop/released.py": "torch's files of plain tensors, looked at before",
    "checkpoint/store.py": "a file whose hash was just compared",
    "export/reload.py": "what the parent process has just written",
    "fault_tolerance/heartbeat.py": "/proc, and the job's own store",
    "distributed/flight_recorder.py": "what torch has just written",
    "distributed/cpu.py": "a file of torchvision",
    "diagnostics/environment.py": "/proc",
    "diagnostics/preflight.py": "the package's own files, and what other ranks have just written",
    "commands/dispatch.py": "the package's own files",
    "planning/micro_batch.py": "what the parent process and its child write to each other",
}
PARSERS = ("json.load", "json.loads", "yaml.safe_load", "yaml.load", "torch.load", "np.load", "safe_open", "load_file")


def reads_raw(node: ast.AST) -> bool:
    """Parses with a library, or reads a whole file, without bounds."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    return name in PARSERS or name.startswith("pickle.load") or name.rpartition(".")[2] in ("read_text", "read_bytes")


def asks_cuda(node: ast.AST) -> bool:
    """`torch.cuda`, `x.is_cuda`, or a comparison of a device's type with "cuda" or "cpu"."""
    match node:
        case ast.Attribute(attr="is_cuda") | ast.Attribute(attr="cuda", value=ast.Name(id="torch")):
            return True
        case ast.Compare(left=ast.Attribute(attr="type" | "kind"), comparators=[ast.Constant(value="cuda" | "cpu")]):
            return True
    return False


def probes(node: ast.AST) -> bool:
    """A look for a package that may be missing."""
    names = {"find_spec", "ImportError", "ModuleNotFoundError", "PackageNotFoundError"}
    return getattr(node, "id", None) in names or getattr(node, "attr", None) in names


@pytest.mark.parametrize(
    ("found_by", "allowed"), [(asks_cuda, CUDA_MODULES), (probes, PROBING_MODULES), (reads_raw, RAW_READERS)]
)
def test_each_kind_of_question_has_one_place(found_by: Callable[[ast.AST], bool], allowed: dict[str, str]) -> None:
    """CUDA or CPU, whether an optional package is here, what is in a file; `lcl_kernels` answers for itself."""
    package = ROOT / "lcl_mcore"
    asking = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(found_by(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert asking == allowed.keys()


# Rooms from the bottom up: a room imports from those before it alone. Top-level files are rooms of their own.
ROOMS = (
    "errors", "terminal", "untrusted", "optional_packages", "lcl_kernels", "rng", "batch", "lr_schedule", "storage",
    "json_lines", "templates", "config", "distributed", "hardware", "losses", "data", "models", "fused_adam",
    "optimizer", "startup_summary", "diagnostics", "checkpoint", "metrics", "interop", "train_step", "pipeline",
    "fault_tolerance", "build", "planning", "evaluation", "trainer", "export", "commands", "__main__",
)  # fmt: skip


def room(module: str) -> str:
    """The folder below `lcl_mcore`, or the file beside them, that a module belongs to."""
    first, _, rest = module.partition(".")
    return first if first == "lcl_kernels" else rest.partition(".")[0]


def test_rooms_import_from_below_alone() -> None:
    upwards = [
        f"{module} -> {other}"
        for module, path in FILES.items()
        for other in imported(path)
        if room(module) and room(other) and ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    assert upwards == []
    assert {room(module) for module in FILES} - {""} == set(ROOMS)


def test_the_trainer_is_imported_by_its_command_alone() -> None:
    importers = [module for module, path in FILES.items() if "lcl_mcore.trainer" in imported(path)]
    assert importers == ["lcl_mcore.commands.pretrain"]


def test_importing_the_package_does_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import lcl_mcore; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['lcl_mcore']"


def test_no_mocks_and_patches_in_the_cpu_platform_alone() -> None:
    """`setattr` on something else than `self`, or anything of `unittest.mock`."""
    found = set()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="setattr")) | ast.ImportFrom(module="unittest"):
                    found.add(str(path.relative_to(ROOT)))
                case ast.Import(names=names) if any(alias.name.startswith("unittest") for alias in names):
                    found.add(str(path.relative_to(ROOT)))
    assert found == {"lcl_mcore/distributed/cpu.py"}


def test_no_two_classes_of_one_name() -> None:
    """One name, one thing, over both packages; a private helper may share the name of nothing public either."""
    places: dict[str, list[str]] = {}
    for module, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name.lstrip("_"), []).append(module)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
