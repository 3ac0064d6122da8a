# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -qq --no-compile
# Named at every install, or a package that wants a newer torch replaces it. Without a GPU driver the CPU build of
# torch is enough; torch 2.13.0 is what CI uses.
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo 'torch>=2.10' || echo 'torch==2.13.0')
# Packages are compiled when they are first imported; without the result each process would do it again (16 s).
export PYTHONDONTWRITEBYTECODE :=
# The CUDA build of torch, as PyPI has it, on a GPU that computes nothing: see docs/contributing.md.
EMULATOR := .cache/emulator
EMULATOR_PIP := $(EMULATOR)/bin/pip --disable-pip-version-check install -qq --no-compile
EMULATOR_TORCH := torch==2.11.0
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: help demo test check lint doctor gpu-report gpu-carry emulate slurm-test clean-demo
help:
	@echo "make demo    install, build the demo corpus, pre-train on 2 processes, evaluate (minutes)"
	@echo "make test    install, lint, type-check, run every test"
	@echo "make check   the fast part of the tests"
	@echo "make gpu-report  everything that needs a GPU, measured into one JSON (dry run without one)"
	@echo "make gpu-carry   what that needs on a GPU machine without a network, into .gpu (then: make gpu-report CARRIED=.gpu)"
	@echo "make emulate     every line that only a GPU reaches, on one that computes nothing (installs 5 GB; half an hour of a core)"
	@echo "make slurm-test  the launch templates on a real SLURM of two nodes, started here (Debian 12; minutes)"
	@echo "make doctor  what was found on this machine and what will be used"

# Stamps are written last: an interrupted install is done again.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Python >= 3.11 is needed; set PYTHON=/path/to/python3." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version): Python >= 3.11 is needed. Set PYTHON=/path/to/a/newer/python3." >&2; exit 2; }
	@echo "installing into $(VENV) (about a minute on a fast line)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)' 'setuptools>=77' wheel
	@$(PIP) --no-build-isolation '$(TORCH)' -e '.[demo]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "installing the test tools"
	@$(PIP) --no-build-isolation '$(TORCH)' -e '.[demo,dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo/run.py

clean-demo:
	rm -rf runs/demo data/demo

doctor: $(STAMP)
	@$(BIN)/python tools/doctor.py

# On a GPU machine without a network: `make gpu-carry` here, copy the checkout with .gpu, `make gpu-report CARRIED=.gpu` there.
gpu-report: $(if $(CARRIED),,$(DEV_STAMP))
	@$(if $(CARRIED),$(PYTHON) tools/gpu_report.py --carried $(CARRIED),$(BIN)/python tools/gpu_report.py)

gpu-carry: $(DEV_STAMP)
	@$(BIN)/python benchmarks/gpu_carry.py .gpu $(if $(GPU_PYTHON),--python $(GPU_PYTHON))

# EMULATE="-k fp32 -x" passes words on to pytest, TE=FOLDER puts a built Transformer Engine on the path.
emulate: $(EMULATOR)/.installed
	@EMULATOR_REPORT=$(or $(REPORT),$(EMULATOR)/emulated-h100.json) PYTHONPATH=$(CURDIR)$(if $(TE),:$(TE)) OMP_NUM_THREADS=1 \
		$(EMULATOR)/bin/python -m pytest -q -p no:cacheprovider tests/emulator $(EMULATE)

# Headers of the CUDA packages that torch does not need: the emulator is compiled against them.
$(EMULATOR)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(EMULATOR)
	@$(EMULATOR_PIP) '$(EMULATOR_TORCH)' 'setuptools>=77' wheel
	@$(EMULATOR_PIP) --no-build-isolation '$(EMULATOR_TORCH)' -e . pytest pytest-timeout hypothesis
	@$(EMULATOR_PIP) 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'
	@$(EMULATOR)/bin/python -c 'import torch; assert torch.version.cuda, f"{torch.__version__} is no CUDA build: use Linux and another PYTHON"'
	@touch $@

slurm-test: $(DEV_STAMP)
	@$(BIN)/python campaigns/slurm.py

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

check: lint
	$(BIN)/pytest -q -m "not slow and not distributed and not gpu and not emulated"

test: lint
	$(BIN)/pytest -q -m "not gpu and not emulated"
