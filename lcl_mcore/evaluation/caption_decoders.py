"""Language models that write captions from latents: the protocol, the run's own LM, and a Hugging Face LM.

Shape legend
    n  images;  P  patch tokens;  D  LM width;  V  vocabulary;  t  packed tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.config.evaluation import CaptionConfig
from lcl_mcore.config.schema import ModelConfig
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.distributed.context import Context
from lcl_mcore.distributed.cpu import make_torchvision_importable
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.evaluation.embedding_metrics import require_finite
from lcl_mcore.evaluation.transfer import TransferHead, pack
from lcl_mcore.losses.generation import generation_loss_sum
from lcl_mcore.optional_packages import installed
from lcl_mcore.rng import key63


class CaptionDecoder(Protocol):
    """A language model that reads P vectors of its own width in front of a caption."""

    @property
    def width(self) -> int:
        """D."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids to predict for each text, the end token included."""
        ...

    def loss_sum(self, latents: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        """latents [n, P, D], ids of n texts -> sum of the cross-entropies of all ids, nats."""
        ...

    def generate(self, latents: Tensor, max_tokens: int) -> list[str]:
        """latents [n, P, D] -> n captions of at most `max_tokens` tokens, greedily."""
        ...


def greedy(
    logits: Callable[[Tensor], Tensor], n: int, max_tokens: int, tokenizer: Tokenizer, device: torch.device
) -> list[list[int]]:
    """The most likely token after token, up to an end token or `<BoI>`: at most `max_tokens` ids for each of n texts.

    Args:
        logits: what was generated so far, int64 [n, tokens] -> fp32 [n, V] for the next token.
    """
    never = [tokenizer.image, tokenizer.eoi, tokenizer.pad]
    if tokenizer.bos != tokenizer.eos:
        never.append(tokenizer.bos)
    generated = torch.zeros(n, 0, dtype=torch.int64, device=device)
    done = torch.zeros(n, dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        scores = require_finite(logits(generated), "next-token logits")
        scores[:, never] = -torch.inf
        chosen = torch.where(done, tokenizer.eos, scores.argmax(1))
        done |= (chosen == tokenizer.eos) | (chosen == tokenizer.boi)
        generated = torch.cat((generated, chosen[:, None]), 1)
        if bool(done.all()):
            break
    ends = (tokenizer.eos, tokenizer.boi)
    return [ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))] for ids in generated.tolist()]


