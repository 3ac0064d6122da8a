"""Evaluate a run, a checkpoint, or an imported model (`tools/evaluate.py`): one sub-command for each protocol.

Results are printed and written as JSON beside the run. See docs/evaluation.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from pydantic import NonNegativeInt, PositiveInt

from lcl_mcore.commands.entry import run_main
from lcl_mcore.config import arguments
from lcl_mcore.config.base import config_dataclass, require, to_dict
from lcl_mcore.config.evaluation import CaptionConfig, PairsConfig, ProbeConfig, RetrievalConfig
from lcl_mcore.errors import ConfigError, explain
from lcl_mcore.storage import atomic_write, require_writable
from lcl_mcore.untrusted import MAX_JSON_BYTES, BadJsonError, parse_object, read_regular

if TYPE_CHECKING:
    from lcl_mcore.evaluation.caption_data import CaptionDataset
    from lcl_mcore.evaluation.load import LoadedModel

Pairs = TypeVar("Pairs", bound=PairsConfig)


@config_dataclass
class HeldoutOptions:
    """Retrieval and generation loss on held-out documents, and report.html."""

    model: tyro.conf.Positional[Path]
    """Run, checkpoint of any layout, or folder with model.safetensors."""
    data: str
    """Prepared data set."""


@config_dataclass
class ClassifyOptions:
    """Image classification by transfer."""

    model: tyro.conf.Positional[Path]
    """Run, checkpoint of any layout, or folder with model.safetensors."""
    data: Path
    """ImageNet-like folders or tars, or IDX files."""
    out: Path | None = None
    """JSON file; by default RUN/results/NAME.json."""
    no_baselines: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip random initialisation and raw pixels."""
    probe: Annotated[ProbeConfig, tyro.conf.OmitArgPrefixes] = ProbeConfig()


@config_dataclass
class ZeroshotOptions:
    """Zero-shot classification with prompts."""

    model: tyro.conf.Positional[Path]
    """Run, checkpoint of any layout, or folder with model.safetensors."""
    data: Path
    """ImageNet-like folders or tars, or IDX files."""
    out: Path | None = None
    """JSON file; by default RUN/results/NAME.json."""
    classnames: Path | None = None
    """CLASS<tab>NAME lines in any order, or a name per line in the order of the classes; by default their own."""
    templates: Path | None = None
    """Prompts, one per line, {} or {c} for the name; by default four plain ones, which are no paper's."""
    test_limit: NonNegativeInt = 0
    """Images used; 0: all."""


