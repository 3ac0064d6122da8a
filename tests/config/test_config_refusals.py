"""A mistake gets one short message (value, rule, remedy), the same from a flag, from `--set` and from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.base import MOST_LINES
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.errors import ConfigError

HEADS = "each tensor-parallel rank gets a whole share of the heads"

# Words after `--recipe demo` -> the whole message.
OF_DEMO = {
    # one value
    "--steps 0": "train.steps = 0: must be positive. For example 1000.",
    "--micro-batch-size -2": "train.micro_batch_size = -2: must be positive or auto. For example 1.",
    "--micro-batch-size all": "train.micro_batch_size = all: must be a whole number or auto. For example 1.",
    "--lr abc": "optim.lr = abc: must be a number. For example 0.0003.",
    "--lr -1": "optim.lr = -1: must be positive. For example 0.0003.",
    "--lr nan": "optim.lr = nan: must be finite. For example 0.0003.",
    "--steps 1.5": "train.steps = 1.5: must be a whole number. For example 1000.",
    "--beta2 1": "optim.beta2 = 1: must be less than 1. For example 0.95.",
    "--warmup-steps -1": "optim.warmup_steps = -1: cannot be negative. For example 2000.",
    "--generation-weight -1": "loss.generation_weight = -1: cannot be negative. For example 1.0.",
    "--timeout 0": "parallel.timeout_seconds = 0: must be positive. For example 600.0.",
    "--dropout 1": "model.language.dropout = 1: must be less than 1. For example 0.0.",
    "--keep 0": "checkpoint.keep = 0: must be positive. For example 2.",
    "--max-hours -1": "checkpoint.max_hours = -1: cannot be negative. For example 0.0.",
    "--log-every 0": "log.every = 0: must be positive. For example 10.",
    "--data.sequence-length 7": "data.sequence_length = 7: must be at least 8. For example 2048.",
    "--data.min-fill 2": "data.min_fill = 2: must be at most 1. For example 0.98.",
    "--faults.straggler-ratio 1": "faults.straggler_ratio = 1: must be greater than 1. For example 1.5.",
    "--evaluation.limit 1": "evaluation.limit = 1: must be at least 2. For example 512.",
    "--precision fp16": "train.precision = fp16: must be one of fp32, bf16, fp8. For example fp32.",
    "--recompute-vision half": (
        "parallel.recompute_vision = half: must be one of none, selective, full, block:N. For example none."
    ),
    "--set log.tensorboard=maybe": "log.tensorboard = maybe: must be true or false. For example True.",
    "--set faults.skip_batches=[[1,a]]": (
        "faults.skip_batches.0.1 = a: must be a whole number. See --help, or any run's config.yaml."
    ),
    "--set model=3": "model = 3: is a section of settings, not a value. See --help, or any run's config.yaml.",
    "--set data.sources=[{path:]": "--set data.sources=[{path:]: the value is not YAML. Correct it.",
    # names
    "--set model.vision.wdith=3": ("model.vision.wdith: no setting has this name. Did you mean model.vision.width?"),
    "--set optim.steps=3": "optim.steps: no setting has this name. Did you mean train.steps?",
    "--set nonsense=3": "nonsense: no setting has this name. See --help, or any run's config.yaml.",
    "--set lr": "--set lr: an assignment reads PATH=VALUE. For example --set model.vision.layers=6.",
    "--model.vision.layer 3": "--model.vision.layer: no flag has this name. Did you mean --model.vision.layers?",
    "--xyzzy": "--xyzzy: no flag has this name. See --help.",
    "--resume yes": "yes: belongs to no flag. See --help.",
    "--lr": "Missing value for argument '--lr'. Expected 1 values. See --help.",
    "--set parallel.context=2": (
        "parallel.context = 2: no longer exists. Leave it out: there is no context parallelism."
    ),
    "--set parallel.overlap_tensor=true": (
        "parallel.overlap_tensor = true: no longer exists. Leave it out: --no-overlap-grad-reduce and "
        "--no-overlap-param-gather are what can be chosen."
    ),
    # several values
    "--tp 3": f"model.language.heads = 4 with parallel.tensor_parallel_size = 3: {HEADS}. Use one of --tp 1, 2, 4.",
    "--tp 3 --vision-parallel tensor": (
        f"model.vision.heads = 4 with parallel.tensor_parallel_size = 3: {HEADS}. "
        "Use one of --tp 1, 2, 4, or --vision-parallel data."
    ),
    "--tp 4 --set model.pool_heads=2 --vision-parallel tensor": (
        f"model.pool_heads = 2 with parallel.tensor_parallel_size = 4: {HEADS}. "
        "Use one of --tp 1, 2, or --vision-parallel data."
    ),
    "--tp 4 --model.language.mlp-width 514": (
        "model.language.mlp_width = 514 with parallel.tensor_parallel_size = 4: the MLP is split evenly. "
        "Use a --tp that divides it."
    ),
    "--tp 3 --model.language.heads 3 --model.language.width 129 --model.pool-heads 3": (
        "padded vocabulary of 2048 with parallel.tensor_parallel_size = 3: the vocabulary is split evenly. "
        "Use a --tp that is a power of 2 up to 128."
    ),
    "--sequence-parallel": (
        "parallel.sequence_parallel = True with parallel.tensor_parallel_size = 1: sequence parallelism splits over "
        "tensor-parallel ranks. Set --tp to 2 or more, or drop --sequence-parallel."
    ),
    "--tp 2 --sequence-parallel --data.sequence-length 99": (
        "data.sequence_length = 99 with parallel.tensor_parallel_size = 2 and sequence parallelism: sequences are "
        "split evenly over the tensor-parallel ranks. Use a multiple of 2."
    ),
    "--pp 9": (
        "parallel.pipeline_parallel_size = 9 with model.language.layers = 2: every stage after the first needs an LM "
        "layer of its own. Use --pp 3 or less."
    ),
    "--pp 2 --negatives micro_batch": (
        "loss.negatives = micro_batch with parallel.pipeline_parallel_size = 2: a pipeline forms the contrastive loss "
        "once, over the whole global batch. Use --negatives global_batch."
    ),
    "--pp 2 --stage-layers 2": (
        "parallel.stage_layers = 2 with parallel.pipeline_parallel_size = 2: one number per stage, at least 1 layer "
        "on each after the first. Leave it out to have the layers balanced."
    ),
    "--pp 2 --stage-layers 2 1": (
        "parallel.stage_layers = 2 1: the stages together hold the LM's 2 layers. "
        "Leave it out to have the layers balanced."
    ),
    "--pp 2 --evaluation.every 5 --evaluation.data x": (
        "evaluation.every = 5 with parallel.pipeline_parallel_size = 2: evaluation during training runs the whole "
        "model on each rank. Evaluate the checkpoints with tools/evaluate.py."
    ),
    "--evaluation.every 5": (
        "evaluation.every = 5 without evaluation.data: there is nothing to evaluate on. "
        "Give a prepared held-out data set."
    ),
    "--micro-batch-size 3": (
        "train.global_batch_size = 8 with train.micro_batch_size = 3: the global batch holds whole micro-batches. "
        "Use a multiple of 3."
    ),
    "--device cpu --elementwise-backend triton": (
        "train.elementwise_backend = triton with train.device = cpu: its kernels work on CUDA only. "
        "Use --elementwise-backend auto."
    ),
    "--device cpu --optimizer-backend apex": (
        "optim.optimizer_backend = apex with train.device = cpu: its kernels work on CUDA only. "
        "Use --optimizer-backend auto."
    ),
    "--precision fp8 --device cpu": (
        "train.precision = fp8 with train.device = cpu: FP8 needs a GPU of compute capability 8.9 or newer. "
        "Use --precision fp32 or bf16."
    ),
    "--precision fp8 --backend torch": (
        "train.precision = fp8 with train.backend = torch: FP8 layers come from Transformer Engine. "
        "Use --backend auto, or --precision bf16."
    ),
    "--precision fp8 --fp8-recipe delayed --pp 2": (
        "train.fp8_recipe = delayed with parallel.pipeline_parallel_size = 2: Transformer Engine shares its scales "
        "among all processes of the job, and stages have different ones. Use --fp8-recipe current or block."
    ),
    "--precision fp8 --data.sequence-length 250": (
        "data.sequence_length = 250 x train.micro_batch_size = 4 with train.precision = fp8: FP8 matmuls with current "
        "scaling take multiples of 16 on each rank. Use a multiple of 16, or --precision bf16."
    ),
    "--precision fp8 --data.sequence-length 252 --tp 2 --sequence-parallel --evaluation.every 5 --evaluation.data x": (
        "data.sequence_length = 252 with train.precision = fp8 over 2 tensor-parallel ranks: FP8 matmuls with current "
        "scaling take multiples of 16 on each rank. Use a multiple of 32, or --precision bf16."
    ),
    "--precision fp8 --fp8-recipe block --tp 2 --model.language.mlp-width 1568": (
        "model.language.mlp_width = 1568 with train.precision = fp8 over 2 tensor-parallel ranks: FP8 matmuls "
        "with block scaling take multiples of 32 on each rank. Use a multiple of 64, or --precision bf16."
    ),
    "--precision fp8 --recompute-language selective": (
        "parallel.recompute_language = selective with train.precision = fp8: Transformer Engine recomputes whole "
        "layers. Use full or block:N."
    ),
    "--contrastive-weight 0 --generation-weight 0": (
        "loss.contrastive_weight = 0 with loss.generation_weight = 0: there must be something to learn. "
        "The paper uses 0.1 and 1."
    ),
    "--min-lr 1": (
        "optim.min_lr = 1.0 with optim.lr = 0.001: the schedule ends at or below its peak. Every recipe uses 0."
    ),
    "--data.sequence-length 300": (
        "data.sequence_length = 300 with model.language.max_positions = 256: a packed sequence cannot be longer than "
        "the LM's position table. Shorten the sequences or enlarge the table."
    ),
    "--data x --data.sequence-length 16": (
        "data.sequence_length = 16: must hold an image of 16 tokens with its markers, begin and end: at least 21. "
        "Lengthen the sequence, or use a larger patch or smaller image."
    ),
    "--data x/a b x/a": (
        "data.sources named x/a, b, x/a: a source stands twice. "
        "Give every data set and every `name` once; how often one is read is its weight."
    ),
    "--data.packing tight": "data.packing = tight: must be one of best_fit, whole, windows, off, by_kind. For example "
    "best_fit.",
    "--set data.sources=[{path:_a,packing:_by_kind}]": (
        "data.sources.0.packing = by_kind: must be one of best_fit, whole, windows, off. See --help, or any run's "
        "config.yaml."
    ),
    "--data.crop-scale 0.5 0.4": "data.crop_scale = 0.5 0.4: low <= high <= 1. OpenCLIP uses 0.9 1.",
    "--data.crop-ratio 2 1": "data.crop_ratio = 2.0 1.0: low <= high. OpenCLIP uses 0.75 1.3333.",
    "--faults.skip-batches 5 4": ("faults.skip_batches holds 5 4: a range reads FIRST LAST. Exchange the two."),
    "--set data.sources=[{path:_a,cut_rule:_tokens,long_documents:_split}]": (
        "data.sources: cut_rule = tokens with long_documents = split: a document is cut at a token only where its rest "
        "is dropped. Use cut_rule = segments, or long_documents = cut."
    ),
    "--set data.sources=[{path:_a,min_images:_9}]": (
        "data.sources: min_images = 9 with max_images = 6: at least as many images are kept as a document must have. "
        "Exchange them, or lower min_images."
    ),
    "--data.packing windows --set data.sources=[{path:_a,ends:_released}]": (
        "data.sources: a has ends = released with data.packing = windows: windows need begin and end tokens to tell "
        "documents apart. Use packing = off as the released code does."
    ),
    "--set data.sources=[{weight:_0}]": (
        "data.sources.0.path: must be given. Give a value.\n"
        "data.sources.0.weight = 0: must be positive. For example 1.0."
    ),
    "--model.vision.image-size 65": (
        "model.vision.image_size = 65 with model.vision.patch_size = 16: the image must hold whole patches. "
        "Use an image size that is a multiple of 16."
    ),
    "--model.vision.heads 5": (
        "model.vision.width = 128 with model.vision.heads = 5: every head gets the same number of channels. "
        "Choose a number of heads that divides the width."
    ),
    "--model.language.heads 5": (
        "model.language.width = 128 with model.language.heads = 5: every head gets the same number of channels. "
        "Choose a number of heads that divides the width."
    ),
    "--model.pool-heads 5": (
        "model.pool_heads = 5 with model.language.width = 128: the pool's output has the LM's width, split evenly over "
        "its heads. Choose a number of heads that divides the LM's width."
    ),
    # more mistakes than lines
    "--steps 0 --lr 0 --keep 0 --log-every 0": (
        "optim.lr = 0: must be positive. For example 0.0003.\n"
        "train.steps = 0: must be positive. For example 1000.\n"
        "and 2 more mistakes."
    ),
}


def refusal(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_options(arguments)
    return str(caught.value)


@pytest.mark.parametrize("words", OF_DEMO)
def test_a_refused_command_line(words: str) -> None:
    message = refusal("--recipe", "demo", *(word.replace(":_", ": ") for word in words.split()))
    assert message == OF_DEMO[words]
    assert len(message.splitlines()) <= MOST_LINES


def test_what_to_start_from() -> None:
    neither = "neither of --recipe and --config: exactly one says what to run. For a first try: --recipe demo."
    assert refusal() == neither
    assert refusal("--recipe", "demo", "--config", "x.yaml") == neither.replace("neither", "both")
    assert refusal("--recipe", "demoo") == (
        "recipe = demoo: no recipe has this name. Did you mean demo? Recipes: paper-l14, paper-b16, large-h14, "
        "large-g14, released-b16-laion, released-b32-laion, released-b32-mmc4, demo."
    )
    assert refusal("--config", "no/such.yaml") == (
        "no/such.yaml: cannot be read (No such file or directory). Give the path of a config.yaml."
    )


# Text of a file -> the message, without the path in front of it.
FILES = {
    "train: {steps: 0}": ": train.steps = 0: must be positive. For example 1000.",
    "train: {step: 5}": ": train.step: no setting has this name. Did you mean train.steps?",
    "faults: {spike: off}": (
        ": faults.spike = False: must be one of off, rollback. YAML reads on and off as true and false: put the word "
        "in quotes."
    ),
    "parallel: {tensor: 5}": (
        f": model.language.heads = 12 with parallel.tensor_parallel_size = 5: {HEADS}. "
        "Use one of --tp 1, 2, 3, 4, 6, 12."
    ),
    "recipe: paper-l41\ntrain: {steps: 5}": ": recipe = paper-l41: no recipe has this name. Did you mean paper-l14?",
    "train: [1": ", line 1: is not YAML. Correct the file.",
    "- 1": ": does not hold a configuration. Start from a run's config.yaml.",
    "\x00": ": is not YAML. Correct the file.",
}


@pytest.mark.parametrize("text", FILES)
def test_a_refused_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert str(caught.value).partition(" Recipes: ")[0] == f"{path}{FILES[text]}"


def test_processes_and_batches_must_divide() -> None:
    config = parse_options(["--recipe", "demo", "--tp", "2"]).run
    for processes, message in {
        3: "3 processes with --tp 2 --pp 1: the product of tp and pp must divide the number of processes. "
        "Start a multiple of 2 processes.",
        6: "train.global_batch_size = 8 with 3 data-parallel ranks and train.micro_batch_size = 4: every rank runs the "
        "same number of whole micro-batches. Use a multiple of 12.",
    }.items():
        with pytest.raises(ConfigError) as caught:
            config.check_processes(processes)
        assert str(caught.value) == message
    assert config.check_processes(4) == 2
    assert load_recipe("large-g14").check_processes(64) == 8


def test_a_run_that_never_reaches_its_peak_rate_is_refused(tmp_path: Path) -> None:
    """From flags and from a file; a trial of a few steps is warned."""
    message = (
        "optim.warmup_steps = 2000 with train.steps = 500: the learning rate ends at 7.5e-05 and never reaches its "
        "peak of 0.0003: a run is longer than its warm-up. Use --warmup-steps 50, say, or more --steps."
    )
    assert refusal("--recipe", "paper-b16", "--steps", "500") == message
    file = tmp_path / "c.yaml"
    file.write_text("recipe: paper-b16\ntrain: {steps: 500}\n")
    assert refusal("--config", str(file)) == message
    assert refusal("--recipe", "paper-b16", "--set", "train.steps=500") == message
    assert refusal("--recipe", "paper-b16", "--steps", "2000").startswith("optim.warmup_steps = 2000 with")
    assert parse_options(["--recipe", "paper-b16", "--steps", "2001"]).run.never_happens() == []
    trial = parse_options(["--recipe", "paper-b16", "--steps", "20", "--checkpoint-every", "10"]).run
    assert trial.never_happens() == [
        "optim.warmup_steps = 2000 with train.steps = 20: the learning rate ends at 3e-06 and never reaches its peak "
        "of 0.0003"
    ]


# Flags of a demo of 200 steps with a checkpoint every 50 -> what does not come about.
NEVER = {
    "": "",
    "--evaluation.every 201 --evaluation.data d": (
        "evaluation.every = 201 with train.steps = 200: nothing is evaluated"
    ),
    "--evaluation.every 200 --evaluation.data d": "",
    "--evaluation.data d": "evaluation.data = d with evaluation.every = 0: nothing is evaluated",
    "--checkpoint-every 201": ("checkpoint.every = 201 with train.steps = 200: only the last step writes a checkpoint"),
    "--checkpoint-every 201 --checkpoint-minutes 5": "",
    "--checkpoint-every 0": "",
    "--checkpoint.keep-every 100": "",
    "--checkpoint.keep-every 120": (
        "checkpoint.keep_every = 120 with checkpoint.every = 50 and train.steps = 200: no regular checkpoint is kept "
        "for good"
    ),
    "--checkpoint-every 0 --checkpoint.keep-every 10": (
        "checkpoint.keep_every = 10 with checkpoint.every = 0 and train.steps = 200: no regular checkpoint is kept "
        "for good"
    ),
    "--faults.nonfinite rollback --checkpoint-every 0": (
        "faults.nonfinite = rollback with checkpoint.every = 0: there is no checkpoint to go back to"
    ),
    "--faults.spike rollback": "",
    "--faults.spike rollback --faults.spike-warmup 200": (
        "faults.spike_warmup = 200 with train.steps = 200: no spike is looked for"
    ),
    "--faults.spike-warmup 200": "",
    "--faults.skip-batches 3 9 206 207": "",
    "--faults.skip-batches 3 9 209 209": (
        "faults.skip_batches holds 209 209 with train.steps = 200: the run ends before"
    ),
}


@pytest.mark.parametrize("words", NEVER)
def test_what_cannot_come_about_is_named(words: str) -> None:
    config = parse_options(["--recipe", "demo", "--steps", "200", "--checkpoint-every", "50", *words.split()]).run
    assert "; ".join(config.never_happens()) == NEVER[words]
