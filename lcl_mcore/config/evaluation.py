"""Knobs of evaluation: what is trained on an encoder afterwards, and what is measured during pre-training."""

from __future__ import annotations

from typing import ClassVar, Literal

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
class FitConfig:
    """Training of new parts on an encoder, whatever the task (paper appendix A.2, Table 8)."""

    section: ClassVar[str] = "fit"
    positive: ClassVar[tuple[str, ...]] = ("batch_size", "lr", "cache_mb")

    transfer: Literal["frozen", "full"] = "frozen"
    """"frozen": only the new parts learn; "full": the encoder learns too."""
    batch_size: int = 8192
    lr: float = 1e-4
    """Peak learning rate of the new parts."""
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: float = 0.1
    """Share of the steps."""
    seed: int = 0
    train_limit: int = 0
    """Images used for training; 0: all."""
    cache_mb: int = 4096
    """Frozen features are kept in memory up to this size, and computed anew for every use beyond it."""

    def __post_init__(self) -> None:
        for name in self.positive:
            value = getattr(self, name)
            require(
                value > 0, f"{self.section}.{name} = {value}", "must be positive", "See docs/evaluation.md."
            )
        for name in ("weight_decay", "train_limit"):
            value = getattr(self, name)
            require(value >= 0, f"{self.section}.{name} = {value}", "cannot be negative", "Use 0.")
        require(
            0 <= self.warmup < 1,
            f"{self.section}.warmup = {self.warmup}",
            "a share below 1",
            "The paper has 0.05 to 0.107.",
        )


@config_dataclass
class ProbeConfig(FitConfig):
    """A classifier: attention pool, norm and linear layer."""

    section: ClassVar[str] = "probe"
    positive: ClassVar[tuple[str, ...]] = (*FitConfig.positive, "epochs", "layer_decay")

    warmup: float = 0.107
    """The paper has 1,500 of 14,000 steps."""
    epochs: float = 90.0
    layer_decay: float = 0.75
    """Full transfer: factor on the learning rate from each block to the one before it (FLIP, MAE)."""
    test_limit: int = 0
    """Images used for testing, like the training ones drawn with the seed; 0: all."""

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        require(self.test_limit >= 0, f"probe.test_limit = {self.test_limit}", "cannot be negative", "Use 0.")


@config_dataclass
class PairsConfig(FitConfig):
    """Training on images with captions."""

    section: ClassVar[str] = "transfer"
    positive: ClassVar[tuple[str, ...]] = (
        *FitConfig.positive,
        "steps",
        "encoder_lr",
        "text_tokens",
        "chunk_size",
    )

    steps: int = 5000
    encoder_lr: float = 1e-5
    """Full transfer: peak learning rate of the encoder."""
    text_tokens: int = 77
    """Longer captions lose their end."""
    chunk_size: int = 512
    """Pairs in one forward pass; the gradient is that of the whole batch."""


@config_dataclass
class RetrievalConfig(PairsConfig):
    """A new attention pool and a new text encoder, contrastively."""

    batch_size: int = 16384
    lr: float = 1e-3


@config_dataclass
class CaptionConfig(PairsConfig):
    """A connector of two linear layers from patch tokens into a language model."""

    steps: int = 20000
    batch_size: int = 512
    encoder_lr: float = 1e-4
    warmup: float = 0.05
    drop_path: float = 0.2
    """Full transfer: stochastic depth of the encoder's last block while it learns."""
    language_model: str = "fresh"
    """"fresh": random weights in the shape of the run's LM; "pretrained": the run's own; else the folder of a
    Hugging Face causal LM. The paper does not name its LM."""
    freeze_language_model: bool = False

    def __post_init__(self) -> None:
        FitConfig.__post_init__(self)
        require(
            0.0 <= self.drop_path < 1.0,
            f"transfer.drop_path = {self.drop_path}",
            "a probability below 1",
            "The paper has 0.2.",
        )
        require(
            not (self.freeze_language_model and self.language_model == "fresh"),
            "transfer.freeze_language_model with language_model = fresh",
            "random weights that do not learn cannot write",
            "Give --language-model pretrained or a folder, or let it learn.",
        )
