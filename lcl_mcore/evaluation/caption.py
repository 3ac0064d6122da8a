"""Captions by the pre-trained LM itself, scored by BLEU-4 and CIDEr.

The scorers are those of COCO's caption evaluation (`pycocoevalcap`). Its tokenizer needs Java; here captions are
lower-cased and split into words and digits instead, which the result says: published figures used the other one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lcl_mcore.data.batch import MicroBatch
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.captioned import CHUNK, Captioned
from lcl_mcore.evaluation.loading import Opened
from lcl_mcore.models.lcl import LclModel
from lcl_mcore.platform.probe import installed

WORDS = re.compile(r"[^\W_]+")


def words(text: str) -> str:
    """Lower case, words and digits separated by one space."""
    return " ".join(WORDS.findall(text.lower()))


@torch.no_grad()
def generate(
    model: LclModel, tokenizer: Tokenizer, images: Tensor, limit: int, begin: bool
) -> list[list[int]]:
    """Greedy captions of uint8 [n, 3, S, S]: ids after `[begin] <BoI> picture <EoI>`, up to an end or `<BoI>`."""
    n, patches, device = len(images), model.shape.vision.patches, images.device
    start = [tokenizer.bos] if begin else []
    prompt = [*start, tokenizer.boi, *[tokenizer.image] * patches, tokenizer.eoi]
    rows = torch.tensor([prompt], device=device).repeat(n, 1)
    keys = torch.arange(n, device=device)
    latents = model.encode_images(images, keys, 0).latents
    never = [tokenizer.image, tokenizer.eoi, tokenizer.pad] + (
        [tokenizer.bos] if tokenizer.bos != tokenizer.eos else []
    )
    none = torch.zeros(0, dtype=torch.int64, device=device)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    for _ in range(min(limit, model.shape.language.max_positions - len(prompt))):
        length = rows.shape[1]
        batch = MicroBatch(
            tokens=rows.flatten(), positions=torch.arange(length, device=device).repeat(n), lengths=(length,) * n,
            images=images, image_starts=keys * length + len(start) + 1, context_rows=none, context_images=none,
            target_rows=none, target_labels=none, image_keys=keys, row_keys=torch.arange(n), group_ids=none,
        )  # fmt: skip
        hidden = model.read(batch, latents, tuple(range(n)), 0)
        last = model.language.targets(hidden, keys * length + length - 1)
        logits = (last @ model.language.head_weight.T)[:, : model.shape.language.vocab_size].float()
        logits[:, never] = -torch.inf
        chosen = torch.where(done, tokenizer.eos, logits.argmax(1))
        done |= (chosen == tokenizer.eos) | (chosen == tokenizer.boi)
        rows = torch.cat((rows, chosen[:, None]), 1)
        if bool(done.all()):
            break
    written = [row[len(prompt) :] for row in rows.tolist()]
    ends = (tokenizer.eos, tokenizer.boi)
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in written]


def scores(generated: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4 and CIDEr, times 100 as papers print them.

    Raises:
        ConfigError: pycocoevalcap is missing.
    """
    if not installed("pycocoevalcap", "pycocoevalcap", "pycocoevalcap").usable:
        raise ConfigError(
            explain("caption scores", "need pycocoevalcap", "pip install 'lcl-mcore[captions]'.")
        )
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    results = {i: [words(text)] for i, text in enumerate(generated)}
    truths = {i: [words(text) for text in texts] for i, texts in enumerate(references)}
    bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
    cider, _ = Cider().compute_score(truths, results)
    return {"BLEU-4": 100 * float(bleu[3]), "BLEU-1": 100 * float(bleu[0]), "CIDEr": 100 * float(cider)}


def caption(opened: Opened, data: Captioned, max_tokens: int) -> dict[str, Any]:
    """Caption every picture; beside it, the same captions held against the next picture's references."""
    opened.model.float()
    tokenizer = opened.tokenizer()
    device = next(opened.model.parameters()).device
    begin = all(source.ends == "document" for source in opened.config.data.sources)
    generated: list[str] = []
    for indices in torch.arange(len(data)).split(CHUNK):
        images = data.fetch(indices.tolist()).to(device)
        found = generate(opened.model, tokenizer, images, max_tokens, begin)
        generated += [tokenizer.decode(ids).strip() for ids in found]
    shifted = data.captions[1:] + data.captions[:1]
    return {
        **opened.facts(), "task": "caption", "data": data.name, "pictures": len(data),
        "scorer": "pycocoevalcap BLEU and CIDEr; lower case, words and digits instead of its PTB tokenizer",
        "trained": scores(generated, data.captions), "wrong_pictures": scores(generated, shifted),
        "examples": [
            {"written": generated[i], "reference": data.captions[i][0]} for i in range(min(8, len(generated)))
        ],
    }  # fmt: skip
