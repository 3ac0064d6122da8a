"""How many documents and images were seen, kept and dropped, and why. Seen is kept plus dropped, always."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcl_mcore.untrusted import clean_text

SHOWN_REASONS = 3
EXAMPLE_CHARS = 200


@dataclass
class UnitCounts:
    """Documents, or the images they list: how many were seen and kept, and the dropped ones by reason.

    Attributes:
        examples: of each reason the first that was dropped.
    """

    seen: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Count units that are not kept."""
        if count:
            self.dropped[reason] += count
            self.examples.setdefault(reason, clean_text(example)[:EXAMPLE_CHARS])

    def require_complete(self, what: str) -> None:
        """Every unit is accounted for; a difference is a bug."""
        if self.seen != self.kept + self.dropped.total():
            raise AssertionError(f"{what}: {self.seen} seen, {self.kept} kept, {self.dropped.total()} dropped")

    def to_json(self, *, examples: bool = True) -> dict[str, Any]:
        """For records and manifests; reasons are sorted."""
        counts = {"seen": self.seen, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}
        return {**counts, "examples": dict(sorted(self.examples.items()))} if examples else counts

    @staticmethod
    def total(parts: Iterable[UnitCounts]) -> UnitCounts:
        """The sum; the first example of each reason."""
        result = UnitCounts()
        for part in parts:
            result.seen += part.seen
            result.kept += part.kept
            result.dropped.update(part.dropped)
            result.examples = {**part.examples, **result.examples}
        return result

    def explain(self, what: str) -> str:
        """One line: how many were dropped, with the most frequent reasons and an example of each."""
        shown = [
            f"{count} {reason} ({self.examples[reason]})" for reason, count in self.dropped.most_common(SHOWN_REASONS)
        ]
        others = len(self.dropped) - len(shown)
        more = f"; {others} more reasons in dataset.json" if others > 0 else ""
        return f"{what}: {self.dropped.total()} of {self.seen} dropped: {'; '.join(shown)}{more}"


def explain_drops(documents: UnitCounts, images: UnitCounts, image_root: Path | None) -> list[str]:
    """What was dropped and why, images first, which are often the cause; and where images were looked for."""
    lines = []
    if images.dropped:
        where = ""
        if image_root is not None:
            where = f". Images were looked for in {image_root}" + (
                "" if image_root.is_dir() else ", which is no folder"
            )
        lines.append(images.explain("images") + where)
    if documents.dropped:
        lines.append(documents.explain("documents"))
    return lines
