"""Every knob of a training run, once: its type, bounds, help and default; and the rules across knobs.

One class for each section. `config.cli` builds the command line from these classes, `config.run_folder` reads and
writes them as `config.yaml`. Types bound single values, so `__post_init__` holds only rules across fields.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Annotated, Literal

import tyro
from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lcl_mcore.config.base import config_dataclass, require

Cleaning = Literal["none", "html", "released"]
Packing = Literal["best_fit", "whole", "windows", "off"]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]


def _words(values: tuple[int, ...] | None) -> str:
    """As typed on the command line."""
    return " ".join(map(str, values or ()))


def _known_recompute(value: str) -> str:
    if re.fullmatch(r"none|selective|full|block:[1-9]\d*", value) is None:
        raise ValueError("must be one of none, selective, full, block:N")
    return value


Recompute = Annotated[str, AfterValidator(_known_recompute)]

# The embedding table is padded to this multiple, whatever the tensor-parallel size, so that a
# checkpoint has the same shapes in every layout. Padded rows stay out of the softmax.
VOCAB_MULTIPLE = 128

TRIAL_STEPS = 100
"""Shorter runs are trials: their warm-up may be longer than they are."""

VISION_TENSOR_PARAMETERS = 10**9
"""From this size on the ViT's matrices are split over tensor-parallel ranks by default."""


# --- model


