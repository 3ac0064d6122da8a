"""Image-text retrieval (TR@k, IR@k): zero-shot with the pre-trained vectors, and by transfer.

Transfer (paper appendix A.2) trains a new attention pool and a new text encoder contrastively.

Shape legend
    n  images;  k  captions of all of them;  P  patch tokens;  h  encoder width;  D  width of the shared space
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lcl_kernels import infonce
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.evaluation import RetrievalConfig
from lcl_mcore.config.schema import ModelConfig
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.evaluation.caption_data import CaptionDataset
from lcl_mcore.evaluation.classification_data import ClassificationDataset
from lcl_mcore.evaluation.embedding_metrics import chance, recall_at, require_finite
from lcl_mcore.evaluation.load import LoadedModel, reset_weights
from lcl_mcore.evaluation.transfer import (
    FORWARD_BATCH,
    Fit,
    ImageEncoder,
    TransferHead,
    compare,
    fit_head,
    pack_texts,
    patch_tokens,
    sample_captions,
    step_seed,
    training_mode,
)
from lcl_mcore.losses.gradcache import cache_gradients
from lcl_mcore.models.lcl import LclModel, Temperature, l2_normalize
from lcl_mcore.models.transformer_config import vision_transformer_config
from lcl_mcore.models.vision import AttentionPool
from lcl_mcore.rng import key63

KS = (1, 5, 10)


def retrieval_scores(image: Tensor, text: Tensor, image_of_text: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """TR@k: some own caption among an image's k nearest. IR@k: its image among a caption's k nearest.

    Args:
        image: unit vectors [n, D] on the CPU.
        text: unit vectors [k, D] on the CPU.
        image_of_text: int64 [k], the image of each caption.
    """
    image, text = require_finite(image, "image vectors"), require_finite(text, "text vectors")
    recall = recall_at(image, text, ks, image_of_text)
    return {f"TR@{k}": recall.image_to_text[k] for k in ks} | {f"IR@{k}": recall.text_to_image[k] for k in ks}


def chance_scores(data: CaptionDataset) -> dict[str, float]:
    """TR@k and IR@k of random orders; 1 where k is all there is."""
    own = [len(captions) for captions in data.captions]
    text = {f"TR@{k}": sum(chance(sum(own), k, count) for count in own) / len(own) for k in KS}
    return text | {f"IR@{k}": chance(len(data), k) for k in KS}


def describe(data: CaptionDataset) -> dict[str, Any]:
    """What a result says about the pairs that are measured on."""
    texts, _ = data.flat_captions()
    return {
        "images": len(data),
        "skipped": dict(data.skipped),
        "captions": len(texts),
        "duplicate_captions": len(texts) - len(set(texts)),
    }


# --- zero-shot


@torch.no_grad()
def image_embeds(model: LclModel, data: CaptionDataset | ClassificationDataset) -> Tensor:
    """Unit vectors of all images of a data set: fp32 [n, D] on the CPU."""
    device = next(model.parameters()).device
    vectors = []
    for indices in torch.arange(len(data)).split(FORWARD_BATCH):
        images = data.fetch(indices.tolist()).to(device)
        vectors.append(l2_normalize(model.encode_images(images, indices.to(device), 0).vectors).cpu())
    return torch.cat(vectors)


def text_batch(model: LclModel, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> MicroBatch:
    """Sequences `begin text <BoI>` without images: the LM's state at `<BoI>` is the text's context vector."""
    side, packed = model.shape.vision.image_size, pack_texts(tokenizer, texts, max_tokens, tokenizer.boi)
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        tokens=packed.tokens,
        positions=packed.positions,
        lengths=packed.lengths,
        images=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        image_starts=none,
        context_positions=packed.last,
        context_images=none,
        target_positions=none,
        target_labels=none,
        image_keys=none,
        sequence_keys=torch.arange(len(packed.lengths)),
        group_ids=none,
    )


@torch.no_grad()
def text_embeds(loaded: LoadedModel, texts: Sequence[str]) -> Tensor:
    """Unit context vectors of texts, fp32 [k, D] on the CPU; texts beyond the run's sequence length are truncated."""
    model, tokenizer, max_tokens = loaded.model, loaded.tokenizer(), loaded.config.data.sequence_length
    device = next(model.parameters()).device
    vectors = []
    for start in range(0, len(texts), FORWARD_BATCH):
        batch = text_batch(model, tokenizer, texts[start : start + FORWARD_BATCH], max_tokens).to(device)
        no_images = torch.zeros(0, model.shape.vision.patches, model.shape.language.width, device=device)
        hidden = model.forward_language(batch, no_images, tuple(range(len(batch.lengths))), 0)
        vectors.append(model.context_embeds(batch, hidden).cpu())
    return torch.cat(vectors)


def zero_shot_retrieval(loaded: LoadedModel, data: CaptionDataset) -> dict[str, Any]:
    """TR@k and IR@k of the pre-trained vectors, and of random weights (which stay in the model)."""
    texts, image_of_text = data.flat_captions()

    def scores() -> dict[str, float]:
        return retrieval_scores(image_embeds(loaded.model, data), text_embeds(loaded, texts), image_of_text)

    result: dict[str, Any] = {
        **loaded.facts(),
        "task": "retrieval",
        "transfer": "zeroshot",
        "data": data.name,
        **describe(data),
        "trained": scores(),
        "chance": chance_scores(data),
    }
    reset_weights(loaded)
    return {**result, "random_init": scores()}


