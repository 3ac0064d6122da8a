"""The documents of all sources behind one interface: sample n of stream v, tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lcl_mcore.config.base import require
from lcl_mcore.config.schema import DataConfig, Packing, SourceConfig
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
            raise DataError(explain("data.sources = []", "nothing to read", "Give at least one data set: --data PATH."))
        self._block = config.shuffle_block
        self.datasets = {
            source.label: NativeDataset(
                source.path, name=source.label, retries=config.read_retries, cache_mb=config.read_cache_mb
            )
            for source in config.sources
        }
        self._packings = [_packing(config, source, self.datasets[source.label]) for source in config.sources]
        self._tokenizers = [
            DocumentTokenizer(
                replace(source, packing=packing),
                tokenizer,
                tokens_per_image=tokens_per_image,
                sequence_length=config.sequence_length,
                seed=seed,
            )
            for source, packing in zip(config.sources, self._packings, strict=True)
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

    def documents_of(self, stream: int) -> StreamOfMixture:
        """The documents of one sample stream by their number in it."""
        return StreamOfMixture(self, self._order, tuple(self._packings), stream)

    def document(self, sample: SampleIndex, *, first_caption: bool = False) -> TokenizedDocument | None:
        """One document, tokenized; None if its source's settings skip it."""
        tokenizer = self._tokenizers[sample.source]
        dataset = self.datasets[tokenizer.label]
        stored, members = dataset.document(sample.index, block=self._block)
        return tokenizer.tokenize(sample, stored, members, first_caption=first_caption)

    def close(self) -> None:
        """Close all sources."""
        for dataset in self.datasets.values():
            dataset.close()


@dataclass(frozen=True)
class StreamOfMixture:
    """The documents of one sample stream (`packing.StreamDocuments`); `source_packings` has one entry per source."""

    mixture: Mixture
    order: DocumentOrder
    source_packings: tuple[Packing, ...]
    stream: int

    @property
    def packings(self) -> Sequence[Packing]:
        """Each packing once, in the order of the sources."""
        return tuple(dict.fromkeys(self.source_packings))

    def packing(self, n: int) -> Packing:
        """How document `n` is packed, without reading it."""
        return self.source_packings[self.order.source(self.stream, n)]

    def document(self, n: int) -> TokenizedDocument | None:
        """Document `n`; None if its source's settings skip it."""
        return self.mixture.document(self.order.sample(self.stream, n))


def _packing(config: DataConfig, source: SourceConfig, dataset: NativeDataset) -> Packing:
    """How a source's documents are packed; `by_kind` looks at its first document."""
    asked = source.packing or config.packing
    if asked != "by_kind":
        return asked
    windows = len(dataset) > 0 and dataset.document(0)[0].kind == "sequence"
    require(
        windows or source.long_documents != "split",
        f"data.sources: {source.label} has long_documents = split with data.packing = by_kind",
        "its documents are matched or pairs, which by_kind keeps whole",
        "Give the source packing = best_fit, or long_documents = cut.",
    )
    return "windows" if windows else "whole"