@config_dataclass
class VisionConfig:
    """Pre-norm ViT with a bidirectional mask (paper section 4.1; released `VisionTransformer`)."""

    image_size: PositiveInt = 224
    """Pixels of a side."""
    patch_size: PositiveInt = 16
    """Pixels of a side of one patch."""
    width: PositiveInt = 768
    """Channels of the residual stream."""
    layers: PositiveInt = 12
    """Transformer layers."""
    heads: PositiveInt = 12
    """Attention heads."""
    mlp_width: PositiveInt = 3072
    """Hidden channels of the MLP."""
    class_token: bool = True
    """A learned token that runs through the encoder and is dropped before pool and LM."""
    pre_norm: bool = True
    """LayerNorm between the position embedding and the first layer (`ln_pre`)."""
    layer_scale: float | None = None
    """Initial value of the per-channel residual scale (layer scale, gamma; the paper states none); none: no layer
    scale."""
    drop_path: Annotated[ShareBelowOne, tyro.conf.arg(aliases=("--drop-path",))] = 0.0
    """Stochastic depth of the last layer; grows linearly from 0 at the first (paper: 0.2)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the LayerNorms."""

    def __post_init__(self) -> None:
        require(
            self.image_size % self.patch_size == 0,
            f"model.vision.image_size = {self.image_size} with model.vision.patch_size = {self.patch_size}",
            "the image must hold whole patches",
            f"Use an image size that is a multiple of {self.patch_size}.",
        )
        require(
            self.width % self.heads == 0,
            f"model.vision.width = {self.width} with model.vision.heads = {self.heads}",
            "every head gets the same number of channels",
            "Choose a number of heads that divides the width.",
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

    vocab_size: PositiveInt = 50272
    """Rows of the embedding that mean something, special tokens included."""
    width: PositiveInt = 768
    """Channels of the residual stream, and of the contrastive space."""
    layers: PositiveInt = 12
    """Transformer layers."""
    heads: PositiveInt = 12
    """Attention heads."""
    mlp_width: PositiveInt = 3072
    """Hidden channels of the MLP."""
    activation: Literal["relu", "gelu"] = "relu"
    """Non-linearity of the MLP."""
    max_positions: PositiveInt = 2048
    """Length of the position table; a packed sequence is at most this long."""
    position_offset: NonNegativeInt = 2
    """Unused rows in front of the position table (OPT: 2)."""
    tied_head: bool = True
    """The output matrix is the embedding; otherwise it is a matrix of its own, without bias."""
    separate_norms: bool = False
    """A final LayerNorm for each loss (released code) instead of one for both (OPT, whose LM the paper takes)."""
    dropout: Annotated[ShareBelowOne, tyro.conf.arg(aliases=("--dropout",))] = 0.0
    """On both residual branches, as in OPT's training (0.1). Not on attention weights, where OPT had 0.1 too: the
    attention kernels draw masks that no other layout and no resumed run could repeat."""
    embedding_dropout: ShareBelowOne = 0.0
    """On what enters the first layer, image latents included (OPT: none; before 0.2.0 it was `dropout`)."""
    init: Literal["opt", "clip_text"] = "opt"
    """Initial weights. opt: N(0, 0.02), biases 0, as in transformers' OPTConfig (OPT's own training began with 0.006);
    clip_text: the released code's, which is CLIP's."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of the LayerNorms."""

    def __post_init__(self) -> None:
        require(
            self.width % self.heads == 0,
            f"model.language.width = {self.width} with model.language.heads = {self.heads}",
            "every head gets the same number of channels",
            "Choose a number of heads that divides the width.",
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table as it is stored."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@config_dataclass
class ModelConfig:
    """The whole LCL model. The contrastive space has the LM's width."""

    vision: VisionConfig = VisionConfig()
    language: LanguageConfig = LanguageConfig()
    pool_heads: PositiveInt = 12
    """Heads of the attention pool, whose value path is also the projector into the LM."""

    def __post_init__(self) -> None:
        require(
            self.language.width % self.pool_heads == 0,
            f"model.pool_heads = {self.pool_heads} with model.language.width = {self.language.width}",
            "the pool's output has the LM's width, split evenly over its heads",
            "Choose a number of heads that divides the LM's width.",
        )


# --- data


@config_dataclass
class TokenizerConfig:
    """Which vocabulary turns text into ids, and where the special ids lie."""

    kind: Literal["file", "opt", "clip"] = "file"
    """file: any Hugging Face tokenizer.json, the special ids follow its last id; opt: OPT's vocabulary (</s> = 2 begins
    and ends, pad 1, image ids 50265..50267 of 50272); clip: CLIP's, with the ids of the released code (49406..49410 of
    49411, pad 0)."""
    path: Annotated[str, tyro.conf.arg(aliases=("--tokenizer",))] = ""
    """The tokenizer.json, or a folder that holds it (or vocab.json and merges.txt, or CLIP's
    bpe_simple_vocab_16e6.txt.gz); for opt and clip also a name in the local Hugging Face cache."""
    cleaning: Literal["auto", "none", "html", "released"] = "auto"
    """What happens to a text before it becomes ids, for all data of the run. none: nothing; html: entities and white
    space (clip in earlier versions); released: what the released code does, ftfy, entities, white space, lower case;
    auto: released for clip, else none."""

    @property
    def resolved_cleaning(self) -> Cleaning:
        """What "auto" stands for."""
        if self.cleaning == "auto":
            return "released" if self.kind == "clip" else "none"
        return self.cleaning


@config_dataclass
class SourceConfig:
    """One prepared data set (a folder or URL with `dataset.json`) and how its documents are used."""

    path: Annotated[str, Field(min_length=1)]
    """Folder or fsspec URL (s3://bucket/folder)."""
    weight: PositiveFloat = 1.0
    """Share of the mixture, counted in documents (a pair is one), relative to the other sources."""
    name: str = ""
    """Name in logs and in saved positions; by default the last part of the path."""
    min_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.24
    """Matched documents: images with a lower cosine similarity to their text are skipped (paper: 0.24)."""
    min_images: NonNegativeInt = 0
    """Documents with fewer images are skipped: those that are left after similarity, choice and cutting count."""
    max_images: NonNegativeInt = 6
    """Of more images, this many are kept, as image_choice says."""
    image_choice: Literal["random", "first"] = "random"
    """Which are kept: random ones (the paper), or the first in document order (released code)."""
    one_image_per_text: bool = False
    """Matched documents: keep one random image of those that share a text."""
    image_first_probability: Share = 0.5
    """Pairs and matched documents: chance that an image stands before its text (paper: random; released code: 0.5)."""
    max_text_tokens: NonNegativeInt = 0
    """Pairs: longer captions are cut; 0: as long as a packed sequence allows."""
    packing: Packing | None = None
    """How this source's documents share sequences (see `data.packing`); none: as data.packing says. Sources of equal
    packing share sequences."""
    long_documents: Literal["auto", "cut", "split"] = "auto"
    """cut: what exceeds a packed sequence is dropped, in whole segments; split: it goes on in another one; auto: split
    for documents that are sequences, unless packing is whole, cut otherwise."""
    cut_rule: Literal["segments", "tokens"] = "segments"
    """Where a long document is cut: segments, between whole texts and images (the paper); tokens, anywhere in a text,
    with the end token forced at the last place (released code)."""
    ends: Literal["document", "released"] = "document"
    """document: every document has begin and end tokens; released: a pair with the image first has no begin token, one
    with the text first has no end token."""

    def __post_init__(self) -> None:
        require(
            self.min_images <= self.max_images,
            f"data.sources: min_images = {self.min_images} with max_images = {self.max_images}",
            "at least as many images are kept as a document must have",
            "Exchange them, or lower min_images.",
        )
        require(
            not (self.cut_rule == "tokens" and self.long_documents == "split"),
            "data.sources: cut_rule = tokens with long_documents = split",
            "a document is cut at a token only where its rest is dropped",
            "Use cut_rule = segments, or long_documents = cut.",
        )

    @property
    def label(self) -> str:
        """The name used in positions, logs and error messages."""
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


def _named_apart(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    """Folders of one name (`A/train B/train`) are named by as much of their paths as tells them apart."""
    result = []
    for source in sources:
        rivals = [f"/{other.path.rstrip('/')}" for other in sources if other.label == source.label]
        parts = source.path.rstrip("/").split("/")
        depth = 1
        while depth < len(parts) and sum(rival.endswith("/" + "/".join(parts[-depth:])) for rival in rivals) > 1:
            depth += 1
        named = source.name or len(rivals) == 1
        result.append(source if named else replace(source, name="/".join(parts[-max(depth, 2) :])))
    return tuple(result)


@config_dataclass
class DataConfig:
    """What the loader reads and how it packs and decodes."""

    sources: Annotated[tuple[SourceConfig, ...], tyro.conf.Suppress] = ()
    """Prepared data sets; on the command line --data PATH[:WEIGHT]."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: Annotated[int, Field(ge=8)] = 2048
    """Tokens per packed sequence."""
    packing: Literal[Packing, "by_kind"] = "best_fit"
    """best_fit: whole documents are chosen so that sequences are full, and one is split between segments when min_fill
    needs it; whole: the same, but none is ever split, and an image stays with its sentence; windows: documents end to
    end, cut every sequence_length tokens, images moved whole (OBELICS in the paper); off: one document per sequence;
    by_kind: windows for documents that are sequences (OBELICS), whole for others (MMC4, pairs)."""
    packing_buffer: Annotated[int, Field(ge=2)] = 8
    """best_fit, whole: how many sequences' worth of documents a sample stream chooses from."""
    min_fill: Share = 0.98
    """best_fit: share of a sequence below which a document is split; 0: never."""
    balance_images: bool = False
    """best_fit, whole: prefer the choice whose number of images is nearest the average."""
    context_rule: Literal["text", "index0"] = "text"
    """Which images enter the contrastive loss. text: some text or image of the same document comes before; index0
    (released code): <BoI> is not the document's first token."""
    shuffle: bool = True
    """off: documents in stored order, still spread over the sample streams."""
    shuffle_block: PositiveInt = 1
    """Documents that stay together in the shuffled order; above 1 a reader of an object store fetches neighbours in one
    request."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Random resized crop: smallest and largest share of the area (OpenCLIP, which the paper names: 0.9 1)."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 4.0 / 3.0)
    """Random resized crop: smallest and largest aspect ratio of the window (OpenCLIP: 3/4 4/3)."""
    decode_backend: Literal["auto", "cpu", "dali"] = "auto"
    """cpu: libjpeg-turbo and Pillow; dali: NVIDIA DALI. auto: cpu, whose 500 images/s a core feed a GPU from 4 cores on
    and take nothing from it; DALI, if installed, for a GPU with fewer."""
    decode_threads: PositiveInt | Literal["auto"] = "auto"
    """Threads of each rank that read and decode images. auto: the cores this process may use, divided by the ranks of
    its node, at most 16."""
    prefetch_steps: PositiveInt = 2
    """Steps prepared ahead of the one being trained on."""
    max_consecutive_failures: PositiveInt = 100
    """Images in succession that may fail before the run stops."""
    verify_images: bool = True
    """Compare every image with the sha256 of its manifest entry."""
    read_retries: NonNegativeInt = 5
    """Attempts for a failed read of an object store, with growing pauses."""
    read_cache_mb: PositiveInt = 256
    """Megabytes of memory for bytes fetched from an object store and not yet used."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", _named_apart(self.sources))
        labels = [source.label for source in self.sources]
        require(
            len(set(labels)) == len(labels),
            f"data.sources named {', '.join(labels)}",
            "a source stands twice",
            "Give every data set and every `name` once; how often one is read is its weight.",
        )
        require(
            self.crop_scale[0] <= self.crop_scale[1] <= 1,
            f"data.crop_scale = {self.crop_scale[0]} {self.crop_scale[1]}",
            "low <= high <= 1",
            "OpenCLIP uses 0.9 1.",
        )
        require(
            self.crop_ratio[0] <= self.crop_ratio[1],
            f"data.crop_ratio = {self.crop_ratio[0]} {self.crop_ratio[1]}",
            "low <= high",
            "OpenCLIP uses 0.75 1.3333.",
        )
        for source in self.sources:
            packing = source.packing or self.packing
            require(
                not (packing == "whole" and source.long_documents == "split"),
                f"data.sources: {source.label} has long_documents = split with data.packing = whole",
                "a document is whole, or it goes on in another sequence",
                "Use packing = best_fit, or long_documents = cut.",
            )
            require(
                not (source.ends == "released" and packing == "windows"),
                f"data.sources: {source.label} has ends = released with data.packing = windows",
                "windows need begin and end tokens to tell documents apart",
                "Use packing = off as the released code does.",
            )

    def require_room_for_images(self, tokens_per_image: int) -> None:
        """Refuse a sequence that cannot hold one image with begin, end and one token of text."""
        needed = tokens_per_image + 5
        require(
            not self.sources or self.sequence_length >= needed,
            f"data.sequence_length = {self.sequence_length}",
            f"must hold an image of {tokens_per_image} tokens with its markers, begin and end: at least {needed}",
            "Lengthen the sequence, or use a larger patch or smaller image.",
        )


# --- objective and optimizer


@config_dataclass
class LossConfig:
    """Weights and rules of the two losses (paper section 3.3, Table 6)."""

    contrastive_weight: NonNegativeFloat = 0.1
    """Weight of the contrastive loss (paper: 0.1); 0 switches it off."""
    generation_weight: NonNegativeFloat = 1.0
    """Weight of the generation loss (paper: 1); 0 switches it off."""
    averaging: Literal["global", "rank"] = "global"
    """global: each loss is a mean over the whole global batch (per eligible image, per target token), the same for
    every layout; rank: mean of the data-parallel ranks' means (released code)."""
    negatives: Literal["global_batch", "micro_batch"] = "global_batch"
    """Where contrastive negatives come from; micro_batch is cheaper with gradient accumulation but changes the
    objective."""
    mask_same_document: bool = False
    """Do not use images of one document as each other's negatives."""
    contrastive_impl: Literal["auto", "reference", "tiled", "triton"] = "auto"
    """Kernel of the contrastive loss."""
    contrastive_precision: Literal["auto", "fp32", "tf32x3", "fp16", "bf16"] = "auto"
    """Operands of the logits; sums are always fp32. auto: fp16 in bf16 and FP8 runs on CUDA, else fp32. bf16 is for
    CPUs with units for it."""
    contrastive_schedule: Literal["auto", "reduce_scatter", "gather_both"] = "auto"
    """Collectives of the contrastive loss."""
    generation_impl: Literal["auto", "reference", "chunked"] = "auto"
    """Kernel of the generation loss. chunked never stores all logits; auto is that, in Triton where it runs."""

    def __post_init__(self) -> None:
        require(
            self.contrastive_weight + self.generation_weight > 0,
            "loss.contrastive_weight = 0 with loss.generation_weight = 0",
            "there must be something to learn",
            "The paper uses 0.1 and 1.",
        )


@config_dataclass
class OptimConfig:
    """AdamW and its schedule (paper Tables 7 and 9)."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 0.0
    """Learning rate at the end of the cosine."""
    warmup_steps: NonNegativeInt = 2000
    """Steps of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.1
    """Not applied to tensors with one dimension (norms, biases, layer scale, class token, temperature) but to all
    others: matrices, embeddings, position tables, the pool's query (as released)."""
    beta1: ShareBelowOne = 0.9
    """Decay of the first moment."""
    beta2: ShareBelowOne = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Epsilon of the update."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    optimizer_backend: Literal["auto", "torch", "te", "apex"] = "auto"
    """Who updates: Transformer Engine's or Apex's FusedAdam, or torch's fused AdamW. auto: the first that is there."""

    def __post_init__(self) -> None:
        require(
            self.min_lr <= self.lr,
            f"optim.min_lr = {self.min_lr} with optim.lr = {self.lr}",
            "the schedule ends at or below its peak",
            "Every recipe uses 0.",
        )


# --- processes and steps


@config_dataclass
class ParallelConfig:
    """How the job's processes share the work. Data-parallel size = processes / (tensor- x pipeline-parallel)."""

    tensor_parallel_size: Annotated[PositiveInt, tyro.conf.arg(aliases=("--tp",))] = 1
    """Ranks that share each layer; 1 switches tensor parallelism off."""
    pipeline_parallel_size: Annotated[PositiveInt, tyro.conf.arg(aliases=("--pp",))] = 1
    """Pipeline stages; 1 switches pipeline parallelism off."""
    sequence_parallel: bool = False
    """Split norms and residuals along the tokens over the tensor-parallel ranks."""
    stage_layers: tuple[NonNegativeInt, ...] | None = None
    """LM layers on each pipeline stage (0 is allowed on the first, which has the ViT); none: balanced by FLOPs."""
    vision_parallel: Literal["auto", "tensor", "data"] = "auto"
    """The ViT over tensor-parallel ranks. tensor: each matrix is split, like the LM's; data: every rank holds the whole
    ViT and encodes a share of the images; auto: tensor for an encoder of 1e9 parameters or more, else data."""
    recompute_vision: Recompute = "none"
    """ViT activations computed again in backward instead of kept. selective: attention and MLP of each layer; full: all
    but each layer's input; block:N: full for the first N layers (of each pipeline stage); none."""
    recompute_language: Recompute = "none"
    """The same for the LM."""
    overlap_grad_reduce: bool = True
    """Overlap gradient reduction with backward."""
    overlap_param_gather: bool = True
    """Overlap parameter gathering with forward."""
    gradient_accumulation_fusion: bool = True
    """The LM's matmuls add weight gradients to the fp32 buffers themselves, where Transformer Engine or Apex can;
    our own operators always do."""
    timeout_seconds: Annotated[PositiveFloat, tyro.conf.arg(aliases=("--timeout",))] = 600.0
    """After this long without progress a collective fails, on every group."""

    def __post_init__(self) -> None:
        split = self.stage_layers
        require(
            split is None or (len(split) == self.pipeline_parallel_size and min(split[1:], default=1) > 0),
            f"parallel.stage_layers = {_words(split)} with parallel.pipeline_parallel_size = "
            f"{self.pipeline_parallel_size}",
            "one number per stage, at least 1 layer on each after the first",
            "Leave it out to have the layers balanced.",
        )
        require(
            not self.sequence_parallel or self.tensor_parallel_size > 1,
            "parallel.sequence_parallel = True with parallel.tensor_parallel_size = 1",
            "sequence parallelism splits over tensor-parallel ranks",
            "Set --tp to 2 or more, or drop --sequence-parallel.",
        )


@config_dataclass
class TrainConfig:
    """Sizes, length and precision of the run."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    micro_batch_size: PositiveInt | Literal["auto"] = 1
    """Packed sequences per forward on one data-parallel rank. auto: the largest that divides a rank's share of the
    global batch and fits, as the planner counts it: in 92 % of a GPU's memory; on a CPU in half of the machine's,
    shared by the ranks on it. The run's config.yaml has the number."""
    global_batch_size: PositiveInt = 1
    """Packed sequences per optimizer step over all data-parallel ranks."""
    seed: int = 0
    """Initial weights, data order and all masks."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Arithmetic of the towers; losses, temperature and master weights are always fp32."""
    fp8_recipe: Literal["current", "delayed", "block"] = "current"
    """Transformer Engine's scaling: from the tensor at hand, from the steps before, or per block of 128 (Hopper on).
    The history of delayed is not in checkpoints: a resumed run builds it anew."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    backend: Literal["auto", "torch", "te"] = "auto"
    """Transformer layers: Transformer Engine's, or megatron-core's own with torch kernels."""
    elementwise_backend: Literal["auto", "triton", "plain"] = "auto"
    """What is between matrix products (bias, layer scale, drop path, dropout, residual sum, norm, activation): one
    Triton kernel each way, or torch's operators."""

    @property
    def token_multiple(self) -> int:
        """What Transformer Engine wants token counts and widths to be a multiple of: 16 in FP8 (see its `autocast`), 32
        with block scales, so that GPUs that serve them in MXFP8's blocks of 32 take them too; 1 in other precisions."""
        if self.precision != "fp8":
            return 1
        return 32 if self.fp8_recipe == "block" else 16

    @property
    def resolved_micro_batch_size(self) -> int:
        """`micro_batch_size` once it is a number.

        Raises:
            ConfigError: it is "auto" still, which only training and the planner resolve.
        """
        size = self.micro_batch_size
        rule, remedy = "only training and the planner choose a size", "Use --micro-batch-size 1, say."
        require(size != "auto", "train.micro_batch_size = auto", rule, remedy)
        assert isinstance(size, int)
        return size

    def __post_init__(self) -> None:
        require(
            self.micro_batch_size == "auto" or self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size = {self.global_batch_size} with train.micro_batch_size = {self.micro_batch_size}",
            "the global batch holds whole micro-batches",
            f"Use a multiple of {self.micro_batch_size}.",
        )


@config_dataclass
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every: Annotated[NonNegativeInt, tyro.conf.arg(aliases=("--checkpoint-every",))] = 250
    """Steps between checkpoints; the last step and a stop signal always write one. 0: only those."""
    minutes: Annotated[NonNegativeFloat, tyro.conf.arg(aliases=("--checkpoint-minutes",))] = 0.0
    """Wall time after which one is written even if `every` steps have not passed. 0: no such limit."""
    max_hours: Annotated[NonNegativeFloat, tyro.conf.arg(aliases=("--max-hours",))] = 0.0
    """Wall time of this process after which the run has saved and ended with exit code 0. 0: none. The end of a SLURM
    job (SLURM_JOB_END_TIME) is always respected in this way."""
    keep: Annotated[PositiveInt, tyro.conf.arg(aliases=("--keep",))] = 2
    """Newest complete checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: NonNegativeInt = 0
    """Checkpoints at multiples of this step are kept for good. 0: none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; costs host memory for one copy of this rank's share."""
    folder: Annotated[str | None, tyro.conf.arg(aliases=("--checkpoint-folder",))] = None
    """Where checkpoints go: a path, or a URL such as s3://bucket/run; none: `checkpoints` in the run's folder."""


@config_dataclass
class LogConfig:
    """Where progress goes besides the JSON-lines file, which always gets every step."""

    every: Annotated[PositiveInt, tyro.conf.arg(aliases=("--log-every",))] = 10
    """Steps between lines on the terminal."""
    tensorboard: bool = True
    """Also write TensorBoard events, where the package is installed."""


@config_dataclass
class FaultConfig:
    """What a run does about non-finite numbers, loss spikes and slow ranks (docs/reliability.md).

    Batches are numbered from 0 in the order of the data.
    """

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """After a NaN or Inf, which never reaches the parameters. stop: end the run; skip: skip the batch and go on;
    rollback: go back to the newest checkpoint, then skip the batch."""
    nonfinite_limit: PositiveInt = 3
    """The run ends when this many batches in succession were not finite."""
    spike: Literal["off", "rollback"] = "off"
    """After a loss spike: go on, or go back to the newest checkpoint before it and skip its batches (PaLM,
    arXiv:2204.02311 section 5.1)."""
    spike_deviations: PositiveFloat = 6.0
    """A loss is an outlier when it exceeds its running mean by this many mean absolute deviations."""
    spike_steps: PositiveInt = 3
    """That many outliers in succession are a spike."""
    spike_margin: NonNegativeInt = 8
    """Batches before the first outlier that are skipped too: the second moment is wrong up to 8 steps earlier (Wortsman
    et al., arXiv:2304.13013)."""
    spike_warmup: PositiveInt = 100
    """Steps whose losses only build the statistics."""
    rollback_limit: PositiveInt = 3
    """The run ends when it would go back more often than this without getting past the same step."""
    skip_batches: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Ranges FIRST LAST of batches that are read but never trained on."""
    lease_seconds: Annotated[PositiveFloat, Field(le=3600)] = 60.0
    """One folder has one writer; after so long without a sign of life from it, another job may take the folder over."""
    straggler_ratio: Annotated[float, Field(gt=1)] = 1.5
    """The slowest rank is named when its own time exceeds this many times the median of the others."""

    def __post_init__(self) -> None:
        for first, last in self.skip_batches:
            require(
                first <= last,
                f"faults.skip_batches holds {first} {last}",
                "a range reads FIRST LAST",
                "Exchange the two.",
            )


@config_dataclass
class EvaluationConfig:
    """Held-out retrieval and generation loss while training; off by default."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0: none."""
    data: str = ""
    """Prepared held-out data set."""
    limit: Annotated[int, Field(ge=2)] = 512
    """Documents used, from the first on."""

    def __post_init__(self) -> None:
        require(
            not self.every or bool(self.data),
            f"evaluation.every = {self.every} without evaluation.data",
            "there is nothing to evaluate on",
            "Give a prepared held-out data set.",
        )


# --- the run


@config_dataclass
class RunConfig:
    """A complete, checked description of a training run; saved as `config.yaml` in its folder."""

    recipe: Annotated[str, tyro.conf.Suppress] = "custom"
    """Name of the recipe that it started from."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: Annotated[LossConfig, tyro.conf.OmitArgPrefixes] = LossConfig()
    optim: Annotated[OptimConfig, tyro.conf.OmitArgPrefixes] = OptimConfig()
    parallel: Annotated[ParallelConfig, tyro.conf.OmitArgPrefixes] = ParallelConfig()
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes] = TrainConfig()
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
        self._check_tensor_parallel()
        self._check_pipeline()
        self._check_sequences()
        self._check_backends()

    def _check_tensor_parallel(self) -> None:
        tp, model = self.parallel.tensor_parallel_size, self.model
        split_vision = self.resolved_vision_parallel == "tensor"
        for name, heads, split in (
            ("model.vision.heads", model.vision.heads, split_vision),
            ("model.language.heads", model.language.heads, True),
            ("model.pool_heads", model.pool_heads, split_vision),
        ):
            divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
            require(
                heads % tp == 0 or not split,
                f"{name} = {heads} with parallel.tensor_parallel_size = {tp}",
                "each tensor-parallel rank gets a whole share of the heads",
                f"Use one of --tp {divisors}" + (", or --vision-parallel data." if "language" not in name else "."),
            )
        padded = model.language.padded_vocab_size
        require(
            padded % tp == 0,
            f"padded vocabulary of {padded} with parallel.tensor_parallel_size = {tp}",
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

    def _check_pipeline(self) -> None:
        stages, layers = self.parallel.pipeline_parallel_size, self.model.language.layers
        split = self.parallel.stage_layers
        require(
            stages <= layers + 1,
            f"parallel.pipeline_parallel_size = {stages} with model.language.layers = {layers}",
            "every stage after the first needs an LM layer of its own",
            f"Use --pp {layers + 1} or less.",
        )
        require(
            split is None or sum(split) == layers,
            f"parallel.stage_layers = {_words(split)}",
            f"the stages together hold the LM's {layers} layers",
            "Leave it out to have the layers balanced.",
        )
        require(
            stages == 1 or self.loss.negatives == "global_batch" or self.loss.contrastive_weight == 0,
            f"loss.negatives = micro_batch with parallel.pipeline_parallel_size = {stages}",
            "a pipeline forms the contrastive loss once, over the whole global batch",
            "Use --negatives global_batch.",
        )

    def _check_sequences(self) -> None:
        tp, length, table = (
            self.parallel.tensor_parallel_size,
            self.data.sequence_length,
            self.model.language.max_positions,
        )
        require(
            length <= table,
            f"data.sequence_length = {length} with model.language.max_positions = {table}",
            "a packed sequence cannot be longer than the LM's position table",
            "Shorten the sequences or enlarge the table.",
        )
        require(
            not self.parallel.sequence_parallel or length % tp == 0,
            f"data.sequence_length = {length} with parallel.tensor_parallel_size = {tp} and sequence parallelism",
            "sequences are split evenly over the tensor-parallel ranks",
            f"Use a multiple of {tp}.",
        )
        self.data.require_room_for_images(self.model.vision.patches)

    def _check_backends(self) -> None:
        fp8 = self.train.precision == "fp8"
        require(
            not fp8 or self.train.backend != "torch",
            "train.precision = fp8 with train.backend = torch",
            "FP8 layers come from Transformer Engine",
            "Use --backend auto, or --precision bf16.",
        )
        require(
            not fp8 or self.train.device != "cpu",
            "train.precision = fp8 with train.device = cpu",
            "FP8 needs a GPU of compute capability 8.9 or newer",
            "Use --precision fp32 or bf16.",
        )
        stages = self.parallel.pipeline_parallel_size
        require(
            not fp8 or self.train.fp8_recipe != "delayed" or stages == 1,
            f"train.fp8_recipe = delayed with parallel.pipeline_parallel_size = {stages}",
            "Transformer Engine shares its scales among all processes of the job, and stages have different ones",
            "Use --fp8-recipe current or block.",
        )
        self._check_fp8_sizes()
        require(
            self.train.elementwise_backend != "triton" or self.train.device != "cpu",
            "train.elementwise_backend = triton with train.device = cpu",
            "its kernels work on CUDA only",
            "Use --elementwise-backend auto.",
        )
        for name in ("recompute_vision", "recompute_language"):
            require(
                not fp8 or getattr(self.parallel, name) != "selective",
                f"parallel.{name} = selective with train.precision = fp8",
                "Transformer Engine recomputes whole layers",
                "Use full or block:N.",
            )
        require(
            self.optim.optimizer_backend in ("auto", "torch") or self.train.device != "cpu",
            f"optim.optimizer_backend = {self.optim.optimizer_backend} with train.device = cpu",
            "its kernels work on CUDA only",
            "Use --optimizer-backend auto.",
        )

    def _check_fp8_sizes(self) -> None:
        """Every side of an FP8 matmul on one rank; the ViT's token counts are padded instead (`models.lcl`)."""
        multiple, tp = self.train.token_multiple, self.parallel.tensor_parallel_size
        auto = self.train.micro_batch_size == "auto"
        vision, language = self.model.vision, self.model.language
        shares = {"vision": 1 if self.resolved_vision_parallel == "data" else tp, "language": tp}
        length = self.data.sequence_length
        tokens = (f"data.sequence_length = {length}", length)
        if not (auto or self.evaluation.every):  # whose last micro-batch may hold a single sequence
            size = self.train.resolved_micro_batch_size
            tokens = (f"{tokens[0]} x train.micro_batch_size = {size}", length * size)
        sizes = {
            tokens: tp if self.parallel.sequence_parallel else 1,
            (f"model.vision.width = {vision.width}", vision.width): shares["vision"],
            (f"model.vision.mlp_width = {vision.mlp_width}", vision.mlp_width): shares["vision"],
            (f"model.language.width = {language.width}", language.width): shares["language"],
            (f"model.language.mlp_width = {language.mlp_width}", language.mlp_width): shares["language"],
        }
        for (text, size), ranks in sizes.items():
            require(
                size % (multiple * ranks) == 0,
                f"{text} with train.precision = fp8" + (f" over {ranks} tensor-parallel ranks" if ranks > 1 else ""),
                f"FP8 matmuls with {self.train.fp8_recipe} scaling take multiples of {multiple} on each rank",
                f"Use a multiple of {multiple * ranks}, or --precision bf16.",
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

    def check_schedule(self) -> None:
        """Refuse a run whose learning rate never reaches its peak, unless it is a trial of a few steps.

        Raises:
            ConfigError: the warm-up is not shorter than the run.
        """
        require(
            self.optim.warmup_steps < self.train.steps or self.train.steps < TRIAL_STEPS,
            self._unreached_peak,
            "a run is longer than its warm-up",
            f"Use --warmup-steps {self.train.steps // 10}, say, or more --steps.",
        )

    @property
    def _unreached_peak(self) -> str:
        warmup, steps, peak = self.optim.warmup_steps, self.train.steps, self.optim.lr
        last = peak * steps / max(warmup, 1)
        return (
            f"optim.warmup_steps = {warmup} with train.steps = {steps}: the learning rate ends at {last:.3g} and "
            f"never reaches its peak of {peak:.3g}"
        )

    def never_happens(self) -> list[str]:
        """What was asked for and cannot come about in this run, one sentence each, without a full stop."""
        steps, every, keep = self.train.steps, self.checkpoint.every, self.checkpoint.keep_every
        evaluation, faults = self.evaluation, self.faults
        goes_back = [name for name in ("nonfinite", "spike") if getattr(faults, name) == "rollback"]
        skipped = sum(last - first + 1 for first, last in faults.skip_batches)
        late = [f"{first} {last}" for first, last in faults.skip_batches if first >= steps + skipped]
        cautions = {
            self._unreached_peak: self.optim.warmup_steps >= steps,
            f"evaluation.every = {evaluation.every} with train.steps = {steps}: nothing is evaluated": (
                evaluation.every > steps
            ),
            f"evaluation.data = {evaluation.data} with evaluation.every = 0: nothing is evaluated": (
                bool(evaluation.data) and not evaluation.every
            ),
            f"checkpoint.every = {every} with train.steps = {steps}: only the last step writes a checkpoint": (
                every > steps and not self.checkpoint.minutes
            ),
            f"checkpoint.keep_every = {keep} with checkpoint.every = {every} and train.steps = {steps}: no regular "
            "checkpoint is kept for good": keep > 0 and (every == 0 or math.lcm(keep, every) > steps),
            f"faults.{' and faults.'.join(goes_back)} = rollback with checkpoint.every = 0: there is no checkpoint to "
            "go back to": bool(goes_back) and not every and not self.checkpoint.minutes,
            f"faults.spike_warmup = {faults.spike_warmup} with train.steps = {steps}: no spike is looked for": (
                faults.spike != "off" and faults.spike_warmup >= steps
            ),
            f"faults.skip_batches holds {', '.join(late)} with train.steps = {steps}: the run ends before": bool(late),
        }
        return [text for text, applies in cautions.items() if applies]

    def check_processes(self, world_size: int) -> int:
        """Split a job of `world_size` processes.

        Returns:
            The data-parallel size.

        Raises:
            ConfigError: the processes or the global batch cannot be split evenly.
        """
        tp, pp = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size
        require(
            world_size % (tp * pp) == 0,
            f"{world_size} processes with --tp {tp} --pp {pp}",
            "the product of tp and pp must divide the number of processes",
            f"Start a multiple of {tp * pp} processes.",
        )
        dp = world_size // (tp * pp)
        if self.train.micro_batch_size == "auto":
            require(
                self.train.global_batch_size % dp == 0,
                f"train.global_batch_size = {self.train.global_batch_size} with {dp} data-parallel ranks",
                "every rank trains on as many sequences",
                f"Use a multiple of {dp}.",
            )
            return dp
        micro = self.train.micro_batch_size
        require(
            self.train.global_batch_size % (dp * micro) == 0,
            f"train.global_batch_size = {self.train.global_batch_size} with {dp} data-parallel ranks and "
            f"train.micro_batch_size = {micro}",
            "every rank runs the same number of whole micro-batches",
            f"Use a multiple of {dp * micro}.",
        )
        return dp


def single_process(model: ModelConfig) -> RunConfig:
    """A configuration around a model alone, in one process and fp32."""
    return RunConfig(model=model, data=DataConfig(sequence_length=min(2048, model.language.max_positions)))
