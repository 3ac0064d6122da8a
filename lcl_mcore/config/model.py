"""Shapes of the LCL model: vision encoder, attention pool and projector, causal language model."""

from __future__ import annotations

from typing import Literal

from lcl_mcore.config.base import config_dataclass, require

# The embedding table is padded to this multiple, whatever the tensor-parallel size, so that a
# checkpoint has the same shapes in every layout. Padded rows stay out of the softmax.
VOCAB_MULTIPLE = 128


@config_dataclass
class VisionConfig:
    """Pre-norm ViT with a bidirectional mask (paper section 4.1; released `VisionTransformer`)."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    class_token: bool = True
    """A learned token that runs through the encoder and is dropped before pool and LM."""
    pre_norm: bool = True
    """LayerNorm between the position embedding and the first block (`ln_pre`)."""
    layer_scale: float | None = None
    """Initial value of the per-channel residual scale (layer scale, gamma); None leaves it out."""
    drop_path: float = 0.0
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require(
            self.image_size % self.patch_size == 0,
            f"vision.image_size = {self.image_size}, vision.patch_size = {self.patch_size}",
            "the image must hold whole patches",
            f"Use an image size that is a multiple of {self.patch_size}.",
        )
        require(
            self.width % self.heads == 0,
            f"vision.width = {self.width}, vision.heads = {self.heads}",
            "every head gets the same number of channels",
            "Choose a number of heads that divides the width.",
        )
        require(
            0.0 <= self.drop_path < 1.0,
            f"vision.drop_path = {self.drop_path}",
            "a probability below 1",
            "The paper uses 0.2.",
        )

    @property
    def patches(self) -> int:
        """Patch tokens per image; each becomes one position of the LM sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Tokens in the encoder: patches and the class token if there is one."""
        return self.patches + int(self.class_token)


@config_dataclass
class LanguageConfig:
    """Pre-norm causal LM: OPT's shape (tied, ReLU) or the released CLIP-text shape (untied, GELU)."""

    vocab_size: int = 50272
    """Rows of the embedding that mean something, special tokens included."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: Literal["relu", "gelu"] = "relu"
    max_positions: int = 2048
    position_offset: int = 2
    """OPT keeps two unused rows in front of its position table."""
    tied_head: bool = True
    """The output matrix is the embedding; False gives an own matrix without bias."""
    separate_norms: bool = False
    """Own final LayerNorm for each loss (released code); False shares one (OPT)."""
    dropout: float = 0.0
    """On the embeddings and both residual branches (OPT: 0.1); never on attention weights."""
    init: Literal["opt", "clip_text"] = "opt"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        require(
            self.width % self.heads == 0,
            f"language.width = {self.width}, language.heads = {self.heads}",
            "every head gets the same number of channels",
            "Choose a number of heads that divides the width.",
        )
        require(
            0.0 <= self.dropout < 1.0,
            f"language.dropout = {self.dropout}",
            "a probability below 1",
            "OPT uses 0.1.",
        )

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@config_dataclass
class ModelConfig:
    """The whole LCL model. The contrastive space has the LM's width."""

    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    pool_heads: int = 12
    """Heads of the attention pool, whose value path is also the projector into the LM."""

    def __post_init__(self) -> None:
        require(
            self.language.width % self.pool_heads == 0,
            f"pool_heads = {self.pool_heads}, language.width = {self.language.width}",
            "the pool's output has the LM's width, split evenly over its heads",
            "Choose a number of heads that divides the LM's width.",
        )
