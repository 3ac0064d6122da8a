"""Every command of README.md and docs/, and how a test knows that it works. A new one needs an entry here."""

from __future__ import annotations

from dataclasses import dataclass

ARGUMENTS = "the command line is read"
START = "lcl_mcore.data.inputs.check_inputs"
# A model of seconds; the flags of the documents stay as they are.
TINY = (
    "--set",
    "model.vision.image_size=32",
    "model.vision.width=32",
    "model.vision.layers=2",
    "model.vision.heads=4",
    "model.vision.mlp_width=64",
    "model.language.width=32",
    "model.language.layers=1",
    "model.language.heads=4",
    "model.language.mlp_width=64",
    "model.language.vocab_size=400",
    "model.pool_heads=4",
    "data.sequence_length=64",
    "data.decode_backend=cpu",
    "log.tensorboard=false",
)


@dataclass(frozen=True)
class Entry:
    """One command, as in the document.

    run     words added to it when it really runs, in the workspace and in the order of `ENTRIES`; None: it does not
    prints  what its output holds;  leaves  files that are there afterwards
    until   what it is stopped at instead: its own code reads the command line, then this name is called
    worlds  numbers of processes that the command line must be accepted for
    words   stand-ins for words in capitals, each tried in turn
    by      what else shows that it works: tests (`FILE::NAME`), targets of the Makefile (`make NAME`), files
    """

    command: str
    run: tuple[str, ...] | None = None
    prints: str = ""
    leaves: tuple[str, ...] = ()
    until: str = ""
    worlds: tuple[int, ...] = (1,)
    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    by: tuple[str, ...] = ()


def runs(command: str, *more: str, prints: str = "", leaves: tuple[str, ...] = ()) -> Entry:
    """Really run."""
    return Entry(command, run=more, prints=prints, leaves=leaves)


def read(command: str, *by: str, until: str = ARGUMENTS, worlds: tuple[int, ...] = (1,), **words: str) -> Entry:
    """Its command line is read by the tool itself, with its values; the work is shown by other tests or a record."""
    pairs = tuple((name, tuple(values.split())) for name, values in words.items())
    return Entry(command, until=until, worlds=worlds, words=pairs, by=by)


def shown(command: str, *by: str) -> Entry:
    """Not a tool of ours, or the tests themselves."""
    return Entry(command, by=by)


