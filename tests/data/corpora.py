"""Small data sets for the data engine's tests, made in milliseconds and always the same."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcl_mcore.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig, VisionConfig
from lcl_mcore.data.format import Document, ShardWriter, write_manifest
from lcl_mcore.data.loader import DataContext, StepLoader, build_loader
from lcl_mcore.data.prepare.normalise import entry_for
from lcl_mcore.data.tokenizer import Tokenizer, train_bpe

WORDS = ("red", "green", "blue", "round", "square", "old", "new", "large", "cat", "dog", "house", "tree")


def image_bytes(seed: int, width: int = 80, height: int = 72, container: str = "JPEG", **options: Any) -> bytes:
    """A smooth coloured image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, container, **options)
    return stream.getvalue()


def sentence(rng: random.Random, words: int) -> str:
    """Some words."""
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def small_tokenizer() -> Tokenizer:
    """A byte-level vocabulary of 300 ids over `WORDS`."""
    return train_bpe([sentence(random.Random(0), 200)], 300)


def document(kind: str, seed: int) -> tuple[list[str], list[tuple[int, float]]]:
    """Texts, and (text index, similarity) of each image."""
    rng = random.Random(seed)
    if kind == "pair":
        return [sentence(rng, rng.randint(2, 9))], [(0, 1.0)]
    texts = [sentence(rng, rng.randint(3, 14)) for _ in range(rng.randint(1, 6))]
    last = len(texts) - (kind == "matched")
    images = [(rng.randint(0, last), round(rng.uniform(0.2, 0.4), 4)) for _ in range(rng.randint(0, 4))]
    return texts, images


def make_dataset(folder: Path, kind: str = "pair", documents: int = 60, *, per_shard: int = 25, seed: int = 0) -> Path:
    """A native data set of random documents of one kind."""
    folder.mkdir(parents=True)
    shards = []
    writer: ShardWriter | None = None
    for number in range(documents):
        if writer is None:
            writer = ShardWriter(folder / f"shard-{len(shards):03d}.tar")
        texts, images = document(kind, seed * 100_000 + number)
        entries, contents = [], []
        for k, (index, similarity) in enumerate(images):
            content = image_bytes(seed * 1_000_000 + number * 10 + k, 64 + number % 30, 70)
            entries.append(entry_for(k, (content, "jpg", 64 + number % 30, 70), index, similarity))
            contents.append(content)
        made = Document(f"doc-{number:06d}", kind, tuple(texts), tuple(entries))  # type: ignore[arg-type]
        writer.add(made, contents)
        if writer.documents == per_shard:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    write_manifest(folder, shards)
    return folder


def config(*folders: Path, weights: tuple[float, ...] = (), **more: Any) -> DataConfig:
    """A configuration over data sets, 128 tokens per sequence unless said otherwise."""
    source_options = more.pop("source_options", {})
    sources = tuple(
        SourceConfig(path=str(folder), weight=weights[i] if weights else 1.0, **source_options)
        for i, folder in enumerate(folders)
    )
    return DataConfig(**{"sources": sources, "sequence_length": 128, "decode_backend": "cpu", **more})


SIDE, TOKENS_PER_IMAGE = 36, 9


def run_config(data: DataConfig, *, patch_size: int = 12, **train: Any) -> RunConfig:
    """A run over `data`: images of 36 pixels take 9 tokens, 8 sequences a step in micro-batches of 2."""
    vision = VisionConfig(image_size=SIDE, patch_size=patch_size)
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "seed": 5, **train}
    return RunConfig(data=data, model=ModelConfig(vision=vision), train=TrainConfig(**sizes))


def open_loader(data: DataConfig, position: dict[str, Any] | None = None, **options: Any) -> StepLoader:
    """The loader of a single process; `options` as in `run_config`."""
    return build_loader(run_config(data, **options), DataContext(), small_tokenizer(), position)
