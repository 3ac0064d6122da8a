"""Everything a run is made of; each knob has one owner, and combinations are checked here, on CPU."""

from __future__ import annotations

import re
from typing import Literal

from lcl_mcore.config.base import config_dataclass, require
from lcl_mcore.config.data import DataConfig
from lcl_mcore.config.evaluation import EvaluationConfig
from lcl_mcore.config.faults import FaultConfig
from lcl_mcore.config.model import ModelConfig

VISION_TENSOR_PARAMETERS = 10**9
"""From this size on the ViT's matrices are split over tensor-parallel ranks by default."""


@config_dataclass
class LossConfig:
    """Weights and rules of the two losses (paper section 3.3, Table 6)."""

    contrastive_weight: float = 0.1
    generation_weight: float = 1.0
    averaging: Literal["global", "rank"] = "global"
    """"global": each loss is a mean over the whole global batch (per eligible image, per target token), the
    same for every layout; "rank": mean of the data-parallel ranks' means (released code)."""
    negatives: Literal["global_batch", "micro_batch"] = "global_batch"
    """"micro_batch" is cheaper with gradient accumulation but changes the objective."""
    mask_same_document: bool = False
    """Do not use images of one document as each other's negatives."""
    contrastive_impl: Literal["auto", "reference", "tiled", "triton"] = "auto"
    contrastive_precision: Literal["auto", "fp32", "tf32x3", "fp16"] = "auto"
    """Operands of the logits; sums are always fp32. auto: fp16 in bf16 and FP8 runs on CUDA, else fp32."""
    contrastive_schedule: Literal["auto", "reduce_scatter", "gather_both"] = "auto"
    generation_impl: Literal["auto", "reference", "chunked"] = "auto"

    def __post_init__(self) -> None:
        for name in ("contrastive_weight", "generation_weight"):
            value = getattr(self, name)
            require(
                value >= 0, f"loss.{name} = {value}", "a weight cannot be negative", "Use 0 to switch it off."
            )
        require(
            self.contrastive_weight + self.generation_weight > 0,
            "loss.contrastive_weight = loss.generation_weight = 0",
            "there must be something to learn",
            "The paper uses 0.1 and 1.",
        )