ENTRIES = (
    # --- run, in this order, in one workspace
    runs("python tools/doctor.py", prints="ready to train"),
    runs("python tools/describe.py --recipe paper-l14", prints="432,016,641"),
    runs(
        "python tools/fetch_corpora.py data/corpora python-skimage-doc opencv-doc python-sklearn-doc",
        prints="data/corpora/opencv-doc",
    ),
    runs("python tools/fetch_corpora.py data/packages dataset-fashion-mnist", prints="dataset-fashion-mnist"),
    runs(
        "python tools/prepare_data.py html data/corpora/python-skimage-doc data/prepared/python-skimage-doc "
        "--max-repeats 30",
        "--workers",
        "1",
        prints='"documents": 12',
        leaves=("data/prepared/python-skimage-doc/dataset.json",),
    ),
    runs(
        "python tools/prepare_data.py split data/prepared/python-skimage-doc data/skimage --heldout-share 0.1 --seed 0",
        leaves=("data/skimage/train/dataset.json", "data/skimage/heldout/dataset.json"),
    ),
    runs("python tools/inspect_data.py data/demo/train --tokenizer data/demo/tokenizer.json", prints='"fill"'),
    runs(
        "python tools/inspect_data.py data/demo/train --tokenizer data/demo/tokenizer.json --document 7 "
        "--html page.html",
        leaves=("page.html",),
    ),
    runs(
        "python tools/pretrain_lcl.py --recipe demo --data data/demo/train --tokenizer data/demo --steps 20 "
        "--out runs/one",
        *TINY,
        prints="20",
        leaves=("runs/demo/checkpoints/step-00000020/manifest.json",),
    ),
    runs(
        "python tools/pretrain_lcl.py --config runs/one/config.yaml --out runs/again",
        leaves=("runs/again/checkpoints/step-00000020/manifest.json",),
    ),
    runs(
        "python tools/evaluate.py runs/demo --data data/demo/heldout", prints="R@5", leaves=("runs/demo/report.html",)
    ),
    runs(
        "python tools/evaluate.py classify runs/demo --data imagenet",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        leaves=("runs/demo/results/classification-frozen-transfer.json",),
    ),
    runs(
        "python tools/evaluate.py zeroshot runs/demo --data imagenet --classnames names.txt --templates prompts.txt",
        leaves=("runs/demo/results/zeroshot.json",),
    ),
    runs(
        "python tools/evaluate.py retrieval runs/demo --data dataset_coco.json --images coco",
        leaves=("runs/demo/results/retrieval.json",),
    ),
    runs(
        "python tools/evaluate.py caption runs/demo --data dataset_coco.json --images coco",
        "--max-tokens",
        "3",
        leaves=("runs/demo/results/caption.json",),
    ),
    runs(
        "python tools/export_encoder.py runs/demo --out exported",
        "--formats",
        "full",
        leaves=("exported/full/model.safetensors", "exported/README.md"),
    ),
    runs("python tools/checkpoint.py list runs/demo", prints="complete"),
    runs("python tools/checkpoint.py verify runs/demo", prints="intact"),
    runs("python tools/checkpoint.py info runs/demo", prints="20"),
    runs("python tools/checkpoint.py consolidate runs/demo --out weights", leaves=("weights/model.safetensors",)),
    # --- read by the tool up to its work
    read(
        "torchrun --nproc-per-node 2 tools/pretrain_lcl.py --recipe demo --tp 2 --pp 1 --steps 20 "
        "--data data/demo/train --tokenizer data/demo --out runs/tp2",
        "tests/training/test_layouts.py::test_twenty_steps_from_one_checkpoint",
        until=START,
        worlds=(2,),
    ),
    read(
        "torchrun --nproc-per-node 4 tools/pretrain_lcl.py --recipe demo --tp 2 --pp 2 --steps 20 "
        "--data data/demo/train --tokenizer data/demo --out runs/tp2pp2",
        "tests/training/test_layouts.py::test_twenty_steps_from_one_checkpoint",
        until=START,
        worlds=(4,),
    ),
    read(
        "torchrun --nnodes 3:4 --nproc-per-node 8 --max-restarts 20 --rdzv-backend c10d --rdzv-id $SLURM_JOB_ID "
        "--rdzv-endpoint $HEAD:29500 --rdzv-conf last_call_timeout=10 tools/pretrain_lcl.py --recipe paper-l14 "
        "--data /data/mmc4 --tokenizer /data/mmc4 --out /scratch/l14",
        "tests/training/test_faults.py::test_a_node_that_does_not_come_back",
        until=START,
        worlds=(24, 32),
    ),
    read(
        "python tools/pretrain_lcl.py --recipe demo --data data/demo/train --tokenizer data/demo --out runs/watched "
        "--set evaluation.every=500 evaluation.data=data/demo/heldout evaluation.limit=512",
        "tests/evaluation/test_evaluation_commands.py::test_periodic_numbers_are_those_of_the_command",
        until=START,
    ),
    read(
        "python tools/plan.py --recipe paper-l14 --gpus 512 --gpu h100",
        "tests/planning/test_plan.py::test_command",
        "benchmarks/results/plan-paper-l14-512-h100.json",
        until="lcl_mcore.planning.planner.make_plan",
    ),
    read(
        "python tools/prepare_data.py FORMAT INPUT OUTPUT",
        "tests/data/test_data_prepare.py::test_mmc4_with_hostile_lines_and_images",
        "tests/data/test_data_prepare.py::test_parquet_with_urls",
        "tests/data/test_data_prepare.py::test_pairs_from_good_and_damaged_tars",
        FORMAT="mmc4 obelics omnicorpus pairs html",
        INPUT="raw",
        OUTPUT="data/new",
    ),
    read(
        "python tools/evaluate.py classify runs/demo --data imagenet --transfer full",
        "tests/evaluation/test_evaluation_commands.py::test_the_other_commands",
    ),
    read(
        "python tools/evaluate.py retrieval runs/demo --data dataset_coco.json --images coco --train dataset_coco.json",
        "tests/evaluation/test_transfer.py::test_both_splits_of_one_file",
    ),
    read(
        "python tools/evaluate.py caption runs/demo --data dataset_coco.json --images coco --train pairs "
        "--transfer full",
        "tests/evaluation/test_evaluation_commands.py::test_the_other_commands",
    ),
    read(
        "python tools/import_released.py LCL-ViT-B-16-Laion.pt --out imported --tp 2",
        "tests/interop/test_released.py::test_the_tool_writes_weights_and_a_configuration",
    ),
    read("python benchmarks/data.py data/corpora/opencv-doc", "benchmarks/results/data-cpu.json"),
    read(
        "python benchmarks/contrastive.py --n 32768 65536 131072 --repeats 5",
        "tests/benchmarks/test_gpu_report.py::test_dry_run",
    ),
    read(
        "python benchmarks/contrastive.py --n 8192 --dim 512 --threads 1 --rounds 5",
        "benchmarks/results/contrastive-cpu.json",
    ),
    read("python tools/plan.py --recipe paper-l14 --gpus 512 --micro-batch-size 24", "docs/planner.md"),
    read("python examples/ablation/run.py", "tests/evaluation/test_ablation.py::test_two_settings_end_in_a_table"),
    read("python campaigns/soak.py --minutes 30", "campaigns/soak.json"),
    read("python campaigns/steady.py", "campaigns/steady.json"),
    read("python campaigns/recovery.py", "campaigns/recovery.json"),
    # --- targets of the Makefile, packages, SLURM, the tests
    shown("make demo", "make demo", "tests/docs/test_documents.py::test_the_demo_is_made_of_accepted_commands"),
    shown("git clone REPOSITORY lcl_mcore", "Makefile"),
    shown("make check", "make check"),
    shown("make lint", "make lint"),
    shown("make test", "make test"),
    shown("make doctor", "make doctor"),
    shown("make gpu-report", "make gpu-report", "tests/benchmarks/test_gpu_report.py::test_dry_run"),
    shown("make gpu-carry", "tests/benchmarks/test_gpu_report.py::test_what_is_carried_is_all_that_the_package_needs"),
    shown(
        "make gpu-report CARRIED=.gpu",
        "tests/benchmarks/test_gpu_report.py::test_a_bare_machine_imports_from_what_was_carried",
    ),
    shown("make gpu-carry GPU_PYTHON=3.12", "Makefile"),
    shown("make emulate", "tests/emulator/counters.json"),
    shown("make emulate REPORT=benchmarks/results/emulated-h100.json", "benchmarks/results/emulated-h100.json"),
    shown("make emulate EMULATE=\"-k 'bf16 and not engine'\"", "Makefile"),
    shown("make emulate TE=FOLDER", "Makefile"),
    shown("make slurm-test", "make slurm-test", "campaigns/slurm.json"),
    shown(
        "sbatch examples/slurm/1-node.sbatch --recipe paper-b16 --data /data/mmc4 --tokenizer /data/mmc4 "
        "--out /scratch/b16",
        "tests/slurm/test_templates.py::test_the_guide_names_what_there_is",
    ),
    shown(
        "sbatch examples/slurm/64-nodes.sbatch --recipe paper-l14 --data /data/mmc4 --tokenizer /data/mmc4 "
        "--out /scratch/l14",
        "tests/slurm/test_templates.py::test_the_guide_names_what_there_is",
    ),
    shown("scancel --signal=USR2", "tests/training/test_faults.py::test_stop_signals_in_every_phase"),
    shown("pip install transformer-engine[pytorch]", "pyproject.toml"),
    shown("pip install flash-attn --no-build-isolation", "pyproject.toml"),
    shown("pip install nvidia-dali-cuda130", "pyproject.toml"),
    shown("pip install 'lcl-mcore[captions]'", "pyproject.toml"),
    shown("pip install 'lcl-mcore[evaluation]'", "pyproject.toml"),
    shown("pip install 'lcl-mcore[export]'", "pyproject.toml"),
    shown('pytest tests/kernels -m "not slow"', "make check"),
    shown("pytest tests/kernels", "make test"),
    shown("pytest tests/kernels -m gpu", "make gpu-report"),
    shown(
        ".venv/bin/pytest -q tests/training/test_resume.py -k sigkill -x",
        "tests/training/test_resume.py::test_sigkill_of_everything_then_resume",
    ),
    shown(
        "python tests/planning/counters_worker.py --write",
        "tests/planning/test_counters.py::test_a_step_costs_what_was_committed",
    ),
)
