"""The saved position: small plain JSON that says where the run was and what it was reading."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.sample_stream import StreamState
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import DataError, explain

logger = logging.getLogger(__name__)
FORMAT = 1
# What changes which documents, tokens or crop windows come: a position fits only equal values.
SOURCE_RULES = (
    "weight",
    "min_similarity",
    "min_images",
    "max_images",
    "image_choice",
    "one_image_per_text",
    "image_first_probability",
    "max_text_tokens",
    "long_documents",
    "cut_rule",
    "ends",
)
PACKING_RULES = (
    "sequence_length",
    "packing",
    "packing_rows",
    "min_fill",
    "balance_images",
    "context_rule",
    "shuffle",
    "shuffle_block",
    "crop_scale",
    "crop_ratio",
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where to begin: `lanes` is empty at the very beginning."""

    step: int
    order_hash: str
    lanes: list[StreamState]


def describe_run(
    config: DataConfig, mix: Mixture, tokenizer: Tokenizer, tokens_per_image: int, lanes: int, seed: int
) -> dict[str, Any]:
    """What a position must have been saved with to be continued."""
    sources = {
        source.label: {
            "fingerprint": mix.datasets[source.label].fingerprint,
            "documents": len(mix.datasets[source.label]),
            **{name: getattr(source, name) for name in SOURCE_RULES},
        }
        for source in config.sources
    }
    description = {
        "format": FORMAT,
        "seed": seed,
        "global_batch_size": lanes,
        "tokens_per_image": tokens_per_image,
        "tokenizer": tokenizer.fingerprint,
        "sources": sources,
        "source_order": list(sources),
        **{name: getattr(config, name) for name in PACKING_RULES},
    }
    result: dict[str, Any] = json.loads(json.dumps(description))
    return result


def read_position(position: dict[str, Any] | None, run: dict[str, Any]) -> Start:
    """Check a saved position against this run; `DataError` names every difference."""
    if position is None:
        return Start(0, "", [])
    differences = _differences("", {name: position.get(name) for name in run}, run)
    if differences:
        raise DataError(
            explain(
                "saved data position",
                "was made with other data or settings: " + "; ".join(differences),
                "Resume with the former ones, or start a new run (weights can be kept, the order cannot).",
            )
        )
    try:
        lanes = [StreamState.from_list([int(value) for value in state]) for state in position["states"]]
        start = Start(int(position["step"]), str(position["order_hash"]), lanes)
    except (KeyError, TypeError, ValueError) as error:
        message = explain("saved data position", f"is damaged: {error}", "Use an older checkpoint.")
        raise DataError(message) from error
    if len(lanes) != run["global_batch_size"]:
        rule = f"has {len(lanes)} lane states for {run['global_batch_size']} rows"
        raise DataError(explain("saved data position", rule, "Use an older checkpoint."))
    return start


def note_decoder(position: dict[str, Any] | None, decoder: str) -> None:
    """Say so when images were decoded otherwise before: the order is the same, pixels differ slightly."""
    former = (position or {}).get("decoder", decoder)
    if former != decoder:
        logger.warning(
            "images were decoded by %r before and are by %r now: the same order and crops, pixels differ by "
            "less than one level of 255 on average; set data.decode_backend to keep the former",
            former,
            decoder,
        )


def _differences(path: str, saved: Any, now: Any) -> list[str]:
    """Readable list of the places where two nested values differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for name in sorted({*saved, *now})
            for line in _differences(f"{path}.{name}".lstrip("."), saved.get(name), now.get(name))
        ]
    return [] if saved == now else [f"{path} was {saved}, is {now}"]
