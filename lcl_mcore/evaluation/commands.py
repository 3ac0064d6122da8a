"""The command line of `tools/evaluate.py`: one sub-command per protocol, results as JSON beside the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcl_mcore.config.base import from_dict
from lcl_mcore.config.evaluation import CaptionConfig, ProbeConfig, RetrievalConfig
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.storage import atomic_write

COMMANDS = ("heldout", "classify", "retrieval", "caption", "zeroshot")
RESULTS = "results"
_PROBE_FLAGS = (
    ("epochs", float),
    ("batch_size", int),
    ("lr", float),
    ("layer_decay", float),
    ("weight_decay", float),
    ("warmup", float),
    ("seed", int),
    ("train_limit", int),
    ("test_limit", int),
    ("cache_mb", int),
)
_PAIRS_FLAGS = (
    ("steps", int),
    ("batch_size", int),
    ("chunk_size", int),
    ("lr", float),
    ("encoder_lr", float),
    ("weight_decay", float),
    ("warmup", float),
    ("seed", int),
    ("train_limit", int),
    ("cache_mb", int),
    ("text_tokens", int),
)
_CAPTION_FLAGS = (("drop_path", float), ("language_model", str))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Flags of the command line; without a command it is `heldout`."""
    words = list(arguments)
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        words.insert(0, "heldout")
    parser = argparse.ArgumentParser(description="Evaluate a run, a checkpoint, or an imported model.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, about: str, data: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.add_argument(
            "model", type=Path, help="run, checkpoint of any layout, or folder with model.safetensors"
        )
        sub.add_argument("--data", required=True, help=data)
        sub.add_argument("--out", type=Path, help=f"JSON file (default: RUN/{RESULTS}/NAME.json)")
        return sub

    add("heldout", "Retrieval and generation loss on held-out documents, report.html.", "prepared data set")
    sub = add("classify", "Image classification by transfer.", "ImageNet-like folders or tars, or IDX files")
    sub.add_argument("--transfer", choices=["frozen", "full"], default="frozen")
    sub.add_argument("--no-baselines", action="store_true", help="skip random initialisation and raw pixels")
    for name, kind in _PROBE_FLAGS:
        sub.add_argument(f"--{name.replace('_', '-')}", type=kind)
    sub = add(
        "zeroshot", "Zero-shot classification with prompts.", "ImageNet-like folders or tars, or IDX files"
    )
    sub.add_argument("--classnames", type=Path, help="a name per line, in the order of the classes")
    sub.add_argument("--templates", type=Path, help="prompts, one per line, {} for the name")
    sub.add_argument("--test-limit", type=int, default=0)
    for name, about in (
        ("retrieval", "Image-text retrieval: TR@k and IR@k."),
        ("caption", "Captions: BLEU-4 and CIDEr."),
    ):
        sub = add(name, about, "Karpathy or NoCaps JSON, or a prepared data set")
        sub.add_argument("--images", type=Path, help="folder of the images that the JSON names")
        sub.add_argument("--split", default="test", help="split of a Karpathy file")
        sub.add_argument("--limit", type=int, default=0, help="images used, from the first on; 0: all")
        sub.add_argument(
            "--transfer", choices=["zeroshot", "frozen", "full"], help="default: frozen with --train"
        )
        sub.add_argument("--train", help="pairs for new parts: like --data; default: the model as it is")
        sub.add_argument("--train-images", type=Path, help="folder of their images (default: --images)")
        sub.add_argument("--train-split", default="train", help="of a Karpathy file, e.g. train,restval")
        sub.add_argument("--no-baselines", action="store_true", help="skip untrained encoders and pixels")
        for flag, value in (*_PAIRS_FLAGS, *(_CAPTION_FLAGS if name == "caption" else ())):
            sub.add_argument(f"--{flag.replace('_', '-')}", type=value)
        if name == "caption":
            sub.add_argument("--freeze-language-model", action="store_true", default=None)
            sub.add_argument("--max-tokens", type=int, default=20, help="length of written captions")
    return parser.parse_args(words)


def transfer_settings(flags: argparse.Namespace) -> dict[str, Any] | None:
    """What the command line says about training on pairs; None for zero-shot.

    Raises:
        ConfigError: training without pairs, or the other way round.
    """
    names = [name for name, _ in (*_PAIRS_FLAGS, *_CAPTION_FLAGS)] + ["freeze_language_model"]
    given = {name: value for name in names if (value := getattr(flags, name, None)) is not None}
    transfer = flags.transfer or ("frozen" if flags.train else "zeroshot")
    if transfer != "zeroshot":
        if not flags.train:
            raise ConfigError(
                explain(
                    f"--transfer {transfer} without --train",
                    "new parts learn from pairs",
                    "Give --train: a prepared data set, Karpathy's or COCO-style JSON.",
                )
            )
        return {**given, "transfer": transfer}
    if flags.train or given:
        what = "--train" if flags.train else "--" + next(iter(given)).replace("_", "-")
        remedy = "Use --transfer frozen or full." if flags.train else "Give --train, or leave it out."
        raise ConfigError(explain(f"{what} without a transfer", "zero-shot trains nothing", remedy))
    return None


