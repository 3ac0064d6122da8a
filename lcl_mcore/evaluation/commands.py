"""The command line of `tools/evaluate.py`: one sub-command per protocol, results as JSON beside the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcl_mcore.config.base import from_dict
from lcl_mcore.config.evaluation import ProbeConfig

COMMANDS = ("heldout", "classify", "retrieval", "caption", "zeroshot")
RESULTS = "results"
_PROBE_FLAGS = (
    ("epochs", float), ("batch_size", int), ("lr", float), ("layer_decay", float), ("weight_decay", float),
    ("warmup", float), ("seed", int), ("train_limit", int), ("test_limit", int), ("cache_mb", int),
)  # fmt: skip


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
        sub.add_argument("--images", type=Path, help="folder of the pictures that the JSON names")
        sub.add_argument("--split", default="test", help="split of a Karpathy file")
        sub.add_argument("--limit", type=int, default=0, help="pictures used, from the first on; 0: all")
        if name == "caption":
            sub.add_argument("--max-tokens", type=int, default=20)
    return parser.parse_args(words)


def run(flags: argparse.Namespace) -> None:
    """Carry out one command: print its numbers and write them as JSON."""
    if flags.command == "heldout":
        _heldout(flags)
        return
    from lcl_mcore.evaluation.loading import open_model

    opened = open_model(flags.model)
    result = {"classify": _classify, "zeroshot": _zeroshot, "retrieval": _retrieval, "caption": _caption}[
        flags.command
    ](flags, opened)
    out = flags.out or opened.folder / RESULTS / f"{result['task'].replace(', ', '-').replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "command": " ".join(sys.argv)}, indent=1) + "\n", encoding="utf-8")
    _print(result)
    print(out)


def _print(result: dict[str, Any], indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        else:
            print(
                f"{indent}{name:<18}{value:.4f}" if isinstance(value, float) else f"{indent}{name:<18}{value}"
            )


def _heldout(flags: argparse.Namespace) -> None:
    from lcl_mcore.evaluation.heldout import evaluate_run
    from lcl_mcore.evaluation.report import print_table, write_report
    from lcl_mcore.training.metrics import read_metrics

    result = evaluate_run(flags.model, flags.data)
    write_report(flags.model, result, read_metrics(flags.model / "metrics.jsonl"))
    print_table(result.summary)
    print(f"\nreport: {flags.model / 'report.html'}")


def _classify(flags: argparse.Namespace, opened: Any) -> dict[str, Any]:
    from lcl_mcore.evaluation.classify import classify

    given = {name: getattr(flags, name) for name, _ in _PROBE_FLAGS if getattr(flags, name) is not None}
    config = from_dict(ProbeConfig, {**given, "transfer": flags.transfer}, "command line")
    return classify(opened, Path(flags.data), config, baselines=not flags.no_baselines)


def _zeroshot(flags: argparse.Namespace, opened: Any) -> dict[str, Any]:
    from lcl_mcore.evaluation.zeroshot import zeroshot

    return zeroshot(opened, Path(flags.data), flags.classnames, flags.templates, flags.test_limit)


def _retrieval(flags: argparse.Namespace, opened: Any) -> dict[str, Any]:
    from lcl_mcore.evaluation.captioned import open_captioned, retrieval

    data = open_captioned(
        flags.data, flags.images, flags.split, flags.limit, opened.config.model.vision.image_size
    )
    return retrieval(opened, data)


def _caption(flags: argparse.Namespace, opened: Any) -> dict[str, Any]:
    from lcl_mcore.evaluation.caption import caption
    from lcl_mcore.evaluation.captioned import open_captioned

    data = open_captioned(
        flags.data, flags.images, flags.split, flags.limit, opened.config.model.vision.image_size
    )
    return caption(opened, data, flags.max_tokens)
