"""The smallest model and corpus that a whole run goes through."""

from __future__ import annotations

from pathlib import Path

from corpora import make_dataset, small_tokenizer

MODEL = (
    "model.vision.image_size=32",
    "model.vision.width=32",
    "model.vision.layers=2",
    "model.vision.heads=4",
    "model.vision.mlp_width=64",
    "model.language.width=32",
    "model.language.layers=2",
    "model.language.heads=4",
    "model.language.mlp_width=64",
    "model.language.vocab_size=400",
    "model.pool_heads=4",
    "data.sequence_length=64",
    "data.decode_backend=cpu",
    "log.tensorboard=false",
)
DROPPING = ("model.vision.drop_path=0.2", "model.language.dropout=0.1")
PLAIN = ("model.vision.drop_path=0", "model.language.dropout=0")


def make_corpus(folder: Path) -> Path:
    """`pairs/` (60 documents) and `tokenizer.json` below `folder`."""
    make_dataset(folder / "pairs")
    small_tokenizer().save(folder / "tokenizer.json")
    return folder