# --- transfer


class DualEncoder(TransferHead):
    """Patch tokens and texts to one space, all of it new: pool, causal text encoder, temperature.

    The pool's output matrix and the LM's context projection are the linear layers of the two encoders.
    """

    def __init__(
        self, shape: ModelConfig, width: int, context: Context, tokenizer: Tokenizer, config: RetrievalConfig
    ) -> None:
        super().__init__(replace(shape, vision=replace(shape.vision, width=width, heads=1)), context)
        self.tokenizer = tokenizer
        self.max_tokens = min(config.text_tokens, shape.language.max_positions)
        self.temperature = Temperature(self.device)
        vision = vision_transformer_config(self.config, self.device)
        self.pool = AttentionPool(vision, self.shape, self.groups)
        self.initialize_weights(key63(config.seed, "dual encoder"))

    def image_embeds(self, tokens: Tensor) -> Tensor:
        """[n, P, h] -> unit vectors fp32 [n, D]."""
        return l2_normalize(self.pool(tokens.reshape(-1, 1, tokens.shape[-1]))[:, 0])

    def text_embeds(self, texts: Sequence[str]) -> Tensor:
        """The LM's state at each text's last token, the end token: unit vectors fp32 [n, D]."""
        packed = pack_texts(self.tokenizer, texts, self.max_tokens, self.tokenizer.eos)
        no_images = torch.zeros(0, self.pool.patches, self.shape.language.width, device=self.device)
        hidden = self.forward_language(packed, no_images, torch.zeros(0, dtype=torch.int64))
        return l2_normalize(self.language.contexts(hidden, packed.last.to(hidden.device)))


Embed = Callable[[int], Tensor]
"""Number of a chunk of the batch -> its unit vectors."""


def contrastive_backward(image: Embed, text: Embed, chunks: int, scale: Callable[[], Tensor]) -> Tensor:
    """Loss of a batch that is computed in chunks, and its exact gradient (GradCache with several chunks).

    A chunk must give the same vectors each time.
    """
    if chunks == 1:
        loss = infonce(image(0), text(0), scale())
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        images, texts = ([embed(chunk) for chunk in range(chunks)] for embed in (image, text))
    cached = cache_gradients(infonce, images, texts, scale())
    for chunk in range(chunks):
        cached.surrogate(chunk, image(chunk), text(chunk)).backward()
    torch.autograd.backward(scale(), cached.scale)
    return cached.loss


def train_dual_encoder(
    dual_encoder: DualEncoder,
    encoder: ImageEncoder,
    train: CaptionDataset,
    config: RetrievalConfig,
    log: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Train the dual encoder and, in full transfer, the image encoder."""
    tokens = patch_tokens(encoder, train, config.cache_mb)

    def backward(indices: Tensor, step: int) -> Tensor:
        dual_encoder.temperature.clamp()
        captions = sample_captions(train, indices, step_seed(config, step))
        images = indices.split(config.chunk_size)
        texts = [captions[i : i + config.chunk_size] for i in range(0, len(captions), config.chunk_size)]
        return contrastive_backward(
            lambda chunk: dual_encoder.image_embeds(tokens(images[chunk], step_seed(config, step, chunk))),
            lambda chunk: dual_encoder.text_embeds(texts[chunk]),
            len(images),
            dual_encoder.temperature,
        )

    groups = [(list(dual_encoder.parameters()), 1.0), (encoder.parameters, config.encoder_lr / config.lr)]
    with training_mode(encoder):
        return fit_head(backward, groups, len(train), config.steps, config, log)


@torch.no_grad()
def score_dual_encoder(dual_encoder: DualEncoder, encoder: ImageEncoder, test: CaptionDataset) -> dict[str, float]:
    """TR@k and IR@k."""
    texts, image_of_text = test.flat_captions()
    images = [
        dual_encoder.image_embeds(encoder.encode(test.fetch(i.tolist()).to(encoder.device), 0)).cpu()
        for i in torch.arange(len(test)).split(FORWARD_BATCH)
    ]
    captions = [
        dual_encoder.text_embeds(texts[i : i + FORWARD_BATCH]).cpu() for i in range(0, len(texts), FORWARD_BATCH)
    ]
    return retrieval_scores(torch.cat(images), torch.cat(captions), image_of_text)


def retrieval_transfer(
    loaded: LoadedModel, train: CaptionDataset, test: CaptionDataset, config: RetrievalConfig, baselines: bool = True
) -> dict[str, Any]:
    """TR@k and IR@k after training on `train`; with `baselines`, the same on random weights and on raw patches."""
    tokenizer = loaded.tokenizer()

    def run(encoder: ImageEncoder) -> dict[str, Any]:
        dual_encoder = DualEncoder(loaded.config.model, encoder.width, loaded.context, tokenizer, config)
        fit = train_dual_encoder(dual_encoder, encoder, train, config, loaded.context.log)
        return {**score_dual_encoder(dual_encoder, encoder, test), **fit.facts()}

    result = compare(loaded, train, test, config, "retrieval", run, baselines)
    return {**result, **describe(test), "chance": chance_scores(test)}
