"""A run's inputs, looked at in its first seconds: before torch is imported and any process waits for another."""

from __future__ import annotations

from lcl_mcore.config.schema import RunConfig
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.tokenizer import tokenizer_for
from lcl_mcore.errors import DataError, explain


def check_inputs(config: RunConfig) -> None:
    """Read the vocabulary, and open and close every data set that the run will read, the held-out one included.

    Raises:
        ConfigError: the vocabulary does not fit the model.
        DataError: there is nothing to train on, or something cannot be read or is damaged.
    """
    tokenizer_for(config)
    data, heldout = config.data, config.evaluation
    if not data.sources:
        raise DataError(explain("data.sources = []", "nothing to read", "Give at least one data set: --data PATH."))
    for path in [*(source.path for source in data.sources), *([heldout.data] if heldout.every else [])]:
        NativeDataset(path, retries=data.read_retries).close()