def run(flags: argparse.Namespace) -> None:
    """Carry out one command: print its numbers and write them as JSON."""
    if flags.command == "heldout":
        _heldout(flags)
        return
    from lcl_mcore.evaluation.load import open_model

    loaded = open_model(flags.model)
    result = {"classify": _classify, "zeroshot": _zeroshot, "retrieval": _retrieval, "caption": _caption}[
        flags.command
    ](flags, loaded)
    out = flags.out or loaded.folder / RESULTS / f"{result['task'].replace(', ', '-').replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result |= {"command": " ".join(sys.argv), "date": datetime.now(UTC).date().isoformat()}
    atomic_write(out, json.dumps(result, indent=1) + "\n")
    _print(result)
    print(out)


def _print(result: dict[str, Any], indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                _print(item, indent + "  ")
        else:
            print(
                f"{indent}{name:<18} {value:.4g}"
                if isinstance(value, float)
                else f"{indent}{name:<18} {value}"
            )


def _heldout(flags: argparse.Namespace) -> None:
    from lcl_mcore.evaluation.heldout import evaluate_heldout
    from lcl_mcore.evaluation.load import open_model
    from lcl_mcore.evaluation.report import print_table, write_report
    from lcl_mcore.metrics import read_metrics

    loaded = open_model(flags.model)
    result = evaluate_heldout(loaded, flags.data)
    write_report(loaded.folder, result, read_metrics(loaded.folder / "metrics.jsonl"))
    print_table(result.summary)
    print(f"\nreport: {loaded.folder / 'report.html'}")


def _classify(flags: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    from lcl_mcore.evaluation.classification import classify

    given = {name: getattr(flags, name) for name, _ in _PROBE_FLAGS if getattr(flags, name) is not None}
    config = from_dict(ProbeConfig, {**given, "transfer": flags.transfer}, "command line")
    return classify(loaded, Path(flags.data), config, baselines=not flags.no_baselines)


def _zeroshot(flags: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    from lcl_mcore.evaluation.zero_shot import zero_shot

    return zero_shot(loaded, Path(flags.data), flags.classnames, flags.templates, flags.test_limit)


def _retrieval(flags: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    settings = transfer_settings(flags)
    if settings is None:
        from lcl_mcore.evaluation.retrieval import zero_shot_retrieval

        return zero_shot_retrieval(loaded, _test_pairs(flags, loaded))
    from lcl_mcore.evaluation.retrieval import retrieval_transfer

    config = from_dict(RetrievalConfig, settings, "command line")
    return retrieval_transfer(
        loaded, *_both_pairs(flags, loaded, config.train_limit), config, not flags.no_baselines
    )


def _caption(flags: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    settings = transfer_settings(flags)
    if settings is None:
        from lcl_mcore.evaluation.captioning import zero_shot_captions

        return zero_shot_captions(loaded, _test_pairs(flags, loaded), flags.max_tokens)
    from lcl_mcore.evaluation.captioning import caption_transfer

    config = from_dict(CaptionConfig, settings, "command line")
    train, test = _both_pairs(flags, loaded, config.train_limit)
    return caption_transfer(loaded, train, test, config, flags.max_tokens, not flags.no_baselines)


def _test_pairs(flags: argparse.Namespace, loaded: Any) -> Any:
    from lcl_mcore.evaluation.datasets import open_caption_dataset

    side = loaded.config.model.vision.image_size
    return open_caption_dataset(flags.data, flags.images, flags.split, flags.limit, side)


def _both_pairs(flags: argparse.Namespace, loaded: Any, limit: int) -> tuple[Any, Any]:
    """Training and test pairs."""
    from lcl_mcore.evaluation.datasets import open_caption_dataset
    from lcl_mcore.evaluation.transfer import require_disjoint

    side, images = loaded.config.model.vision.image_size, flags.train_images or flags.images
    train = open_caption_dataset(flags.train, images, flags.train_split, limit, side)
    test = _test_pairs(flags, loaded)
    require_disjoint(train, test, Path(flags.train).resolve() == Path(flags.data).resolve())
    return train, test
