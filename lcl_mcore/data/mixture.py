"""The documents of all sources behind one interface: draw n of lane v, laid out."""

from __future__ import annotations

from collections.abc import Callable

from lcl_mcore.config.schema import DataConfig
from lcl_mcore.data.dataset import NativeDataset
from lcl_mcore.data.order import DocumentOrder, SampleIndex
from lcl_mcore.data.tokenized import Layout, TokenizedDocument
from lcl_mcore.data.tokenizer import Tokenizer
from lcl_mcore.errors import DataError, explain


class Mixture:
    """Weighted sources, opened; safe to use from several threads."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, tokens_per_image: int, lanes: int, seed: int
    ) -> None:
        if not config.sources:
            raise DataError(explain("data.sources = []", "nothing to read", "Give at least one data set."))
        self.block = config.shuffle_block
        self.datasets = {
            source.label: NativeDataset(
                source.path, name=source.label, retries=config.read_retries, cache_mb=config.read_cache_mb
            )
            for source in config.sources
        }
        self.layouts = [
            Layout(
                source, tokenizer, image_tokens=tokens_per_image, row_tokens=config.sequence_length, seed=seed
            )
            for source in config.sources
        ]
        self.order = DocumentOrder(
            [len(dataset) for dataset in self.datasets.values()],
            [source.weight for source in config.sources],
            list(self.datasets),
            lanes=lanes,
            seed=seed,
            shuffle=config.shuffle,
            block=config.shuffle_block,
        )

    @property
    def remote(self) -> bool:
        """Whether any source lies in an object store."""
        return any(dataset.storage.remote for dataset in self.datasets.values())

    def lane(self, lane: int) -> Callable[[int], TokenizedDocument | None]:
        """The documents of one lane by number of the draw."""
        return lambda n: self.document(self.order.draw(lane, n))

    def document(self, draw: SampleIndex, *, first_caption: bool = False) -> TokenizedDocument | None:
        """One document, laid out; None if its source's settings leave it out."""
        layout = self.layouts[draw.source]
        dataset = self.datasets[layout.source.label]
        document, members = dataset.document(draw.index, block=self.block)
        return layout.lay(draw, document, members, first_caption=first_caption)

    def close(self) -> None:
        """Close all sources."""
        for dataset in self.datasets.values():
            dataset.close()
