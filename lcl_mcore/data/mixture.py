"""The documents of all sources behind one interface: sample n of stream v, tokenized."""

from __future__ import annotations

from collections.abc import Callable

from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.order import DocumentOrder, SampleIndex
from lcl_mcore.data.tokenized import DocumentTokenizer, TokenizedDocument
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import DataError, explain


class Mixture:
    """Weighted sources, opened; safe to use from several threads.

    Args:
        config: sources, their weights and rules, shuffling, storage.
        tokenizer: for their texts.
        tokens_per_image: LM positions of an image without its markers.
        streams: number of sample streams.
        seed: keys order and choices.

    Raises:
        DataError: there is no source, or one cannot be read or is damaged.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, tokens_per_image: int, *, streams: int = 1, seed: int = 0
    ) -> None:
        if not config.sources:
            raise DataError(explain("data.sources = []", "nothing to read", "Give at least one data set."))
        self._block = config.shuffle_block
        self.datasets = {
            source.label: NativeDataset(
                source.path, name=source.label, retries=config.read_retries, cache_mb=config.read_cache_mb
            )
            for source in config.sources
        }
        self._tokenizers = [
            DocumentTokenizer(
                source, tokenizer, tokens_per_image=tokens_per_image, sequence_length=config.sequence_length, seed=seed
            )
            for source in config.sources
        ]
        self._order = DocumentOrder(
            [len(dataset) for dataset in self.datasets.values()],
            [source.weight for source in config.sources],
            list(self.datasets),
            streams=streams,
            seed=seed,
            shuffle=config.shuffle,
            block=config.shuffle_block,
        )

    @property
    def remote(self) -> bool:
        """Whether any source lies in an object store."""
        return any(dataset.storage.remote for dataset in self.datasets.values())

    def documents_of(self, stream: int) -> Callable[[int], TokenizedDocument | None]:
        """The documents of one sample stream by their number in it."""
        return lambda n: self.document(self._order.sample(stream, n))

    def document(self, sample: SampleIndex, *, first_caption: bool = False) -> TokenizedDocument | None:
        """One document, tokenized; None if its source's settings skip it."""
        tokenizer = self._tokenizers[sample.source]
        dataset = self.datasets[tokenizer.source.label]
        stored, members = dataset.document(sample.index, block=self._block)
        return tokenizer.tokenize(sample, stored, members, first_caption=first_caption)

    def close(self) -> None:
        """Close all sources."""
        for dataset in self.datasets.values():
            dataset.close()