@config_dataclass
class OptimConfig:
    """AdamW and its schedule (paper Tables 7 and 9)."""

    lr: float = 3e-4
    min_lr: float = 0.0
    warmup_steps: int = 2000
    weight_decay: float = 0.1
    """Not applied to tensors with one dimension: norms, biases, layer-scale, class token, temperature.
    Applied to all others: matrices, embeddings, position tables, the pool's query (as released)."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    optimizer_backend: Literal["auto", "torch", "te", "apex"] = "auto"
    """Who updates: Transformer Engine's or Apex's FusedAdam, or torch's fused AdamW. auto: the first that is there."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr = {self.lr}", "must be positive", "The paper uses 3e-4.")
        require(
            0 <= self.min_lr <= self.lr,
            f"optim.min_lr = {self.min_lr}",
            "must lie in [0, lr]",
            "The paper uses 0.",
        )
        require(
            self.warmup_steps >= 0,
            f"optim.warmup_steps = {self.warmup_steps}",
            "cannot be negative",
            "Use 0.",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(
                0 <= value < 1,
                f"optim.{name} = {value}",
                "must lie in [0, 1)",
                "The paper uses 0.9 and 0.95.",
            )


@config_dataclass
class ParallelConfig:
    """How the job's processes share the work. Data-parallel size = processes / (tensor- x pipeline-parallel)."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel: bool = False
    """Split norms and residuals along the tokens over the tensor-parallel ranks."""
    stage_layers: tuple[int, ...] | None = None
    """LM layers on each pipeline stage (0 is allowed on the first, which has the ViT); None: balanced by FLOPs."""
    vision_parallel: Literal["auto", "tensor", "data"] = "auto"
    """The ViT over tensor-parallel ranks. "tensor": each matrix is split, like the LM's; "data": every rank holds
    the whole ViT and encodes a share of the images; "auto": see `RunConfig.resolved_vision_parallel`."""
    recompute_vision: str = "none"
    recompute_language: str = "none"
    """Activations computed again in backward instead of kept. "selective": attention and MLP of each layer;
    "full": all but each layer's input; "block:N": full for the first N layers (of each pipeline stage)."""
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    gradient_accumulation_fusion: bool = True
    """The LM's matmuls add weight gradients to the fp32 buffers themselves, where Transformer Engine or Apex can."""
    timeout_seconds: float = 600.0
    """After this long without progress a collective fails, on every group."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            require(
                value >= 1, f"parallel.{name} = {value}", "at least one process", "Use 1 to switch it off."
            )
        split = self.stage_layers
        require(
            split is None
            or (
                len(split) == self.pipeline_parallel_size and min(split[1:], default=1) > 0 and split[0] >= 0
            ),
            f"parallel.stage_layers = {split} with parallel.pipeline_parallel_size = {self.pipeline_parallel_size}",
            "one number per stage, at least 1 layer on each after the first",
            "Leave it out to have the layers balanced.",
        )
        for name in ("recompute_vision", "recompute_language"):
            value = getattr(self, name)
            require(
                re.fullmatch(r"none|selective|full|block:[1-9]\d*", value) is not None,
                f"parallel.{name} = {value!r}",
                "one of none, selective, full, block:N",
                "For example block:4 recomputes the first 4 layers.",
            )
        require(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "parallel.sequence_parallel = True with parallel.tensor_parallel_size = 1",
            "sequence parallelism splits over tensor-parallel ranks",
            "Set --tp to 2 or more, or drop --sequence-parallel.",
        )
        require(
            self.timeout_seconds > 0,
            f"parallel.timeout_seconds = {self.timeout_seconds}",
            "must be positive",
            "The default is 600.",
        )


@config_dataclass
class TrainConfig:
    """Sizes, length and precision of the run."""

    steps: int = 1000
    micro_batch_size: int = 1
    """Rows (packed sequences) per forward pass on one data-parallel rank."""
    global_batch_size: int = 1
    """Rows per optimizer step over all data-parallel ranks."""
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    fp8_recipe: Literal["current", "delayed", "block"] = "current"
    """Transformer Engine's scaling: from the tensor at hand, from the steps before, or per block of 128 (Hopper on).
    The history of "delayed" is not in checkpoints: a resumed run builds it anew."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backend: Literal["auto", "torch", "te"] = "auto"
    """Transformer layers: Transformer Engine's, or megatron-core's own with torch kernels."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "global_batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"train.{name} = {value}", "must be at least 1", "Set it to 1 or more.")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size = {self.global_batch_size}, micro_batch_size = {self.micro_batch_size}",
            "the global batch holds whole micro-batches",
            f"Use a multiple of {self.micro_batch_size}.",
        )


@config_dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: int = 250
    """Steps between checkpoints; the last step and a stop signal always write one. 0: only those."""
    minutes: float = 0.0
    """Wall time after which one is written even if `every` steps have not passed. 0: no such limit."""
    max_hours: float = 0.0
    """Wall time of this process after which the run has saved and ended with exit code 0. 0: none. The end of a
    SLURM job (SLURM_JOB_END_TIME) is always respected in this way."""
    keep: int = 2
    """Newest complete checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good. 0: none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; costs host memory for one copy of this rank's share."""
    folder: str | None = None
    """Where checkpoints go: a path, or a URL such as s3://bucket/run. None: `checkpoints` in the run's folder."""

    def __post_init__(self) -> None:
        for name in ("every", "minutes", "max_hours", "keep_every"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name} = {value}", "cannot be negative", "Use 0 for none.")
        require(self.keep >= 1, f"checkpoint.keep = {self.keep}", "must be at least 1", "Keep one or more.")


@config_dataclass
class LogConfig:
    """Where progress goes besides the JSON-lines file, which always gets every step."""

    every: int = 10
    """Steps between lines on the terminal."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every = {self.every}", "must be at least 1", "Use 1 for every step.")


@config_dataclass
class RunConfig:
    """A complete, checked description of a training run; saved as `config.yaml` in its folder."""

    recipe: str = "custom"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    faults: FaultConfig = FaultConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        require(
            not self.evaluation.every or self.parallel.pipeline_parallel_size == 1,
            f"evaluation.every = {self.evaluation.every} with parallel.pipeline_parallel_size = "
            f"{self.parallel.pipeline_parallel_size}",
            "evaluation during training runs the whole model on each rank",
            "Evaluate the checkpoints with tools/evaluate.py.",
        )
        tp, model = self.parallel.tensor_parallel_size, self.model
        split_vision = self.resolved_vision_parallel == "tensor"
        for name, heads, split in (
            ("model.vision.heads", model.vision.heads, split_vision),
            ("model.language.heads", model.language.heads, True),
            ("model.pool_heads", model.pool_heads, split_vision),
        ):
            divisors = [d for d in range(1, heads + 1) if heads % d == 0]
            require(
                heads % tp == 0 or not split,
                f"{name} = {heads} with parallel.tensor_parallel_size = {tp}",
                "each tensor-parallel rank gets a whole share of the heads",
                f"Use --tp from {divisors}"
                + (", or --vision-parallel data." if "language" not in name else "."),
            )
        padded = model.language.padded_vocab_size
        require(
            padded % tp == 0,
            f"padded vocabulary {padded} with parallel.tensor_parallel_size = {tp}",
            "the vocabulary is split evenly",
            "Use a --tp that is a power of 2 up to 128.",
        )
        for name, width in (("vision", model.vision.mlp_width), ("language", model.language.mlp_width)):
            require(
                width % tp == 0 or (name == "vision" and not split_vision),
                f"model.{name}.mlp_width = {width} with parallel.tensor_parallel_size = {tp}",
                "the MLP is split evenly",
                "Use a --tp that divides it.",
            )
        length = self.data.sequence_length
        require(
            length <= model.language.max_positions,
            f"data.sequence_length = {length}, model.language.max_positions = {model.language.max_positions}",
            "a row cannot be longer than the LM's position table",
            "Shorten the rows or enlarge the table.",
        )
        require(
            not self.parallel.sequence_parallel or length % tp == 0,
            f"data.sequence_length = {length} with parallel.tensor_parallel_size = {tp} and sequence parallelism",
            "rows are split evenly over the tensor-parallel ranks",
            f"Use a multiple of {tp}.",
        )
        require(
            self.train.precision != "fp8" or self.train.backend != "torch",
            "train.precision = fp8 with train.backend = torch",
            "FP8 layers come from Transformer Engine",
            "Use --backend auto, or --precision bf16.",
        )
        require(
            self.train.precision != "fp8" or self.train.device != "cpu",
            "train.precision = fp8 with train.device = cpu",
            "FP8 needs a GPU of compute capability 8.9 or newer",
            "Use --precision fp32 or bf16.",
        )
        require(
            self.optim.optimizer_backend in ("auto", "torch") or self.train.device != "cpu",
            f"optim.optimizer_backend = {self.optim.optimizer_backend} with train.device = cpu",
            "its kernels work on CUDA only",
            "Use optim.optimizer_backend=auto.",
        )
        for name in ("recompute_vision", "recompute_language"):
            require(
                self.train.precision != "fp8" or getattr(self.parallel, name) != "selective",
                f"parallel.{name} = selective with train.precision = fp8",
                "Transformer Engine recomputes whole layers",
                "Use full or block:N.",
            )
        self.data.require_room_for_images(model.vision.patches)
        self._check_pipeline()

    def _check_pipeline(self) -> None:
        stages, layers, split = (
            self.parallel.pipeline_parallel_size,
            self.model.language.layers,
            self.parallel.stage_layers,
        )
        require(
            stages <= layers + 1,
            f"parallel.pipeline_parallel_size = {stages} with model.language.layers = {layers}",
            "every stage after the first needs an LM layer of its own",
            f"Use --pp {layers + 1} or less.",
        )
        require(
            split is None or sum(split) == layers,
            f"parallel.stage_layers = {split}",
            f"the stages together hold the LM's {layers} layers",
            "Leave it out to have the layers balanced.",
        )
        require(
            stages == 1 or self.loss.negatives == "global_batch" or self.loss.contrastive_weight == 0,
            f"loss.negatives = micro_batch with parallel.pipeline_parallel_size = {stages}",
            "a pipeline forms the contrastive loss once, over the whole global batch",
            "Use --negatives global_batch.",
        )

    @property
    def resolved_vision_parallel(self) -> Literal["tensor", "data"]:
        """How tensor-parallel ranks share the ViT's work.

        "auto" is "tensor" for an encoder whose layers hold 1e9 parameters or more and whose heads and MLP
        divide evenly: there the memory of a whole copy counts. A smaller one is cheaper to replicate:
        it then needs no collective inside its layers, only one gather of its output.
        """
        tp, vision = self.parallel.tensor_parallel_size, self.model.vision
        if self.parallel.vision_parallel != "auto":
            return self.parallel.vision_parallel
        if tp == 1:
            return "tensor"
        divides = vision.heads % tp == 0 and self.model.pool_heads % tp == 0 and vision.mlp_width % tp == 0
        weights = vision.layers * vision.width * (4 * vision.width + 2 * vision.mlp_width)
        large = weights >= VISION_TENSOR_PARAMETERS
        return "tensor" if large and divides else "data"

    def check_processes(self, world_size: int) -> int:
        """Data-parallel size for a job of `world_size` processes.

        Raises:
            ConfigError: the processes or the global batch cannot be split evenly.
        """
        block = self.parallel.tensor_parallel_size * self.parallel.pipeline_parallel_size
        require(
            world_size % block == 0,
            f"{world_size} processes with --tp {self.parallel.tensor_parallel_size} "
            f"--pp {self.parallel.pipeline_parallel_size}",
            "the product of tp and pp must divide the number of processes",
            f"Start a multiple of {block} processes.",
        )
        dp = world_size // block
        rows, micro = self.train.global_batch_size, self.train.micro_batch_size
        require(
            rows % (dp * micro) == 0,
            f"train.global_batch_size = {rows} with {dp} data-parallel ranks and micro_batch_size = {micro}",
            "every rank runs the same number of whole micro-batches",
            f"Use a multiple of {dp * micro}.",
        )
        return dp


def single_process(model: ModelConfig) -> RunConfig:
    """A configuration around a model alone, in one process and fp32."""
    return RunConfig(model=model, data=DataConfig(sequence_length=min(2048, model.language.max_positions)))
