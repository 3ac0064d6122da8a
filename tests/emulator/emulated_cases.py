"""The steps that are counted: one small model in every precision, schedule and layout that one or two GPUs can hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lcl_mcore.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    VisionConfig,
)

MODEL = ModelConfig(
    vision=VisionConfig(
        image_size=64, patch_size=16, width=128, layers=2, heads=2, mlp_width=256, layer_scale=0.1, drop_path=0.2
    ),
    language=LanguageConfig(
        vocab_size=1024, width=128, layers=2, heads=2, mlp_width=256, max_positions=256, dropout=0.1
    ),
    pool_heads=2,
)


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        ranks: processes of the job.
        micro_batches: of one data-parallel rank; more than one: a feature pass as well.
        parallel, train: settings beside the defaults.
        te: Transformer Engine serves it.
    """

    ranks: int = 1
    micro_batches: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    te: bool = False

    def config(self) -> RunConfig:
        """The step's configuration, with dp from ranks and layout."""
        parallel = ParallelConfig(**self.parallel)
        dp = self.ranks // parallel.tensor_parallel_size // parallel.pipeline_parallel_size
        train = TrainConfig(
            **{
                "micro_batch_size": 2,
                "global_batch_size": 2 * self.micro_batches * dp,
                "precision": "bf16",
                "backend": "te" if self.te else "torch",
                "seed": 3,
                **self.train,
            }
        )
        config = RunConfig(
            recipe="emulated", model=MODEL, data=DataConfig(sequence_length=256), parallel=parallel, train=train
        )
        if self.te:
            return replace(config, optim=replace(config.optim, optimizer_backend="te"))
        return replace(config, optim=OptimConfig(optimizer_backend="torch"))


FULL = {"recompute_vision": "full", "recompute_language": "full"}
CASES = {
    "fp32": Case(train={"precision": "fp32"}),
    "bf16": Case(),
    "bf16, feature pass": Case(micro_batches=2),
    "bf16, feature pass, recompute": Case(micro_batches=2, parallel=FULL),
    "transformer-engine bf16": Case(te=True),
    "transformer-engine bf16, no gradient fusion": Case(te=True, parallel={"gradient_accumulation_fusion": False}),
    "transformer-engine fp8 current": Case(te=True, train={"precision": "fp8", "fp8_recipe": "current"}),
    "transformer-engine fp8 delayed": Case(te=True, train={"precision": "fp8", "fp8_recipe": "delayed"}),
    "transformer-engine fp8 block": Case(te=True, train={"precision": "fp8", "fp8_recipe": "block"}),
    "dp2": Case(ranks=2),
    "dp2, feature pass": Case(ranks=2, micro_batches=2),
    "tp2, sequence parallel": Case(
        ranks=2, parallel={"tensor_parallel_size": 2, "sequence_parallel": True, "vision_parallel": "tensor"}
    ),
    "pp2": Case(ranks=2, micro_batches=2, parallel={"pipeline_parallel_size": 2}),
}
