"""Transfer: training something new on patch tokens, with the encoder frozen or learning too (paper appendix A.2).

Shape legend
    n  images;  S  side in pixels;  P  patch tokens;  h  their width;  D  LM width;  t  packed tokens
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lcl_mcore.config.base import to_dict
from lcl_mcore.config.evaluation import FitConfig, PairsConfig
from lcl_mcore.config.schema import ModelConfig, single_process
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import ConfigError, NonFiniteError, explain
from lcl_mcore.evaluation.caption_data import CaptionDataset
from lcl_mcore.evaluation.image_files import read_once
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.lr_schedule import cosine_with_warmup
from lcl_mcore.models.attention import make_segments
from lcl_mcore.models.backends import choose_backends
from lcl_mcore.models.init import initialize
from lcl_mcore.models.language import EmbeddingInput, LanguageModel
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.models.stages import stage_of
from lcl_mcore.models.transformer_config import language_transformer_config
from lcl_mcore.models.vision import VisionEncoder, patchify
from lcl_mcore.rng import key63

FORWARD_BATCH = 64
"""Images, or texts, in one forward pass without gradients."""

# --- encoders


@dataclass(frozen=True)
class ImageEncoder:
    """Images to patch tokens.

    Attributes:
        width: h.
        encode: uint8 [n, 3, S, S] and a seed for drop-path -> fp32 [n, P, h].
        device: where it computes.
        module: what learns in full transfer; None: frozen.
        vectors: by name, tokens [n, P, h] -> one vector per image, fp32 [n, d].
    """

    width: int
    encode: Callable[[Tensor, int], Tensor]
    device: torch.device
    module: nn.Module | None = None
    vectors: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that learn."""
        return [] if self.module is None else list(self.module.parameters())


def vit(model: LclModel, full: bool = False) -> ImageEncoder:
    """The model's ViT with the weights that it has now; with `full` it learns."""
    vision = model.vision
    return ImageEncoder(
        model.shape.vision.width,
        lambda images, seed: encode(vision, images, seed),
        vision.patch_embedding.device,
        vision if full else None,
    )


def raw_patches(model: LclModel) -> ImageEncoder:
    """No encoder: the normalised pixels of each patch."""
    vision, patch = model.vision, model.shape.vision.patch_size
    return ImageEncoder(
        3 * patch**2,
        lambda images, seed: patchify(images, vision.pixel_mean, vision.pixel_std, patch),
        vision.patch_embedding.device,
    )


def encode(vision: VisionEncoder, images: Tensor, seed: int = 0) -> Tensor:
    """uint8 [n, 3, S, S] on the encoder's device -> patch tokens fp32 [n, P, h]; `seed` keys drop-path."""
    tokens = vision(images, torch.arange(len(images), device=images.device), seed)
    return tokens.view(len(images), -1, tokens.shape[-1]).float()


def cached(
    features: Callable[[Tensor], Tensor], count: int, numbers_per_image: int, cache_mb: int, batch: int
) -> Callable[[Tensor], Tensor]:
    """Frozen features, computed once and kept in memory if all of them fit into `cache_mb` MiB as fp32.

    Args:
        features: indices int64 [n] -> features [n, ...].
        count: images of the data set.
        batch: images in one call of `features` when all are computed.
    """
    if 4 * numbers_per_image * count > cache_mb << 20:
        return features
    held = torch.cat([features(indices) for indices in torch.arange(count).split(batch)])
    return lambda indices: held[indices]


@contextmanager
def training_mode(encoder: ImageEncoder) -> Iterator[None]:
    """The encoder in training mode if it learns, and in evaluation mode afterwards."""
    if encoder.module is None:
        yield
        return
    encoder.module.train()
    try:
        yield
    finally:
        encoder.module.eval()


@contextmanager
def drop_path(vision: VisionEncoder, rate: float) -> Iterator[None]:
    """Stochastic depth that grows linearly to `rate` at the last block."""
    layers = list(vision.blocks.layers)
    branches = [branch for layer in layers for branch in (layer.self_attn_bda, layer.mlp_bda)]
    before = [branch.drop_path for branch in branches]
    for number, branch in enumerate(branches):
        branch.drop_path = rate * (number // 2) / max(len(layers) - 1, 1)
    try:
        yield
    finally:
        for branch, value in zip(branches, before, strict=True):
            branch.drop_path = value


@contextmanager
def restored_weights(module: nn.Module) -> Iterator[None]:
    """Whatever is learned inside, afterwards the weights are those from before, without gradients."""
    before = [parameter.detach().clone() for parameter in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), before, strict=True):
                parameter.copy_(value)
                parameter.grad = None


# --- the training loop


