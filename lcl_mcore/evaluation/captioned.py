"""Images with several captions by local path, vectors of both, and retrieval between them (TR@k, IR@k).

Shape legend
    n  images;  k  captions of all of them;  D  LM width;  S  side in pixels
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from lcl_mcore.batch import MicroBatch
from lcl_mcore.data.dataset import NativeDataset
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import DataError, explain
from lcl_mcore.evaluation.labelled import fetcher
from lcl_mcore.evaluation.loading import LoadedModel, reset_weights
from lcl_mcore.models.lcl import LclModel, l2_normalize

CHUNK = 64
KS = (1, 5, 10)


@dataclass(frozen=True)
class CaptionDataset:
    """captions[i] belong to image i; fetch: indices -> uint8 [m, 3, S, S]."""

    name: str
    captions: Sequence[tuple[str, ...]]
    fetch: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.captions)


def open_caption_dataset(path: str, images: Path | None, split: str, limit: int, side: int) -> CaptionDataset:
    """A prepared data set of pairs; Karpathy's JSON (COCO, Flickr30k); or COCO-style JSON (NoCaps).

    Args:
        split: of a Karpathy file; several with commas between.

    Raises:
        DataError: of none of these kinds, or images are missing.
    """
    if (Path(path) / "dataset.json").is_file():
        return _open_prepared(path, limit, side)
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        found = _karpathy(content, split) if "sentences" in content["images"][0] else _coco(content)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            explain(
                path,
                f"is neither a prepared data set nor a caption file ({error!r})",
                "Give Karpathy's or NoCaps' JSON, or a prepared data set.",
            )
        ) from None
    found = found[: limit or None]
    root = images or Path(path).parent
    files = [root / name for name, _ in found]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not found:
        raise DataError(
            explain(
                missing[0] if missing else f"{path}: split {split}",
                "is not there",
                "Give --images, the folder that holds the images, and --split.",
            )
        )
    fetch = fetcher(lambda i: (str(files[i]), files[i].read_bytes()), side)
    return CaptionDataset(Path(path).stem, tuple(captions for _, captions in found), fetch)


def _karpathy(content: dict[str, Any], split: str) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (str(Path(item.get("filepath", "")) / item["filename"]), tuple(s["raw"] for s in item["sentences"]))
        for item in content["images"]
        if item["split"] in split.split(",")
    ]


def _coco(content: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    captions: dict[Any, list[str]] = {}
    for item in content["annotations"]:
        captions.setdefault(item["image_id"], []).append(item["caption"])
    return [
        (item["file_name"], tuple(captions[item["id"]]))
        for item in content["images"]
        if item["id"] in captions
    ]


class _Texts(Sequence[tuple[str, ...]]):
    """Captions of a prepared data set, read when asked for: there may be millions."""

    def __init__(self, data: NativeDataset, count: int) -> None:
        self._data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[str, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | Sequence[tuple[str, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        document, _ = self._data.document(index)
        if document.kind != "pair":
            raise DataError(
                explain(
                    f"{self._data.path}: {document.key}",
                    f"is a {document.kind} document, not a pair",
                    "Use the heldout command for interleaved documents.",
                )
            )
        return tuple(document.texts)


def _open_prepared(path: str, limit: int, side: int) -> CaptionDataset:
    data = NativeDataset(path)
    texts = _Texts(data, min(len(data), limit or len(data)))
    texts[:1]  # not pairs at all: say so before anything is trained

    def read(index: int) -> tuple[str, bytes]:
        document, members = data.document(index)
        return document.key, data.image(document, members, 0)

    return CaptionDataset(data.name, texts, fetcher(read, side))


@torch.no_grad()
def image_vectors(model: LclModel, data: CaptionDataset | Any) -> Tensor:
    """Unit vectors of all images of a set with `fetch` and a length: fp32 [n, D] on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for indices in torch.arange(len(data)).split(CHUNK):
        found = data.fetch(indices.tolist()).to(device)
        parts.append(l2_normalize(model.encode_images(found, indices.to(device), 0).vectors).cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class TextRows:
    """Texts laid end to end: tokens and positions int64 [t], and the length of each row on the host."""

    tokens: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    @property
    def last(self) -> Tensor:
        """Where each row's last token lies, int64 [rows]."""
        return torch.tensor(self.lengths).cumsum(0) - 1


def lay_rows(rows: Sequence[Sequence[int]]) -> TextRows:
    """Rows of ids, end to end."""
    return TextRows(
        torch.tensor([token for row in rows for token in row]),
        torch.cat([torch.arange(len(row)) for row in rows]),
        tuple(len(row) for row in rows),
    )


def text_rows(tokenizer: Tokenizer, texts: Sequence[str], room: int, last: int) -> TextRows:
    """Rows `begin text last` of at most `room` tokens; long texts lose their end."""
    return lay_rows([[tokenizer.bos, *ids[: room - 2], last] for ids in tokenizer.encode_batch(list(texts))])


def text_batch(model: LclModel, tokenizer: Tokenizer, texts: Sequence[str], room: int) -> MicroBatch:
    """Rows `begin text <BoI>` without images: the LM's state at `<BoI>` is the text's context vector."""
    side, rows = model.shape.vision.image_size, text_rows(tokenizer, texts, room, tokenizer.boi)
    none = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        tokens=rows.tokens,
        positions=rows.positions,
        lengths=rows.lengths,
        images=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        image_starts=none,
        context_positions=rows.last,
        context_images=none,
        target_positions=none,
        target_labels=none,
        image_keys=none,
        sequence_keys=torch.arange(len(rows.lengths)),
        group_ids=none,
    )


