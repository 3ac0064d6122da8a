"""Errors meant for the person at the terminal: each states the value, the rule and the remedy."""

from __future__ import annotations


class LclError(Exception):
    """Base of every error that the command line prints without a traceback."""

    exit_code = 2


class ConfigError(LclError, ValueError):
    """A setting, or a combination of settings, that is not supported."""


class DataError(LclError):
    """A data set that cannot be read or is not what its index says."""


class CheckpointError(LclError):
    """A checkpoint that is missing, incomplete, damaged, or does not fit this run."""


class LeaseError(LclError):
    """The folder of a run belongs to another process."""


class NonFiniteError(LclError):
    """A loss or gradient that is NaN or Inf; raised before the parameters change."""

    exit_code = 3


class PeerError(LclError):
    """Another rank is gone, hangs, or ended with an error of its own; this one cannot go on alone."""

    exit_code = 4


def printable(text: str, limit: int = 200) -> str:
    """What somebody else wrote, for a message: on one line, at most so long, with nothing that a terminal obeys."""
    whole = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return f"{whole[: limit - 3]}..." if len(text) > limit or len(whole) > limit else whole


def explain(value: object, rule: str, remedy: str) -> str:
    """Join the three parts every message has: what was given, what must hold, what to do."""
    return f"{_short(value, 600)}: {_short(rule, 1000)}. {remedy}"


def _short(value: object, length: int) -> str:
    """A message stays readable whatever stands in a file."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 60]} ... {text[-50:]}"
