"""What a run does about numbers that are not finite, loss spikes and slow ranks."""

from __future__ import annotations

from typing import Literal

from lcl_mcore.config.base import config_dataclass, require


@config_dataclass
class FaultConfig:
    """Policies; see docs/reliability.md. Batches are numbered from 0 in the order of the data."""

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """After a NaN or Inf, which never reaches the parameters. "stop": end the run; "skip": leave the batch out and go
    on; "rollback": go back to the newest checkpoint, then leave the batch out."""
    nonfinite_limit: int = 3
    """The run ends when this many batches in a row were not finite."""
    spike: Literal["off", "rollback"] = "off"
    """After a loss spike: go on, or go back to the newest checkpoint before it and leave its batches out (PaLM,
    arXiv:2204.02311 section 5.1)."""
    spike_deviations: float = 6.0
    """A loss is out of line when it exceeds its running mean by this many mean absolute deviations."""
    spike_steps: int = 3
    """That many losses in a row out of line are a spike."""
    spike_margin: int = 8
    """Batches before the first loss out of line that are left out too: the second moment is wrong up to 8 steps
    earlier (Wortsman et al., arXiv:2304.13013)."""
    spike_warmup: int = 100
    """Steps whose losses only build the statistics."""
    rollback_limit: int = 3
    """The run ends when it would go back more often than this without getting past the same step."""
    skip_batches: tuple[tuple[int, int], ...] = ()
    """Ranges [first, last] of batches that are read but never trained on."""
    straggler_ratio: float = 1.5
    """The slowest rank is named when its own time exceeds this many times the median of the others."""

    def __post_init__(self) -> None:
        for name in ("nonfinite_limit", "spike_steps", "spike_warmup", "rollback_limit"):
            value = getattr(self, name)
            require(value >= 1, f"faults.{name} = {value}", "must be at least 1", "Set it to 1 or more.")
        require(
            self.spike_margin >= 0,
            f"faults.spike_margin = {self.spike_margin}",
            "cannot be negative",
            "Use 0 to leave out nothing before the spike.",
        )
        require(
            self.spike_deviations > 0,
            f"faults.spike_deviations = {self.spike_deviations}",
            "must be positive",
            "The default is 6.",
        )
        require(
            self.straggler_ratio > 1,
            f"faults.straggler_ratio = {self.straggler_ratio}",
            "every rank would be a straggler",
            "The default is 1.5.",
        )
        for first, last in self.skip_batches:
            require(
                0 <= first <= last,
                f"faults.skip_batches holds [{first}, {last}]",
                "a range reads [first, last]",
                "Number the batches from 0.",
            )