@dataclass(frozen=True)
class Fit:
    """How the training of a head ended.

    Attributes:
        loss: mean of the last tenth of the steps, nats.
        falling: share by which the mean loss of the third quarter of the steps is below that of the second. The rate
            is high in both; in the last quarter a loss falls because the rate does, converged or not.
    """

    loss: float
    falling: float

    @property
    def converged(self) -> bool:
        """Whether more steps would hardly lower the loss: see `CRITERION`."""
        return self.falling < CONVERGED or self.loss < LEARNED

    def facts(self) -> dict[str, Any]:
        """What a result says about it."""
        return {"train_loss": self.loss, "converged": self.converged, "loss_fell_by": self.falling}


def convergence_warnings(result: Mapping[str, Any], name: str = "") -> list[str]:
    """A line for each training in a result whose loss more steps would still lower."""
    found = []
    if result.get("converged") is False:
        if result["loss_fell_by"] < 1:
            reason = f"still fell by {result['loss_fell_by']:.0%} between the second and third quarter of its steps"
        else:  # or it would be 0, and the training converged
            reason = "was seen in fewer than four steps"
        found.append(f"{name} has not converged: its training loss {reason}. More steps would lower it further.")
    for key, value in result.items():
        if isinstance(value, Mapping):
            found += convergence_warnings(value, f"{name} {key}".strip())
    return found


CONVERGED, LEARNED = 0.02, 0.01
CRITERION = (
    f"the training loss fell by less than {CONVERGED:.0%} from the second to the third quarter of the steps, "
    f"or ended below {LEARNED} nats"
)


