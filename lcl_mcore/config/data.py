"""Every knob of the data engine: which documents, how they become rows, how they are read."""

from __future__ import annotations

import math
from typing import Literal

from lcl_mcore.config.base import config_dataclass, require


@config_dataclass
class TokenizerConfig:
    """Which vocabulary turns text into ids, and where the special ids lie.

    kind   `file`: any Hugging Face `tokenizer.json`; the special ids follow its last id.
           `opt`: OPT's vocabulary (`</s>` = 2 begins and ends, pad 1, image ids 50265..50267 of 50272).
           `clip`: CLIP's, with the ids of the released code (49406..49410 of 49411, pad 0).
    path   the `tokenizer.json`, or a folder that holds it (or `vocab.json` + `merges.txt`, or CLIP's
           `bpe_simple_vocab_16e6.txt.gz`), or for `opt`/`clip` a name in the local Hugging Face cache.
    """

    kind: Literal["file", "opt", "clip"] = "file"
    path: str = ""


@config_dataclass
class SourceConfig:
    """One prepared data set (a folder or URL with `dataset.json`) and how its documents are used.

    path                     folder or fsspec URL (`s3://bucket/folder`)
    weight                   share of the mix, counted in documents, relative to the other sources
    name                     in logs and in saved positions; default: the last part of `path`
    min_similarity           matched documents: images with a lower similarity are left out
    min_images, max_images   documents with fewer images are skipped; of more, `image_choice` are kept
    image_choice             `random` (the paper) or the `first` ones in document order (released code)
    one_image_per_text       matched documents: keep one random image of those that share a text
    image_first_probability  pairs and matched documents: chance that a image stands before its text
    max_text_tokens          pairs: longer captions are cut (0: as long as a row allows)
    long_documents           `cut`: what exceeds a row is dropped, in whole pieces; `split`: it goes on
                             in another row; `auto`: split for sequences, cut otherwise
    cut_rule                 where a long document is cut: `pieces` (whole texts, the paper) or `tokens`
                             (released code: anywhere in a text, end token forced at the last place)
    ends                     `document`: every document has begin and end tokens; `released`: a pair
                             with the image first has no begin token, with the text first no end token
    """

    path: str
    weight: float = 1.0
    name: str = ""
    min_similarity: float = 0.24
    min_images: int = 0
    max_images: int = 6
    image_choice: Literal["random", "first"] = "random"
    one_image_per_text: bool = False
    image_first_probability: float = 0.5
    max_text_tokens: int = 0
    long_documents: Literal["auto", "cut", "split"] = "auto"
    cut_rule: Literal["pieces", "tokens"] = "pieces"
    ends: Literal["document", "released"] = "document"

    def __post_init__(self) -> None:
        require(bool(self.path), "data.sources[].path = ''", "a source needs a path", "Give its folder.")
        require(
            math.isfinite(self.weight) and self.weight > 0,
            f"weight = {self.weight}",
            "weights are positive numbers",
            "Leave the source out to give it no weight.",
        )
        require(
            0 <= self.min_images <= self.max_images,
            f"min_images = {self.min_images}, max_images = {self.max_images}",
            "0 <= min_images <= max_images",
            "Exchange or lower min_images.",
        )
        require(
            0.0 <= self.image_first_probability <= 1.0,
            f"image_first_probability = {self.image_first_probability}",
            "a probability lies in 0..1",
            "The paper uses 0.5.",
        )
        require(
            -1.0 <= self.min_similarity <= 1.0,
            f"min_similarity = {self.min_similarity}",
            "a cosine similarity lies in -1..1",
            "The paper uses 0.24.",
        )
        require(
            self.max_text_tokens >= 0,
            f"max_text_tokens = {self.max_text_tokens}",
            "must not be negative",
            "Use 0 for no limit.",
        )
        require(
            not (self.cut_rule == "tokens" and self.long_documents == "split"),
            "cut_rule = tokens with long_documents = split",
            "a document is cut at a token only where its rest is dropped",
            "Use cut_rule = pieces, or long_documents = cut.",
        )

    @property
    def label(self) -> str:
        """The name used in positions, logs and error messages."""
        return self.name or self.path.rstrip("/").rsplit("/", 1)[-1]


