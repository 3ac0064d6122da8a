"""Captions scored by BLEU-4 and CIDEr: by the pre-trained LM as it is, and by transfer.

Transfer (paper appendix A.2) trains an MLP connector from patch tokens into a language model. The scorers are those
of COCO's caption evaluation (`pycocoevalcap`). Its tokenizer needs Java; here captions are lower-cased and split into
words and digits instead, which the result says: published figures used the other one.

Shape legend
    n  images;  S  side in pixels;  h  encoder width;  D  LM width;  V  vocabulary
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lcl_mcore.batch import MicroBatch
from lcl_mcore.config.evaluation import CaptionConfig
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.caption_data import CaptionDataset
from lcl_mcore.evaluation.caption_decoders import CaptionDecoder, HuggingFaceDecoder, LclDecoder, greedy
from lcl_mcore.evaluation.load import LoadedModel
from lcl_mcore.evaluation.transfer import (
    FORWARD_BATCH,
    Fit,
    ImageEncoder,
    compare,
    drop_path,
    fit_head,
    patch_tokens,
    sample_captions,
    step_seed,
    training_mode,
)
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optional_packages import installed
from lcl_mcore.rng import key63

WORDS = re.compile(r"[^\W_]+")
SCORER = "pycocoevalcap BLEU and CIDEr; lower case, words and digits instead of its PTB tokenizer"
EXAMPLES = 8
"""Generated captions that a result quotes."""

# --- scores


def words(text: str) -> str:
    """Lower case, words and digits separated by one space."""
    return " ".join(WORDS.findall(text.lower()))


def require_scorers() -> None:
    """Fail before hours of work if the scores cannot be computed.

    Raises:
        ConfigError: pycocoevalcap is missing.
    """
    if not installed("pycocoevalcap", "pycocoevalcap", "pycocoevalcap").usable:
        raise ConfigError(explain("caption scores", "need pycocoevalcap", "pip install 'lcl-mcore[captions]'."))


def scores(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4 and CIDEr, times 100 as papers print them.

    Raises:
        ConfigError: pycocoevalcap is missing.
    """
    require_scorers()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    results = {i: [words(text)] for i, text in enumerate(generated)}
    truths = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
    cider, _ = Cider().compute_score(truths, results)
    return {"BLEU-4": 100 * float(bleu[3]), "BLEU-1": 100 * float(bleu[0]), "CIDEr": 100 * float(cider)}


def scores_with_examples(generated: Sequence[str], data: CaptionDataset) -> dict[str, Any]:
    """Scores, the scores of the same captions against the next image's references, and examples of both."""
    references = list(data.captions)
    others = scores(generated, references[1:] + references[:1]) if len(references) > 1 else None
    return {
        **scores(generated, references),
        "wrong_images": others,
        "examples": [
            {"written": text, "reference": texts[0]}
            for text, texts in zip(generated[:EXAMPLES], references[:EXAMPLES], strict=True)
        ],
    }


# --- zero-shot


@torch.no_grad()
def generate(model: LclModel, tokenizer: Tokenizer, images: Tensor, max_tokens: int, begin: bool) -> list[list[int]]:
    """Greedy captions of uint8 [n, 3, S, S]: ids after `[begin] <BoI> image <EoI>`, up to an end token or `<BoI>`."""
    n, patches, device = len(images), model.shape.vision.patches, images.device
    start = [tokenizer.bos] if begin else []
    prompt = [*start, tokenizer.boi, *[tokenizer.image] * patches, tokenizer.eoi]
    prompts = torch.tensor([prompt], device=device).repeat(n, 1)
    keys = torch.arange(n, device=device)
    latents = model.encode_images(images, keys, 0).latents
    none = torch.zeros(0, dtype=torch.int64, device=device)

    def logits(generated: Tensor) -> Tensor:
        sequences = torch.cat((prompts, generated), 1)
        length = sequences.shape[1]
        batch = MicroBatch(
            tokens=sequences.flatten(),
            positions=torch.arange(length, device=device).repeat(n),
            lengths=(length,) * n,
            images=images,
            image_starts=keys * length + len(start) + 1,
            context_positions=none,
            context_images=none,
            target_positions=none,
            target_labels=none,
            image_keys=keys,
            sequence_keys=torch.arange(n),
            group_ids=none,
        )
        hidden = model.forward_language(batch, latents, tuple(range(n)), 0)
        last = model.language.targets(hidden, keys * length + length - 1)
        return (last @ model.language.head_weight.T)[:, : model.shape.language.vocab_size].float()

    max_tokens = min(max_tokens, model.shape.language.max_positions - len(prompt))
    return greedy(logits, n, max_tokens, tokenizer, device)


