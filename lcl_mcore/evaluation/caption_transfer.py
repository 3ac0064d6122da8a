"""Captioning transfer (paper appendix A.2): an MLP connector from patch tokens into a language model.

Shape legend
    n  images;  P  patch tokens;  h  encoder width;  D  LM width;  k  target tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lcl_mcore.config.evaluation import CaptionConfig
from lcl_mcore.config.model import ModelConfig
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.caption import SCORER, greedy, require_scorers, scored
from lcl_mcore.evaluation.captioned import CHUNK, CaptionDataset, lay_rows
from lcl_mcore.evaluation.loading import LoadedModel
from lcl_mcore.evaluation.probe import fit_head
from lcl_mcore.evaluation.transfer import (
    Encoder,
    TransferHead,
    compare,
    draw_captions,
    drop_path,
    learning,
    step_seed,
    token_source,
)
from lcl_mcore.losses.generation import generation_loss_sum
from lcl_mcore.rng import key_of


class CaptionDecoder(Protocol):
    """A language model that reads P vectors of its own width in front of a caption."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def parameters(self) -> Any: ...

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """What it has to write for each text, its end mark included."""
        ...

    def loss_sum(self, latents: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """latents [n, P, D], ids of n texts -> sum of the cross-entropies of all ids, nats."""
        ...

    def write(self, latents: Tensor, limit: int) -> list[str]:
        """latents [n, P, D] -> n captions of at most `limit` tokens, greedily."""
        ...


class OwnDecoder(TransferHead):
    """An LM in the shape of the run's, read like in pre-training: `begin <BoI> latents <EoI> text end`.

    Args:
        weights: those of the run's LM; None draws new ones.

    Raises:
        ConfigError: image and caption exceed the LM's positions.
    """

    def __init__(
        self,
        shape: ModelConfig,
        context: Context,
        tokenizer: Tokenizer,
        config: CaptionConfig,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(shape, context)
        patches, positions = shape.vision.patches, shape.language.max_positions
        self.tokenizer, self.room = tokenizer, config.text_tokens
        self.prompt = [tokenizer.bos, tokenizer.boi, *[tokenizer.image] * patches, tokenizer.eoi]
        if len(self.prompt) + self.room > positions:
            raise ConfigError(
                explain(
                    f"transfer.text_tokens = {self.room} after {len(self.prompt)} for the image",
                    f"the LM has {positions} positions",
                    f"Use --text-tokens {max(positions - len(self.prompt), 1)}.",
                )
            )
        self.draw(key_of(config.seed, "writer"))
        if weights is not None:
            with torch.no_grad():
                for parameter, value in zip(self.language.parameters(), weights, strict=True):
                    parameter.copy_(value)

    @property
    def width(self) -> int:
        return self.shape.language.width

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch(list(texts))
        return [[*ids[: self.room - 1], self.tokenizer.eos] for ids in encoded]

    def _hidden(self, latents: Tensor, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states [t, D] over prompts and texts, and where each row starts, int64 [n] on the host."""
        rows = lay_rows([[*self.prompt, *ids] for ids in texts])
        starts = rows.last + 1 - torch.tensor(rows.lengths)
        return self.forward_language(rows, latents, starts + 2), starts

    def loss_sum(self, latents: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        hidden, starts = self._hidden(latents, [row[:-1] for row in ids])
        first = len(self.prompt) - 1  # predicts the first token
        places = torch.cat(
            [start + first + torch.arange(len(row)) for start, row in zip(starts.tolist(), ids, strict=True)]
        )
        labels = torch.tensor([token for row in ids for token in row])
        language, device = self.language, hidden.device
        return generation_loss_sum(
            language.targets(hidden, places.to(device)),
            language.head_weight,
            labels.to(device),
            vocab_start=0,
            vocab_size=self.shape.language.vocab_size,
            tp_group=self.groups.tp,
        )

    @torch.no_grad()
    def write(self, latents: Tensor, limit: int) -> list[str]:
        def logits(written: Tensor) -> Tensor:
            texts = written.tolist()
            hidden, starts = self._hidden(latents, texts)
            last = (starts + len(self.prompt) + len(texts[0]) - 1).to(hidden.device)
            found = self.language.targets(hidden, last) @ self.language.head_weight.T
            return found[:, : self.shape.language.vocab_size].float()

        limit = min(limit, self.shape.language.max_positions - len(self.prompt))
        found = greedy(logits, len(latents), limit, self.tokenizer, latents.device)
        return [self.tokenizer.decode(ids).strip() for ids in found]


def make_connector(width: int, out: int, seed: int) -> nn.Sequential:
    """[..., h] -> [..., D]: two linear layers with a GELU between (LLaVA-1.5's), torch's usual initial weights."""
    connector = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
    generator = torch.Generator().manual_seed(key_of(seed, "connector"))
    for layer, fan_in in ((connector[0], width), (connector[2], out)):
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
    return connector


def train_writer(
    writer: CaptionDecoder,
    connector: nn.Module,
    encoder: Encoder,
    train: CaptionDataset,
    config: CaptionConfig,
    note: Callable[[str], None] = lambda line: None,
) -> float:
    """Train connector, LM and encoder, as far as they learn; mean loss of the last tenth of the steps, nats a token."""
    tokens = token_source(encoder, train, config.cache_mb)

    def backward(indices: Tensor, step: int) -> Tensor:
        ids = writer.ids(draw_captions(train, indices, step_seed(config, step)))
        targets = sum(len(row) for row in ids)
        total = torch.zeros((), device=encoder.device)
        for number, part in enumerate(torch.arange(len(indices)).split(config.chunk_size)):
            latents = connector(tokens(indices[part], step_seed(config, step, number)))
            loss = writer.loss_sum(latents, [ids[i] for i in part.tolist()]) / targets
            loss.backward()
            total += loss.detach()
        return total

    new = [*connector.parameters(), *(p for p in writer.parameters() if p.requires_grad)]
    groups = [(new, 1.0), (encoder.parameters, config.encoder_lr / config.lr)]
    with learning(encoder):
        return fit_head(backward, groups, len(train), config.steps, config, note)


@torch.no_grad()
def score_writer(
    writer: CaptionDecoder, connector: nn.Module, encoder: Encoder, test: CaptionDataset, max_tokens: int
) -> dict[str, Any]:
    """BLEU-4 and CIDEr of greedy captions, and the loss of each image's first caption, nats a token."""
    generated: list[str] = []
    loss, targets = 0.0, 0
    for part in torch.arange(len(test)).split(CHUNK):
        latents = connector(encoder.encode(test.fetch(part.tolist()).to(encoder.device), 0))
        ids = writer.ids([test.captions[i][0] for i in part.tolist()])
        loss, targets = loss + float(writer.loss_sum(latents, ids)), targets + sum(map(len, ids))
        generated += writer.write(latents, max_tokens)
    return {**scored(generated, test), "test_loss": loss / targets}


def make_writer(
    opened: LoadedModel, config: CaptionConfig, pretrained: Sequence[Tensor] | None
) -> CaptionDecoder:
    """The LM that `config` asks for, ready to train or frozen."""
    if config.language_model in ("fresh", "pretrained"):
        writer: Any = OwnDecoder(opened.config.model, opened.context, opened.tokenizer(), config, pretrained)
    else:
        from lcl_mcore.evaluation.hugging_face import HuggingFaceDecoder

        writer = HuggingFaceDecoder(config.language_model, config.text_tokens, opened.context.device.device)
    return writer.requires_grad_(not config.freeze_language_model)


def caption_transfer(
    opened: LoadedModel,
    train: CaptionDataset,
    test: CaptionDataset,
    config: CaptionConfig,
    max_tokens: int,
    baselines: bool = True,
) -> dict[str, Any]:
    """BLEU-4 and CIDEr after training on `train`, beside the same on untrained encoders and on raw patches."""
    require_scorers()
    pretrained = None
    if config.language_model == "pretrained":  # kept: the baselines give the model random weights
        pretrained = [p.detach().float().clone() for p in opened.model.language.parameters()]

    def arm(encoder: Encoder) -> dict[str, Any]:
        writer = make_writer(opened, config, pretrained)
        connector = make_connector(encoder.width, writer.width, config.seed).to(encoder.device)
        learns = encoder.module is not None
        with drop_path(opened.model.vision, config.drop_path) if learns else nullcontext():
            loss = train_writer(writer, connector, encoder, train, config, opened.context.log)
        return {**score_writer(writer, connector, encoder, test, max_tokens), "train_loss": loss}

    result = compare(opened, train, test, config, "caption", arm, baselines)
    return {**result, "scorer": SCORER}
