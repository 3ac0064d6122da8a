"""A Hugging Face causal LM from a local folder as the writer of captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_mcore.distributed.cpu import make_torchvision_importable
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.optional_packages import installed

IGNORED = -100


class HuggingFaceDecoder(nn.Module):
    """Reads `begin latents text end`, with the begin mark left out where the vocabulary has none.

    Args:
        path: folder with `config.json`, safetensors and the tokenizer; nothing is downloaded, no code in it runs.
        room: tokens of a text, its end mark included.

    Raises:
        ConfigError: transformers is missing, the folder holds no causal LM, or its tokenizer has no end mark.
    """

    def __init__(self, path: str, room: int, device: torch.device) -> None:
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
                    "its tokenizer has no end mark",
                    "Set eos_token in its tokenizer_config.json.",
                )
            )
        self.model = model.to(device).eval()  # no dropout, as in our own LM
        self.room, self.end = room, int(self.tokenizer.eos_token_id)

    @property
    def width(self) -> int:
        return int(self.model.get_input_embeddings().embedding_dim)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [[*ids[: self.room - 1], self.end] for ids in encoded]

    def _prefix(self, latents: Tensor) -> Tensor:
        """Embedded begin mark and latents: [n, 1 + P, D], or [n, P, D]."""
        begin = self.tokenizer.bos_token_id
        if begin is None:
            return latents
        mark = torch.full((len(latents), 1), int(begin), device=latents.device)
        return torch.cat((self.model.get_input_embeddings()(mark), latents), 1)

    def loss_sum(self, latents: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
        device, longest = latents.device, max(map(len, ids))
        prefix = self._prefix(latents)
        inputs = torch.tensor(
            [[*row[:-1], *[self.end] * (longest - len(row))] for row in ids], dtype=torch.int64, device=device
        )
        labels = torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in ids], device=device)
        # Padding stands behind every target, where a causal mask hides it.
        given = torch.cat((prefix, self.model.get_input_embeddings()(inputs)), 1)
        logits = self.model(inputs_embeds=given).logits[:, prefix.shape[1] - 1 :]
        return F.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    @torch.no_grad()
    def write(self, latents: Tensor, limit: int) -> list[str]:
        given = self._prefix(latents)
        mask = torch.ones(given.shape[:2], dtype=torch.int64, device=given.device)
        found = self.model.generate(
            inputs_embeds=given,
            attention_mask=mask,
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]
