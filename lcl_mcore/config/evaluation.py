"""Knobs of evaluation: probes trained on an encoder, and what is measured during pre-training."""

from __future__ import annotations

from typing import Literal

from lcl_mcore.config.base import config_dataclass, require


@config_dataclass
class EvaluationConfig:
    """Held-out retrieval and generation loss while training; off by default."""

    every: int = 0
    """Steps between evaluations; 0: none."""
    data: str = ""
    """Prepared held-out data set."""
    limit: int = 512
    """Documents used, from the first on."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"evaluation.every = {self.every}", "cannot be negative", "Use 0 for none.")
        require(
            self.limit >= 2, f"evaluation.limit = {self.limit}", "retrieval needs two documents", "Use 512."
        )
        require(
            not self.every or bool(self.data),
            f"evaluation.every = {self.every} with evaluation.data = ''",
            "there is nothing to evaluate on",
            "Give a prepared held-out data set.",
        )


@config_dataclass
class ProbeConfig:
    """How a classifier is trained on an encoder (paper appendix A.2, Table 8)."""

    transfer: Literal["frozen", "full"] = "frozen"
    """"frozen": an attention pool, norm and linear layer on fixed features; "full": the encoder learns too."""
    epochs: float = 90.0
    batch_size: int = 8192
    lr: float = 1e-4
    layer_decay: float = 0.75
    """Full transfer: factor on the learning rate from each block to the one before it (FLIP, MAE)."""
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: float = 0.107
    """Share of the steps; the paper has 1,500 of 14,000."""
    seed: int = 0
    train_limit: int = 0
    """Pictures used for training and for testing, drawn with the seed; 0: all."""
    test_limit: int = 0
    cache_mb: int = 4096
    """Frozen features are kept in memory up to this size, and computed anew for every use beyond it."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "layer_decay", "cache_mb"):
            value = getattr(self, name)
            require(value > 0, f"probe.{name} = {value}", "must be positive", "See docs/evaluation.md.")
        for name in ("weight_decay", "train_limit", "test_limit"):
            value = getattr(self, name)
            require(value >= 0, f"probe.{name} = {value}", "cannot be negative", "Use 0.")
        require(
            0 <= self.warmup < 1, f"probe.warmup = {self.warmup}", "a share below 1", "The paper has 0.107."
        )