class LclDecoder(TransferHead):
    """An LM in the shape of the run's that reads `begin <BoI> latents <EoI> text end`, as in pre-training.

    Args:
        weights: those of the run's LM, in the order of its parameters; None: random.

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
        self.tokenizer, self.max_tokens = tokenizer, config.text_tokens
        self.prompt = [tokenizer.bos, tokenizer.boi, *[tokenizer.image] * patches, tokenizer.eoi]
        if len(self.prompt) + self.max_tokens > positions:
            raise ConfigError(
                explain(
                    f"transfer.text_tokens = {self.max_tokens} after {len(self.prompt)} for the image",
                    f"the LM has {positions} positions",
                    f"Use --text-tokens {max(positions - len(self.prompt), 1)}.",
                )
            )
        self.initialize_weights(key63(config.seed, "caption decoder"))
        if weights is not None:
            with torch.no_grad():
                for parameter, value in zip(self.language.parameters(), weights, strict=True):
                    parameter.copy_(value)

    @property
    def width(self) -> int:
        return self.shape.language.width

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch(list(texts))
        return [[*ids[: self.max_tokens - 1], self.tokenizer.eos] for ids in encoded]

    def _hidden(self, latents: Tensor, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Hidden states [t, D] over prompts and texts, and where each sequence starts, int64 [n] on the host."""
        packed = pack([[*self.prompt, *ids] for ids in texts])
        starts = packed.last + 1 - torch.tensor(packed.lengths)
        return self.forward_language(packed, latents, starts + 2), starts

    def loss_sum(self, latents: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        hidden, starts = self._hidden(latents, [text[:-1] for text in ids])
        first = len(self.prompt) - 1  # predicts the first token
        positions = torch.cat(
            [start + first + torch.arange(len(text)) for start, text in zip(starts.tolist(), ids, strict=True)]
        )
        labels = torch.tensor([token for text in ids for token in text])
        language, device = self.language, hidden.device
        return generation_loss_sum(
            language.targets(hidden, positions.to(device)),
            language.head_weight,
            labels.to(device),
            vocab_start=0,
            vocab_size=self.shape.language.vocab_size,
            tp_group=self.groups.tp,
        )

    @torch.no_grad()
    def generate(self, latents: Tensor, max_tokens: int) -> list[str]:
        def logits(generated: Tensor) -> Tensor:
            texts = generated.tolist()
            hidden, starts = self._hidden(latents, texts)
            last = (starts + len(self.prompt) + len(texts[0]) - 1).to(hidden.device)
            scores = self.language.targets(hidden, last) @ self.language.head_weight.T
            return scores[:, : self.shape.language.vocab_size].float()

        max_tokens = min(max_tokens, self.shape.language.max_positions - len(self.prompt))
        generated = greedy(logits, len(latents), max_tokens, self.tokenizer, latents.device)
        return [self.tokenizer.decode(ids).strip() for ids in generated]


IGNORED = -100


class HuggingFaceDecoder(nn.Module):
    """A Hugging Face causal LM that reads `begin latents text end`, without `begin` if its vocabulary has none.

    Args:
        path: folder with `config.json`, safetensors and the tokenizer; nothing is downloaded, no code in it runs.
        max_tokens: of a text, its end token included.

    Raises:
        ConfigError: transformers is missing, the folder holds no causal LM, or its tokenizer has no end token.
    """

    def __init__(self, path: str, max_tokens: int, device: torch.device) -> None:
        super().__init__()
        if not Path(path).is_dir():
            raise ConfigError(
                explain(
                    f"--language-model {path}",
                    "is neither fresh, pretrained nor a folder",
                    "Give the folder of a downloaded Hugging Face causal LM.",
                )
            )
        if not installed("transformers", "transformers", "transformers").usable:
            raise ConfigError(
                explain(f"--language-model {path}", "needs transformers", "pip install 'lcl-mcore[export]'.")
            )
        make_torchvision_importable()
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                explain(
                    f"--language-model {path}",
                    f"cannot be loaded ({str(error).splitlines()[0]})",
                    "It needs config.json, safetensors and a tokenizer.",
                )
            ) from None
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                explain(
                    f"--language-model {path}",
                    "its tokenizer has no end token",
                    "Set eos_token in its tokenizer_config.json.",
                )
            )
        self.model = model.to(device).eval()  # no dropout, as in our own LM
        self.max_tokens, self.end = max_tokens, int(self.tokenizer.eos_token_id)

    @property
    def width(self) -> int:
        return int(self.model.get_input_embeddings().embedding_dim)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*ids[: self.max_tokens - 1], self.end] for ids in encoded]

    def _prefix(self, latents: Tensor) -> Tensor:
        """Embedded begin token and latents: [n, 1 + P, D]; [n, P, D] without a begin token."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            return latents
        tokens = torch.full((len(latents), 1), int(begin), device=latents.device)
        return torch.cat((self.model.get_input_embeddings()(tokens), latents), 1)

    def loss_sum(self, latents: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        device, longest = latents.device, max(map(len, ids))
        prefix = self._prefix(latents)
        inputs = torch.tensor(
            [[*text[:-1], *[self.end] * (longest - len(text))] for text in ids], dtype=torch.int64, device=device
        )
        labels = torch.tensor([[*text, *[IGNORED] * (longest - len(text))] for text in ids], device=device)
        # Padding stands behind every target, where a causal mask hides it.
        embeds = torch.cat((prefix, self.model.get_input_embeddings()(inputs)), 1)
        logits = self.model(inputs_embeds=embeds).logits[:, prefix.shape[1] - 1 :]
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @torch.no_grad()
    def generate(self, latents: Tensor, max_tokens: int) -> list[str]:
        embeds = self._prefix(latents)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64, device=embeds.device)
        generated = self.model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_tokens,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(generated, skip_special_tokens=True)]