def fit_head(
    backward: Callable[[Tensor, int], Tensor],
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    count: int,
    steps: int,
    config: FitConfig,
    log: Callable[[str], None] = lambda line: None,
) -> Fit:
    """AdamW over random batches; every sample is used once before any is used again.

    Args:
        backward: indices int64 [batch], step -> their loss, detached; adds its gradient to the parameters.
        groups: parameters, and the factor on their learning rate.
        count: samples in the training set.
        log: given the loss ten times.

    Raises:
        NonFiniteError: the loss diverged.
    """
    size = min(config.batch_size, count)
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "factor": factor} for parameters, factor in groups if len(parameters)],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    warmup_steps = round(config.warmup * steps)
    generator = torch.Generator().manual_seed(key63(config.seed, "order"))
    order, losses = torch.empty(0, dtype=torch.int64), []
    for step in range(steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        indices, order = order[:size], order[size:]
        schedule = cosine_with_warmup(step, steps, warmup_steps, peak=1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * group["factor"] * schedule
        optimizer.zero_grad(set_to_none=True)
        loss = backward(indices, step)
        optimizer.step()
        losses.append(loss)
        if (step + 1) % max(steps // 10, 1) == 0:
            log(f"step {step + 1} of {steps}: loss {float(loss):.4f}")
    history = torch.stack(losses).double().cpu()
    final = float(history[-max(steps // 10, 1) :].mean())
    if not math.isfinite(final):
        raise NonFiniteError(explain(f"mean loss {final}", "training has diverged", "Lower --lr, or raise --warmup."))
    return Fit(final, share_lost(history))


def share_lost(history: Tensor) -> float:
    """Share by which the mean of the third quarter of losses is below that of the second; 1 of fewer than four."""
    quarter = len(history) / 4
    if quarter < 1:
        return 1.0
    second, third = (float(history[round(i * quarter) : round((i + 1) * quarter)].mean()) for i in (1, 2))
    return 1 - third / second if second > 0 else 0.0


# --- training on images with captions


def step_seed(config: PairsConfig, step: int, chunk: int = 0) -> int:
    """Key of all random choices of a step, or of one chunk of its batch."""
    return key63(config.seed, "pairs", str(step), str(chunk))


def sample_captions(data: CaptionDataset, indices: Tensor, seed: int) -> list[str]:
    """One caption of each image, chosen with the seed."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(indices), generator=generator).tolist()
    options = [data.captions[index] for index in indices.tolist()]
    return [texts[int(u * len(texts))] for u, texts in zip(uniform, options, strict=True)]


def patch_tokens(encoder: ImageEncoder, data: CaptionDataset, cache_mb: int) -> Callable[[Tensor, int], Tensor]:
    """indices int64 [n], seed -> patch tokens [n, P, h]; those of a frozen encoder from memory if they fit."""

    def tokens(indices: Tensor, seed: int) -> Tensor:
        return encoder.encode(data.fetch(indices.tolist()).to(encoder.device), seed)

    if encoder.module is not None:
        return tokens
    frozen = torch.no_grad()(tokens)
    size = frozen(torch.zeros(1, dtype=torch.int64), 0).numel()
    features = cached(lambda indices: frozen(indices, 0), len(data), size, cache_mb, FORWARD_BATCH)
    return lambda indices, seed: features(indices)


@dataclass(frozen=True)
class PackedTexts:
    """Sequences of token ids end to end.

    Attributes:
        tokens, positions: int64 [t] on the CPU.
        lengths: of each sequence.
    """

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @property
    def last(self) -> Tensor:
        """Where the last token of each sequence is, int64 [sequences]."""
        return torch.tensor(self.lengths).cumsum(0) - 1


def pack(sequences: Sequence[Sequence[int]]) -> PackedTexts:
    """Sequences of ids, end to end."""
    return PackedTexts(
        torch.tensor([token for ids in sequences for token in ids]),
        torch.cat([torch.arange(len(ids)) for ids in sequences]),
        tuple(len(ids) for ids in sequences),
    )


def pack_texts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, last: int) -> PackedTexts:
    """Sequences `begin text last` of at most `max_tokens` tokens; longer texts are truncated."""
    encoded = tokenizer.encode_batch(list(texts))
    return pack([[tokenizer.bos, *ids[: max_tokens - 2], last] for ids in encoded])


class TransferHead(nn.Module):
    """New modules named as in an `LclModel`: an LM of the run's shape, in fp32, without dropout."""

    def __init__(self, shape: ModelConfig, context: Context) -> None:
        super().__init__()
        self.shape = replace(shape, language=replace(shape.language, dropout=0.0))
        self.config, self.device = single_process(self.shape), context.device.device
        self.groups = context.groups.megatron
        language, layers = self.shape.language, choose_backends(self.config, self.device).layers
        config = language_transformer_config(self.config, self.device)
        self.language = LanguageModel(config, language, layers, self.groups, stage_of((language.layers,), 0))

    def canonical_name(self, name: str) -> str:
        """What `initialize` asks of a model."""
        return name

    def initialize_weights(self, seed: int) -> None:
        """Random weights by the rules of an `LclModel`, for every module that has its name in one."""
        initialize(self, self.shape, seed, 0, 1)  # type: ignore[arg-type]  # asks for names and parameters only
        self.to(self.device)

    def forward_language(self, texts: PackedTexts, latents: Tensor, image_starts: Tensor) -> Tensor:
        """Run the LM over packed sequences.

        Args:
            latents: [n, P, D], for the image placeholders from `image_starts` int64 [n] on.

        Returns:
            Hidden states [t, D].
        """
        device, count = self.device, len(texts.lengths)
        segments = make_segments(texts.lengths, device, sequence_keys=tuple(range(count)))
        tokens, positions = texts.tokens.to(device), texts.positions.to(device)
        return self.language(EmbeddingInput(tokens, positions, latents, image_starts.to(device)), segments)


# --- one task on the run's encoder and on baselines


def compare(
    loaded: LoadedModel,
    train: CaptionDataset,
    test: CaptionDataset,
    config: PairsConfig,
    task: str,
    run: Callable[[ImageEncoder], dict[str, Any]],
    baselines: bool,
) -> dict[str, Any]:
    """Transfer on the run's encoder, on random weights and, if the encoder is frozen, on raw patches.

    The baselines leave `loaded.model` with random weights.

    Args:
        run: trains and tests on one encoder; returns the scores.
    """
    started, model, full = time.perf_counter(), loaded.model, config.transfer == "full"
    model.eval()

    read_once(test.fetch, len(test))

    def scores(name: str, encoder: ImageEncoder) -> dict[str, Any]:
        loaded.context.log(f"{name}:")
        with restored_weights(model.vision):
            return run(encoder)

    result: dict[str, Any] = {
        **loaded.facts(),
        "task": f"{task}, {config.transfer} transfer",
        "transfer": config.transfer,
        "train_data": train.name,
        "train_images": len(train),
        "data": test.name,
        "images": len(test),
        "training": to_dict(config),
        "converged_means": CRITERION,
        "trained": scores("trained", vit(model, full)),
    }
    if baselines:
        reset_weights(loaded)
        result["random_init"] = scores("random_init", vit(model, full))
        if not full:
            result["pixels"] = scores("pixels", raw_patches(model))
    result["warnings"] = convergence_warnings(result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    return result


def require_disjoint(train: CaptionDataset, test: CaptionDataset) -> None:
    """Refuse to test on what was trained on.

    Raises:
        ConfigError: both name the same images, or are the same prepared data set.
    """
    common = set(train.sources) & set(test.sources)
    if common:
        raise ConfigError(
            explain(
                f"--train {train.name}",
                f"training pairs must not be the test pairs, and {len(common)} are ({min(common)}, say)",
                "Give another data set, or another --train-split of the same file.",
            )
        )
