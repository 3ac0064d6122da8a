"""For `fuzz.py`: a sound example of every kind of file that the program reads, and the program's way of reading it."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file

from lcl_mcore.checkpoint.consolidate import info
from lcl_mcore.checkpoint.manager import Checkpointer
from lcl_mcore.checkpoint.shards import Shard
from lcl_mcore.checkpoint.store import TrainState, checkpoint_names, open_store
from lcl_mcore.checkpoint.weights_file import is_consolidated, read_consolidated, require_same_model, write_consolidated
from lcl_mcore.commands.pretrain import PretrainOptions
from lcl_mcore.config.cli import parse_run
from lcl_mcore.config.recipes import load_recipe
from lcl_mcore.config.run_folder import config_text, read_config
from lcl_mcore.config.schema import DataConfig, ModelConfig, SourceConfig, TokenizerConfig, VisionConfig
from lcl_mcore.data.images import BadImageError
from lcl_mcore.data.inspection import Inspector
from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.prepare.mmc4 import Mmc4Reader
from lcl_mcore.data.prepare.pairs import PairReader
from lcl_mcore.data.prepare.parquet import ParquetReader
from lcl_mcore.data.prepare.records import Reader
from lcl_mcore.data.tokenizer import build_tokenizer, train_bpe
from lcl_mcore.evaluation.caption_data import open_caption_dataset
from lcl_mcore.evaluation.classification_data import open_splits
from lcl_mcore.evaluation.prompts import prompt_names, read_templates
from lcl_mcore.export.model_card import data_fingerprints, results
from lcl_mcore.fault_tolerance.events import EventLog, is_restart, read_events
from lcl_mcore.interop.init_from import read_encoder
from lcl_mcore.interop.released import from_released, read_released, shape_of_released
from lcl_mcore.metrics import StepLines, read_steps
from lcl_mcore.untrusted import read_regular

STEPS = (10, 20, 30)
WORDS = ("red", "green", "blue", "round", "square", "cat", "dog", "house", "tree")
VISION = VisionConfig(image_size=16, patch_size=8, width=32, layers=1, heads=2, mlp_width=64, pre_norm=False)


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        folder: below the sound examples; a copy of it is changed and read.
        files: patterns of the files that are changed.
        read: reads the copy as the program does; `LclError` is a refusal.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], None]


# --- checkpoints


class Tensors:
    """What a checkpoint of a tiny run holds."""

    def __init__(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.values = {f"weights/{name}": torch.randn(5, 7, generator=generator) for name in "ab"}

    def shards(self) -> list[Shard]:
        return [Shard(key, (5, 7), (5, 7), (0, 0), 0, value.view(-1), True) for key, value in self.values.items()]

    def loaded(self, steps: int) -> None:
        """Nothing follows."""


def checkpointer(folder: Path, tensors: Tensors) -> Checkpointer:
    """In a process of its own: it starts the process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = dist.new_group([0]), dist.new_group([0])
    store = open_store(str(folder / "checkpoints"), folder / "staging")
    return Checkpointer(store, tensors, *groups, keep=len(STEPS), config=config_text(load_recipe("demo")))


def save_checkpoints(folder: Path) -> None:
    saver = checkpointer(folder, tensors := Tensors(0))
    for step in STEPS:
        for key, value in Tensors(step).values.items():
            tensors.values[key].copy_(value)
        saver.start(TrainState(step, {"at": step}, "hash", "digest"))
        outcome = saver.wait()
        assert outcome is not None
        assert not outcome.problem


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_checkpoints(folder: Path) -> None:
    """As a resume and `tools/checkpoint.py`; what was not touched is there afterwards, and is what is loaded."""
    held = folder / "checkpoints"
    touched = (folder / "touched").read_text()
    good = {name: content(held / name) for name in checkpoint_names(str(held)) if name != touched}
    tensors = Tensors(0)
    loader = checkpointer(folder, tensors)
    state, unusable = loader.restore()
    loader.clean()
    for item in unusable:
        loader.set_aside(item)
    newest = max(good)
    assert state is not None
    assert state.step in (int(newest.removeprefix("step-")), int(touched.removeprefix("step-")))
    if state.step == int(newest.removeprefix("step-")):
        assert all(torch.equal(value, tensors.values[key]) for key, value in Tensors(state.step).values.items())
    assert all(content(held / name) == before for name, before in good.items())
    info(str(folder))


# --- files of a run


def read_side_files(folder: Path) -> None:
    read_steps(folder / "metrics.jsonl", ("loss",))
    lines = StepLines(folder / "metrics.jsonl", lambda text: None)
    lines.rewind(3)
    lines.write({"step": 4, "loss": 1.0})
    lines.close()
    read_events(folder)
    is_restart(folder)
    EventLog(folder, True).record("start")
    results(folder, Path("weights"))


def read_configuration(folder: Path) -> None:
    config = read_config(folder / "config.yaml")
    data_fingerprints(config)