def zero_shot_captions(loaded: LoadedModel, data: CaptionDataset, max_tokens: int) -> dict[str, Any]:
    """BLEU-4 and CIDEr of captions by the pre-trained LM as it is."""
    require_scorers()
    tokenizer = loaded.tokenizer()
    device = next(loaded.model.parameters()).device
    begin = all(source.ends == "document" for source in loaded.config.data.sources)
    generated: list[str] = []
    for indices in torch.arange(len(data)).split(FORWARD_BATCH):
        images = data.fetch(indices.tolist()).to(device)
        captions = generate(loaded.model, tokenizer, images, max_tokens, begin)
        generated += [tokenizer.decode(ids).strip() for ids in captions]
    found = scores_with_examples(generated, data)
    return {
        **loaded.facts(),
        "task": "caption",
        "transfer": "zeroshot",
        "data": data.name,
        "images": len(data),
        "scorer": SCORER,
        "examples": found.pop("examples"),
        "wrong_images": found.pop("wrong_images"),
        "trained": found,
    }


# --- transfer


def make_connector(width: int, out: int, seed: int) -> nn.Sequential:
    """[..., h] -> [..., D]: two linear layers with a GELU between (LLaVA-1.5's), torch's usual initial weights."""
    connector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
    generator = torch.Generator().manual_seed(key63(seed, "connector"))
    for layer, fan_in in ((connector[0], width), (connector[2], out)):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return connector


def make_decoder(loaded: LoadedModel, config: CaptionConfig, pretrained: Sequence[Tensor] | None) -> CaptionDecoder:
    """The LM that `config` asks for, ready to train or frozen.

    Args:
        pretrained: weights of the run's LM, in the order of its parameters; None: random.
    """
    decoder: LclDecoder | HuggingFaceDecoder
    if config.language_model in ("fresh", "pretrained"):
        decoder = LclDecoder(loaded.config.model, loaded.context, loaded.tokenizer(), config, pretrained)
    else:
        decoder = HuggingFaceDecoder(config.language_model, config.text_tokens, loaded.context.device.device)
    return decoder.requires_grad_(not config.freeze_language_model)


def train_decoder(
    decoder: CaptionDecoder,
    connector: nn.Module,
    encoder: ImageEncoder,
    train: CaptionDataset,
    config: CaptionConfig,
    log: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Train connector, LM and image encoder, as far as they learn; the loss is in nats a token."""
    tokens = patch_tokens(encoder, train, config.cache_mb)

    def backward(indices: Tensor, step: int) -> Tensor:
        ids = decoder.encode(sample_captions(train, indices, step_seed(config, step)))
        targets = sum(len(text) for text in ids)
        total = torch.zeros((), device=encoder.device)
        for number, chunk in enumerate(torch.arange(len(indices)).split(config.chunk_size)):
            latents = connector(tokens(indices[chunk], step_seed(config, step, number)))
            loss = decoder.loss_sum(latents, [ids[i] for i in chunk.tolist()]) / targets
            loss.backward()
            total += loss.detach()
        return total

    new = [*connector.parameters(), *(p for p in decoder.parameters() if p.requires_grad)]
    groups = [(new, 1.0), (encoder.parameters, config.encoder_lr / config.lr)]
    with training_mode(encoder):
        return fit_head(backward, groups, len(train), config.steps, config, log)


@torch.no_grad()
def score_decoder(
    decoder: CaptionDecoder, connector: nn.Module, encoder: ImageEncoder, test: CaptionDataset, max_tokens: int
) -> dict[str, Any]:
    """BLEU-4 and CIDEr of greedy captions, and the loss of each image's first caption, nats a token."""
    generated: list[str] = []
    loss, targets = 0.0, 0
    for indices in torch.arange(len(test)).split(FORWARD_BATCH):
        latents = connector(encoder.encode(test.fetch(indices.tolist()).to(encoder.device), 0))
        ids = decoder.encode([test.captions[i][0] for i in indices.tolist()])
        loss, targets = loss + float(decoder.loss_sum(latents, ids)), targets + sum(map(len, ids))
        generated += decoder.generate(latents, max_tokens)
    return {**scores_with_examples(generated, test), "test_loss": loss / targets}


def caption_transfer(
    loaded: LoadedModel,
    train: CaptionDataset,
    test: CaptionDataset,
    config: CaptionConfig,
    max_tokens: int,
    baselines: bool = True,
) -> dict[str, Any]:
    """BLEU-4 and CIDEr after training on `train`; with `baselines`, the same on random weights and on raw patches."""
    require_scorers()
    pretrained = None
    if config.language_model == "pretrained":  # kept: the baselines give the model random weights
        pretrained = [p.detach().clone() for p in loaded.model.language.parameters()]

    def run(encoder: ImageEncoder) -> dict[str, Any]:
        decoder = make_decoder(loaded, config, pretrained)
        connector = make_connector(encoder.width, decoder.width, config.seed).to(encoder.device)
        full = encoder.module is not None
        with drop_path(loaded.model.vision, config.drop_path) if full else nullcontext():
            fit = train_decoder(decoder, connector, encoder, train, config, loaded.context.log)
        return {**score_decoder(decoder, connector, encoder, test, max_tokens), **fit.facts()}

    result = compare(loaded, train, test, config, "caption", run, baselines)
    return {**result, "scorer": SCORER}