@config_dataclass
class DataConfig:
    """What the loader reads and how it packs and decodes.

    sequence_length           tokens per row
    packing                   `best_fit`: whole documents are chosen so that rows are full, and one is
                              split at a piece when that is needed to reach `min_fill`; `windows`:
                              documents laid end to end and cut every `sequence_length` tokens, images
                              moved whole (OBELICS in the paper); `off`: one document per row
    packing_rows              best_fit: how many rows' worth of documents a lane chooses from
    min_fill                  best_fit: share of a row below which a document is split (0: never)
    balance_images            best_fit: prefer the choice whose number of images is nearest the average
    context_rule              which images enter the contrastive loss: `text`: some text or image of the
                              same document comes before; `index0` (released code): `<BoI>` is not the
                              document's first token
    shuffle                   off: documents in stored order (still spread over the lanes)
    shuffle_block             documents that stay together in the shuffled order; above 1 a reader of an
                              object store fetches neighbours in one request
    crop_scale, crop_ratio    random resized crop: share of the area, aspect ratio of the window
    decode_backend            `auto`: DALI with a GPU and an installed DALI, else `cpu` (Pillow)
    decode_threads            threads that read and decode images
    prefetch_steps            steps prepared ahead of the one being trained on
    max_consecutive_failures  images in a row that may fail before the run stops
    verify_images             compare every image with the sha256 of its manifest entry
    read_retries              attempts for a failed read of an object store, with growing pauses
    read_cache_mb             memory for bytes fetched from an object store and not yet used
    """

    sources: tuple[SourceConfig, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: int = 2048
    packing: Literal["best_fit", "windows", "off"] = "best_fit"
    packing_rows: int = 8
    min_fill: float = 0.98
    balance_images: bool = False
    context_rule: Literal["text", "index0"] = "text"
    shuffle: bool = True
    shuffle_block: int = 1
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4.0 / 3.0)
    decode_backend: Literal["auto", "cpu", "dali"] = "auto"
    decode_threads: int = 2
    prefetch_steps: int = 2
    max_consecutive_failures: int = 100
    verify_images: bool = True
    read_retries: int = 5
    read_cache_mb: int = 256

    def __post_init__(self) -> None:
        for name, low in [
            ("sequence_length", 8),
            ("packing_rows", 2),
            ("shuffle_block", 1),
            ("decode_threads", 1),
            ("prefetch_steps", 1),
            ("max_consecutive_failures", 1),
            ("read_retries", 0),
            ("read_cache_mb", 1),
        ]:
            value = getattr(self, name)
            require(value >= low, f"data.{name} = {value}", f"must be at least {low}", f"Set it to {low}.")
        labels = [source.label for source in self.sources]
        require(
            len(set(labels)) == len(labels),
            f"data.sources named {labels}",
            "every source needs a name of its own",
            "Set `name` on those that share one.",
        )
        require(
            0.0 <= self.min_fill <= 1.0, f"data.min_fill = {self.min_fill}", "a share in 0..1", "Try 0.98."
        )
        for name, bounds in [("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)]:
            top = 1.0 if name == "crop_scale" else math.inf
            require(
                0.0 < bounds[0] <= bounds[1] <= top,
                f"data.{name} = {bounds}",
                f"needs 0 < low <= high <= {top}",
                "The paper uses scale (0.9, 1) and ratio (3/4, 4/3).",
            )
        for source in self.sources:
            require(
                not (source.ends == "released" and self.packing == "windows"),
                f"{source.label}: ends = released with packing = windows",
                "windows need begin and end tokens to tell documents apart",
                "Use packing = off as the released code does.",
            )

    def require_room_for_images(self, tokens_per_image: int) -> None:
        """Refuse a row that cannot hold one image with begin, end and one token of text."""
        needed = tokens_per_image + 5
        require(
            not self.sources or self.sequence_length >= needed,
            f"data.sequence_length = {self.sequence_length}",
            f"must hold an image of {tokens_per_image} tokens with its markers, begin and end: >= {needed}",
            "Lengthen the row, or use a larger patch or smaller image.",
        )