@torch.no_grad()
def text_vectors(opened: LoadedModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Unit context vectors of texts, fp32 [k, D] on the CPU; long texts lose their end."""
    model, room = opened.model, opened.config.data.sequence_length
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(texts), CHUNK):
        batch = text_batch(model, tokenizer, texts[start : start + CHUNK], room).to(device)
        latents = torch.zeros(0, model.shape.vision.patches, model.shape.language.width, device=device)
        hidden = model.forward_language(batch, latents, tuple(range(len(batch.lengths))), 0)
        parts.append(model.context_embeds(batch, hidden).cpu())
    return torch.cat(parts)


def recalls(image: Tensor, text: Tensor, owner: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """TR@k: some own caption among a image's k nearest texts. IR@k: its image among a caption's k nearest.

    image [n, D], text [k, D], owner int64 [k]: the image of each caption. Ties count against the query.
    """
    similarity = image.double() @ text.double().T
    own = owner[None] == torch.arange(len(image))[:, None]  # [n, k]
    best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    text_rank = ((similarity >= best) & ~own).sum(1)
    mine = similarity.gather(0, owner[None])  # [1, k]
    image_rank = ((similarity >= mine) & ~own).sum(0)
    result = {f"TR@{k}": float((text_rank < k).double().mean()) for k in ks}
    return result | {f"IR@{k}": float((image_rank < k).double().mean()) for k in ks}


def flat(data: CaptionDataset) -> tuple[list[str], Tensor]:
    """All captions, and the image of each: int64 [k]."""
    texts = [caption for captions in data.captions for caption in captions]
    return texts, torch.tensor([i for i, captions in enumerate(data.captions) for _ in captions])


def chance(data: CaptionDataset) -> dict[str, float]:
    """Recall of a caption's image in a random order."""
    return {f"IR@{k}": min(k / len(data), 1.0) for k in KS}


def retrieval(opened: LoadedModel, data: CaptionDataset) -> dict[str, Any]:
    """Zero-shot retrieval with the pre-trained vectors, and the same with random weights (left in the model)."""
    tokenizer = opened.tokenizer()
    opened.model.float()
    texts, owner = flat(data)

    def numbers() -> dict[str, float]:
        return recalls(image_vectors(opened.model, data), text_vectors(opened, tokenizer, texts), owner)

    result: dict[str, Any] = {
        **opened.facts(),
        "task": "retrieval",
        "transfer": "zeroshot",
        "data": data.name,
        "images": len(data),
        "captions": len(texts),
        "trained": numbers(),
        "chance": chance(data),
    }
    reset_weights(opened)
    return {**result, "random_init": numbers()}