@config_dataclass
class PairsOptions:
    """What retrieval and captioning have in common."""

    model: tyro.conf.Positional[Path]
    """Run, checkpoint of any layout, or folder with model.safetensors."""
    data: str
    """Karpathy or NoCaps JSON, or a prepared data set."""
    out: Path | None = None
    """JSON file; by default RUN/results/NAME.json."""
    images: Path | None = None
    """Folder of the images that the JSON names."""
    split: str | None = None
    """Split of a Karpathy file; by default test."""
    limit: NonNegativeInt = 0
    """Images used, from the first on; 0: all."""
    transfer: Literal["zeroshot", "frozen", "full"] | None = None
    """Train nothing, a head, or a head and the encoder; by default frozen with --train, else zeroshot."""
    train: str | None = None
    """Pairs that a head is trained on, like --data."""
    train_images: Path | None = None
    """Folder of their images; by default --images."""
    train_split: str | None = None
    """Split of a Karpathy file, such as train,restval; by default train."""
    no_baselines: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip untrained encoders and pixels."""


@config_dataclass
class RetrievalOptions(PairsOptions):
    """Image-text retrieval: TR@k and IR@k."""

    training: Annotated[RetrievalConfig, tyro.conf.OmitArgPrefixes] = RetrievalConfig()


@config_dataclass
class CaptionOptions(PairsOptions):
    """Captions: BLEU-4 and CIDEr."""

    max_tokens: PositiveInt = 20
    """Length of written captions."""
    training: Annotated[CaptionConfig, tyro.conf.OmitArgPrefixes] = CaptionConfig()


Options = HeldoutOptions | ClassifyOptions | ZeroshotOptions | RetrievalOptions | CaptionOptions
COMMANDS: dict[str, type[Options]] = {
    "heldout": HeldoutOptions,
    "classify": ClassifyOptions,
    "retrieval": RetrievalOptions,
    "caption": CaptionOptions,
    "zeroshot": ZeroshotOptions,
}


def parse_options(words: Sequence[str] | None = None) -> Options:
    """Read the command line; without a command it is `heldout`."""
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] not in COMMANDS and not words[0].startswith("-"):
        words.insert(0, "heldout")
    return arguments.parse_commands(COMMANDS, words, "Evaluate a run, a checkpoint, or an imported model.")


def main() -> int:
    """Parse the command line and carry out one command: print its numbers and write them as JSON."""
    options = parse_options()
    if not isinstance(options, HeldoutOptions) and options.out is not None:
        require_writable(options.out, "--out", file=True)
    if isinstance(options, PairsOptions):
        _check_image_folders(options)

    from lcl_mcore.evaluation.load import open_model

    loaded = open_model(options.model)
    if isinstance(options, HeldoutOptions):
        _heldout(options, loaded)
        return 0
    if isinstance(options, ClassifyOptions):
        result = _classify(options, loaded)
    elif isinstance(options, ZeroshotOptions):
        result = _zeroshot(options, loaded)
    elif isinstance(options, RetrievalOptions):
        result = _retrieval(options, loaded)
    else:
        result = _caption(options, loaded)
    result |= {
        "options": settings(options),
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
    }
    task = result["task"].replace(", ", "-").replace(" ", "-")
    out = options.out or free_name(loaded.results, task, result, ("weights", "options"))
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, json.dumps(result, indent=1) + "\n")
    hidden = {"options", "names", "warnings"}
    if "chosen probes" in result["task"]:
        from lcl_mcore.evaluation.classification import probe_table

        hidden |= {"trained", "random_init", "pixels"}
        print("\n".join(probe_table(result)))
    _print({name: value for name, value in result.items() if name not in hidden})
    for line in result.get("warnings", ()):
        print(f"warning: {line}")
    print(out)
    return 0


def _check_image_folders(options: PairsOptions) -> None:
    """Folders of images are there, and some file names images in them.

    Raises:
        ConfigError: no folder, or the data set it belongs to holds its images itself.
    """
    trained = [options.train] if options.train else []
    users = {
        "--images": (options.images, [options.data, *([] if options.train_images else trained)]),
        "--train-images": (options.train_images, trained),
    }
    for flag, (folder, data) in users.items():
        if folder is not None:
            require(folder.is_dir(), f"{flag} {folder}", "is no folder", "Check the path.")
            files = [path for path in data if not (Path(path) / "dataset.json").is_file()]
            rule = "only the images of a JSON file lie in a folder of their own"
            require(bool(files), f"{flag} {folder}", rule, "Leave it out for a prepared data set.")


def settings(options: Options) -> dict[str, Any]:
    """What was asked, as it stands in the result; where the result goes is no part of it."""
    return {name: value for name, value in to_dict(options).items() if name not in ("model", "out")}


def free_name(folder: Path, stem: str, result: dict[str, Any], question: Sequence[str]) -> Path:
    """STEM.json, or STEM-2.json and so on where a file holds the answer to another question.

    Args:
        question: names of the values that are equal when two results answer the same, of which the newer replaces.
    """
    for number in itertools.count(1):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            return path
        with contextlib.suppress(OSError, BadJsonError):  # no file, not JSON, or no object: not ours
            before = parse_object(read_regular(path, MAX_JSON_BYTES))
            if all(before.get(name) == result[name] for name in question):
                return path
    raise AssertionError("the numbers do not end")


def _print(result: dict[str, Any], indent: str = "") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for item in value:
                _print(item, indent + "  ")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{indent}{name:<18} {shown}")


def _heldout(options: HeldoutOptions, loaded: LoadedModel) -> None:
    from lcl_mcore.evaluation.heldout import evaluate_heldout
    from lcl_mcore.evaluation.heldout_report import CURVES, print_table, write_report
    from lcl_mcore.metrics import read_steps

    result = evaluate_heldout(loaded, options.data)
    path = free_name(loaded.folder, "report", result.summary, ("heldout",))
    write_report(path, result, read_steps(loaded.folder / "metrics.jsonl", CURVES))
    print_table(result.summary)
    print(f"\nreport: {path.with_suffix('.html')}")


def _classify(options: ClassifyOptions, loaded: LoadedModel) -> dict[str, Any]:
    from lcl_mcore.evaluation.classification import classify

    return classify(loaded, options.data, options.probe, baselines=not options.no_baselines)


def _zeroshot(options: ZeroshotOptions, loaded: LoadedModel) -> dict[str, Any]:
    from lcl_mcore.evaluation.zero_shot import zero_shot

    return zero_shot(loaded, options.data, options.classnames, options.templates, options.test_limit)


def _retrieval(options: RetrievalOptions, loaded: LoadedModel) -> dict[str, Any]:
    from lcl_mcore.evaluation.retrieval import retrieval_transfer, zero_shot_retrieval

    training = transfer_settings(options, options.training)
    if training is None:
        return zero_shot_retrieval(loaded, measured_pairs(options, loaded))
    train, test = both_pairs(options, loaded, training.train_limit)
    return retrieval_transfer(loaded, train, test, training, not options.no_baselines)


def _caption(options: CaptionOptions, loaded: LoadedModel) -> dict[str, Any]:
    from lcl_mcore.evaluation.captioning import caption_transfer, zero_shot_captions

    training = transfer_settings(options, options.training)
    if training is None:
        return zero_shot_captions(loaded, measured_pairs(options, loaded), options.max_tokens)
    train, test = both_pairs(options, loaded, training.train_limit)
    return caption_transfer(loaded, train, test, training, options.max_tokens, not options.no_baselines)


def transfer_settings(options: PairsOptions, training: Pairs) -> Pairs | None:
    """What the command line says about training on pairs; None for zero-shot.

    Raises:
        ConfigError: training without pairs, or the other way round.
    """
    transfer = options.transfer or ("frozen" if options.train else "zeroshot")
    if transfer != "zeroshot":
        if not options.train:
            raise ConfigError(
                explain(
                    f"--transfer {transfer} without --train",
                    "a head learns from pairs",
                    "Give --train: a prepared data set, Karpathy's or COCO-style JSON.",
                )
            )
        return dataclasses.replace(training, transfer=transfer)
    given = [f.name for f in dataclasses.fields(training) if getattr(training, f.name) != f.default]
    if options.train or given:
        what = "--train" if options.train else "--" + given[0].replace("_", "-")
        remedy = "Use --transfer frozen or full." if options.train else "Give --train, or leave it out."
        raise ConfigError(explain(f"{what} without a transfer", "zero-shot trains nothing", remedy))
    return None


def measured_pairs(options: PairsOptions, loaded: LoadedModel) -> CaptionDataset:
    """The pairs that are measured on."""
    from lcl_mcore.evaluation.caption_data import open_caption_dataset

    side = loaded.config.model.vision.image_size
    return open_caption_dataset(options.data, options.images, options.split, options.limit, side)


def both_pairs(options: PairsOptions, loaded: LoadedModel, limit: int) -> tuple[CaptionDataset, CaptionDataset]:
    """The pairs that are trained on, at most `limit` of them, and those that are measured on."""
    from lcl_mcore.evaluation.caption_data import open_caption_dataset
    from lcl_mcore.evaluation.transfer import require_disjoint

    assert options.train is not None
    side, images = loaded.config.model.vision.image_size, options.train_images or options.images
    train = open_caption_dataset(options.train, images, options.train_split, limit, side, default_split="train")
    test = measured_pairs(options, loaded)
    require_disjoint(train, test)
    return train, test


if __name__ == "__main__":
    run_main(main)