def read_assignments(folder: Path) -> None:
    """The file's text as the values of `--set`."""
    with contextlib.suppress(OSError):  # in place of a shell, which has its own bounds
        text = read_regular(folder / "set.txt", 1 << 20).decode("utf-8", "surrogateescape")
        words = [word.replace("\0", "") for word in text.split("\n") if "=" in word]
        parse_run(PretrainOptions, ["--recipe", "demo", *(part for word in words for part in ("--set", word))])


# --- vocabularies and weights


def read_vocabulary(folder: Path) -> None:
    tokenizer = build_tokenizer(TokenizerConfig(path=str(folder)))
    ids = tokenizer.encode("A red cat. " * 50 + "</s><unk>\ud800")
    tokenizer.decode([*ids, tokenizer.boi])


def read_full_weights(folder: Path) -> None:
    if is_consolidated(folder):
        require_same_model(folder, ModelConfig(vision=VISION))
    read_consolidated(folder)


def read_vit(folder: Path) -> None:
    read_encoder(folder, VISION)


def read_pt(folder: Path) -> None:
    state = read_released(folder / "released.pt")
    from_released(state, shape_of_released(state))


# --- data


def image(seed: int, container: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((72, 72)).save(stream, container)
    return stream.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def read_prepared(folder: Path) -> None:
    """Every document as a page, and the statistics."""
    tokenizer = build_tokenizer(TokenizerConfig(path=str(folder / "tokenizer.json")))
    config = DataConfig(sequence_length=64)
    inspector = Inspector(config, SourceConfig(path=str(folder)), tokenizer, 4)
    for index in range(4):
        with contextlib.suppress(IndexError):
            inspector.page(index)


def prepared(reader: Reader, folder: Path) -> None:
    prepare(reader, folder / "out", PrepareOptions(), workers=1, quiet=True)


def read_captions(folder: Path) -> None:
    for name in ("karpathy.json", "coco.json"):
        data = open_caption_dataset(str(folder / name), folder / "images", None, 0, 16)
        data.fetch(range(len(data)))


def read_classes(folder: Path) -> None:
    train, test = open_splits(folder, 16)
    for data in (train, test):
        data.fetch(range(min(len(data), 4)))
    if (folder / "names.txt").exists():
        prompt_names(folder / "names.txt", test)
        read_templates(folder / "templates.txt")


KINDS = (
    Kind("checkpoint", "run", ("checkpoints/*/*",), read_checkpoints),
    Kind("metrics, events and results", "side", ("*.jsonl", "*.json", "results/*"), read_side_files),
    Kind("configuration", "configuration", ("config.yaml",), read_configuration),
    Kind("--set", "set", ("set.txt",), read_assignments),
    Kind("tokenizer.json", "vocabulary", ("tokenizer.json",), read_vocabulary),
    Kind("vocab.json and merges.txt", "vocabulary-2", ("vocab.json", "merges.txt"), read_vocabulary),
    Kind("model.safetensors", "weights", ("model.safetensors",), read_full_weights),
    Kind("another package's encoder", "vit", ("model.safetensors", "config.json"), read_vit),
    Kind("released .pt", "released", ("released.pt",), read_pt),
    Kind("prepared data", "prepared", ("dataset.json", "*.tar", "*.npy"), read_prepared),
    Kind("mmc4 input", "mmc4", ("*.jsonl", "images/*"), lambda f: prepared(Mmc4Reader(f, f / "images"), f)),
    Kind("pairs input", "pairs", ("*.tar",), lambda f: prepared(PairReader(f), f)),
    Kind("parquet input", "parquet", ("*.parquet",), lambda f: prepared(ParquetReader(f, f / "images"), f)),
    Kind("html input", "html", ("*.html", "*.png"), lambda f: prepared(HtmlReader(f), f)),
    Kind("caption files", "captions", ("*.json", "images/*"), read_captions),
    Kind("class tars, names, prompts", "classes", ("*/*.tar", "*.txt"), read_classes),
    Kind("IDX files", "idx", ("*.gz",), read_classes),
)


def vit_state() -> dict[str, torch.Tensor]:
    """A ViT as timm names its tensors."""
    h, m, p = VISION.width, VISION.mlp_width, VISION.patch_size
    shapes = {
        "cls_token": (1, 1, h), "pos_embed": (1, 5, h), "patch_embed.proj.weight": (h, 3, p, p),
        "patch_embed.proj.bias": (h,), "norm.weight": (h,), "norm.bias": (h,),
    }  # fmt: skip
    block = {
        "norm1": (h,),
        "norm2": (h,),
        "attn.qkv": (3 * h, h),
        "attn.proj": (h, h),
        "mlp.fc1": (m, h),
        "mlp.fc2": (h, m),
    }
    for name, size in block.items():
        shapes |= {f"blocks.0.{name}.weight": size, f"blocks.0.{name}.bias": size[:1]}
    return {name: torch.zeros(size) for name, size in shapes.items()}


def released_state() -> dict[str, torch.Tensor]:
    """What tells the shape of a released model; the rest is missing, which is refused at the end."""
    return {
        "visual.conv1.weight": torch.zeros(64, 3, 8, 8),
        "visual.positional_embedding": torch.zeros(5, 64),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(128, 64),
        "text.token_embedding.weight": torch.zeros(100, 64),
        "text.positional_embedding": torch.zeros(32, 64),
        "text.transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(128, 64),
    }


def make_sound(base: Path) -> None:
    """Write a sound example of every kind below a folder."""
    for kind in KINDS:
        (base / kind.folder).mkdir(parents=True)
    child = os.fork()
    if child == 0:
        save_checkpoints(base / "run")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the sound checkpoints cannot be written")
    side, rng = base / "side", random.Random(0)
    (side / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1 / i}) + "\n" for i in range(1, 6)))
    EventLog(side, True).record("start", step=0)
    EventLog(side, True).record("save", step=3, seconds=1.5)
    (side / "results").mkdir()
    (side / "results" / "zeroshot.json").write_text(
        json.dumps({"task": "zeroshot", "weights": "weights", "trained": {"top1": 0.5}})
    )
    (base / "configuration" / "config.yaml").write_text(config_text(load_recipe("demo")))
    (base / "set" / "set.txt").write_text(
        "model.vision.layers=2\ndata.sources=[{path: a, weight: 2}]\noptim.lr=1e-3\ntrain.seed=3\n"
        "data.tokenizer={kind: file, path: x}\n"
    )
    tokenizer = train_bpe([" ".join(rng.choices(WORDS, k=200))], 280)
    tokenizer.save(base / "vocabulary" / "tokenizer.json")
    model = json.loads((base / "vocabulary" / "tokenizer.json").read_text())["model"]
    (base / "vocabulary-2" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    (base / "vocabulary-2" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    write_consolidated({"vision.a": torch.ones(4)}, ModelConfig(vision=VISION), base / "weights")
    save_file(vit_state(), base / "vit" / "model.safetensors")
    stated = {"architecture": "vit_tiny_patch16_clip_224", "model_args": {"num_heads": 2}}
    (base / "vit" / "config.json").write_text(json.dumps(stated))
    torch.save({"state_dict": released_state()}, base / "released" / "released.pt")
    _make_data(base, rng)
    tokenizer.save(base / "prepared" / "tokenizer.json")


def _make_data(base: Path, rng: random.Random) -> None:
    import pyarrow
    from pyarrow import parquet

    images = {f"{i}.jpg": image(i) for i in range(4)}
    texts = [" ".join(rng.choices(WORDS, k=6)) for _ in range(4)]
    pairs = {name: data for i in range(4) for name, data in ((f"{i}.jpg", image(i)), (f"{i}.txt", texts[i].encode()))}
    tar(base / "pairs" / "a.tar", pairs)
    prepare(PairReader(base / "pairs"), base / "prepared", PrepareOptions(), workers=1, quiet=True)
    for folder in ("mmc4", "captions", "parquet"):
        (base / folder / "images").mkdir()
        for name, data in images.items():
            (base / folder / "images" / name).write_bytes(data)
    documents = [
        {
            "text_list": [text, "More of it."],
            "image_info": [
                {"image_name": f"{i}.jpg", "matched_text_index": 0, "matched_sim": 0.3, "raw_url": "http://x/a"}
            ],
        }
        for i, text in enumerate(texts)
    ]
    (base / "mmc4" / "a.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    rows = {
        "images": [[None, "http://x/0.jpg"]] * 3,
        "texts": [[text, None] for text in texts[:3]],
        "metadata": [json.dumps([None, {"src": "http://x/0.jpg"}])] * 3,
        "general_metadata": [json.dumps({"url": "http://x"})] * 3,
    }
    parquet.write_table(pyarrow.table(rows), base / "parquet" / "a.parquet")
    for i, text in enumerate(texts[:2]):
        page = f"<html><title>x</title><body><p>{text * 9}</p><img src='{i}.png' alt='a'><p>Yes.</p></html>"
        (base / "html" / f"{i}.html").write_text(page)
        (base / "html" / f"{i}.png").write_bytes(image(i, "PNG"))
    entries = [{"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": text}]} for i, text in enumerate(texts)]
    (base / "captions" / "karpathy.json").write_text(json.dumps({"images": entries, "dataset": "x"}))
    coco = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)],
        "annotations": [{"image_id": i, "caption": text, "id": i} for i, text in enumerate(texts)],
    }
    (base / "captions" / "coco.json").write_text(json.dumps(coco))
    for split in ("train", "val"):
        (base / "classes" / split).mkdir()
        for number, name in enumerate(("cat", "dog")):
            tar(base / "classes" / split / f"{name}.tar", {f"{i}.jpg": image(10 * number + i) for i in range(2)})
    (base / "classes" / "names.txt").write_text("cat\tcat\ndog\tdog\n")
    (base / "classes" / "templates.txt").write_text("a photo of a {}.\n{c}\n")
    for prefix in ("train", "t10k"):
        pixels = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
        (base / "idx" / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(pixels))
        (base / "idx" / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1]))
        )


INCOMPLETE = "released .pt"
"""The one sound example that is refused at its end: it has the tensors that tell the shape, and no others."""
REFUSALS = (BadImageError,)
"""What a reader may raise beside `LclError`: the loader counts it as a damaged image."""
