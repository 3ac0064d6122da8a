"""Captions by the pre-trained LM itself, scored by BLEU-4 and CIDEr.

The scorers are those of COCO's caption evaluation (`pycocoevalcap`). Its tokenizer needs Java; here captions are
lower-cased and split into words and digits instead, which the result says: published figures used the other one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.captioned import CHUNK, CaptionDataset
from lcl_mcore.evaluation.loading import LoadedModel
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.optional_packages import installed

WORDS = re.compile(r"[^\W_]+")
SCORER = "pycocoevalcap BLEU and CIDEr; lower case, words and digits instead of its PTB tokenizer"


def words(text: str) -> str:
    """Lower case, words and digits separated by one space."""
    return " ".join(WORDS.findall(text.lower()))


def greedy(
    logits: Callable[[Tensor], Tensor], n: int, limit: int, tokenizer: Tokenizer, device: torch.device
) -> list[list[int]]:
    """The likeliest token after token, up to an end or `<BoI>`: at most `limit` ids for each of n rows.

    Args:
        logits: what was written so far, int64 [n, k] -> fp32 [n, V] for the next token.
    """
    never = [tokenizer.image, tokenizer.eoi, tokenizer.pad] + (
        [tokenizer.bos] if tokenizer.bos != tokenizer.eos else []
    )
    written = torch.zeros(n, 0, dtype=torch.int64, device=device)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    for _ in range(limit):
        likely = logits(written)
        likely[:, never] = -torch.inf
        chosen = torch.where(done, tokenizer.eos, likely.argmax(1))
        done |= (chosen == tokenizer.eos) | (chosen == tokenizer.boi)
        written = torch.cat((written, chosen[:, None]), 1)
        if bool(done.all()):
            break
    ends = (tokenizer.eos, tokenizer.boi)
    return [
        row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in written.tolist()
    ]


@torch.no_grad()
def generate(
    model: LclModel, tokenizer: Tokenizer, images: Tensor, limit: int, begin: bool
) -> list[list[int]]:
    """Greedy captions of uint8 [n, 3, S, S]: ids after `[begin] <BoI> image <EoI>`, up to an end or `<BoI>`."""
    n, patches, device = len(images), model.shape.vision.patches, images.device
    start = [tokenizer.bos] if begin else []
    prompt = [*start, tokenizer.boi, *[tokenizer.image] * patches, tokenizer.eoi]
    prompts = torch.tensor([prompt], device=device).repeat(n, 1)
    keys = torch.arange(n, device=device)
    latents = model.encode_images(images, keys, 0).latents
    none = torch.zeros(0, dtype=torch.int64, device=device)

    def logits(written: Tensor) -> Tensor:
        rows = torch.cat((prompts, written), 1)
        length = rows.shape[1]
        batch = MicroBatch(
            tokens=rows.flatten(),
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

    return greedy(logits, n, min(limit, model.shape.language.max_positions - len(prompt)), tokenizer, device)


def require_scorers() -> None:
    """Say before hours of work that the scores cannot be computed.

    Raises:
        ConfigError: pycocoevalcap is missing.
    """
    if not installed("pycocoevalcap", "pycocoevalcap", "pycocoevalcap").usable:
        raise ConfigError(
            explain("caption scores", "need pycocoevalcap", "pip install 'lcl-mcore[captions]'.")
        )


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


def scored(generated: Sequence[str], data: CaptionDataset) -> dict[str, Any]:
    """Scores, those of the same captions held against the next image's references, and examples of both."""
    references = list(data.captions)
    return {
        **scores(generated, references),
        "wrong_images": scores(generated, references[1:] + references[:1]),
        "examples": [
            {"written": text, "reference": texts[0]}
            for text, texts in zip(generated[:8], references[:8], strict=True)
        ],
    }


def caption(opened: LoadedModel, data: CaptionDataset, max_tokens: int) -> dict[str, Any]:
    """Captions by the pre-trained LM as it is."""
    require_scorers()
    opened.model.float()
    tokenizer = opened.tokenizer()
    device = next(opened.model.parameters()).device
    begin = all(source.ends == "document" for source in opened.config.data.sources)
    generated: list[str] = []
    for indices in torch.arange(len(data)).split(CHUNK):
        images = data.fetch(indices.tolist()).to(device)
        rows = generate(opened.model, tokenizer, images, max_tokens, begin)
        generated += [tokenizer.decode(ids).strip() for ids in rows]
    found = scored(generated, data)
    return {
        **opened.facts(),
        "task": "caption",
        "transfer": "zeroshot",
        "data": data.name,
        "images": len(data),
        "scorer": SCORER,
        "examples": found.pop("examples"),
        "wrong_images": found.pop("wrong_images"),
        "trained": found,
    }
