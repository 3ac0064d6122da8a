"""How an encoder is trained further to be evaluated: classifier, retrieval and captioning heads."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lcl_mcore.config.base import config_dataclass, require
from lcl_mcore.config.schema import ShareBelowOne


@config_dataclass
class FitConfig:
    """Training of a transfer head on an encoder, whatever the task (paper appendix A.2, Table 8)."""

    transfer: Literal["frozen", "full"] = "frozen"
    """frozen: only the head learns; full: the encoder learns too."""
    batch_size: PositiveInt = 8192
    """Images per step."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of the head."""
    weight_decay: NonNegativeFloat = 1e-4
    """Weight decay of all matrices."""
    beta1: ShareBelowOne = 0.9
    """Decay of the first moment."""
    beta2: ShareBelowOne = 0.95
    """Decay of the second moment."""
    warmup: ShareBelowOne = 0.1
    """Linear warm-up, as a share of the steps."""
    seed: int = 0
    """Initial weights, order and crops."""
    train_limit: NonNegativeInt = 0
    """Images used for training; 0: all."""
    cache_mb: PositiveInt = 4096
    """Frozen features are kept in memory up to this size, and computed anew for every use beyond it."""


@config_dataclass
class ProbeConfig(FitConfig):
    """A classifier: attention pool, norm and linear layer."""

    probe: Literal["auto", "chosen", "paper"] = "auto"
    """chosen: logistic regression, nearest neighbours and an attention probe, their settings chosen on a validation
    part of the training images. paper: the attention probe with the settings here, by default the paper's. auto: chosen
    for a frozen encoder and up to 100,000 training images, unless a setting of the training is given."""
    seeds: PositiveInt = 1
    """Repetitions with --probe chosen: validation part, order, initial heads, the baseline's random weights."""
    warmup: ShareBelowOne = 0.107
    """Linear warm-up, as a share of the steps (paper: 1,500 of 14,000)."""
    epochs: PositiveFloat = 90.0
    """Passes over the training images."""
    layer_decay: PositiveFloat = 0.75
    """Full transfer: factor on the learning rate from each layer to the one before it (FLIP, MAE)."""
    test_limit: NonNegativeInt = 0
    """Images used for testing, drawn with the seed like the training ones; 0: all."""


@config_dataclass
class PairsConfig(FitConfig):
    """Training on images with captions."""

    transfer: Annotated[Literal["frozen", "full"], tyro.conf.Suppress] = "frozen"
    """As for every head; on the command line it may also be zeroshot, so the command has the flag."""
    steps: PositiveInt = 5000
    """Optimizer steps."""
    encoder_lr: PositiveFloat = 1e-5
    """Full transfer: peak learning rate of the encoder."""
    text_tokens: PositiveInt = 77
    """Longer captions lose their end."""
    chunk_size: PositiveInt = 512
    """Pairs in one forward; the gradient is that of the whole batch."""


@config_dataclass
class RetrievalConfig(PairsConfig):
    """A new attention pool and a new text encoder, contrastively."""

    batch_size: PositiveInt = 16384
    """Pairs per step."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate of pool and text encoder."""


@config_dataclass
class CaptionConfig(PairsConfig):
    """A connector of two linear layers from patch tokens into a language model."""

    steps: PositiveInt = 20000
    """Optimizer steps."""
    batch_size: PositiveInt = 512
    """Pairs per step."""
    encoder_lr: PositiveFloat = 1e-4
    """Full transfer: peak learning rate of the encoder."""
    warmup: ShareBelowOne = 0.05
    """Linear warm-up, as a share of the steps."""
    drop_path: ShareBelowOne = 0.2
    """Full transfer: stochastic depth of the encoder's last layer while it learns."""
    language_model: str = "fresh"
    """fresh: random weights in the shape of the run's LM; pretrained: the run's own; else the folder of a Hugging Face
    causal LM. The paper does not name its LM."""
    freeze_language_model: bool = False
    """The language model keeps its weights; only the connector, and the encoder with full transfer, learn."""

    def __post_init__(self) -> None:
        require(
            not (self.freeze_language_model and self.language_model == "fresh"),
            "freeze_language_model with language_model = fresh",
            "random weights that do not learn cannot write",
            "Give --language-model pretrained or a folder, or let it learn.",
        )
