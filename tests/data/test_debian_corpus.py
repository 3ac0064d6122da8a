"""Real pages with real images: scikit-image's documentation, fetched from Debian and never installed."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from lcl_mcore.commands.fetch_corpora import fetch
from lcl_mcore.config.schema import DataConfig, SourceConfig
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.inspection import Inspector
from lcl_mcore.data.prepare.engine import PrepareOptions, prepare
from lcl_mcore.data.prepare.html import HtmlReader
from lcl_mcore.data.tokenizer import train_bpe
from lcl_mcore.errors import DataError

pytestmark = pytest.mark.slow
KEPT = Path(__file__).resolve().parents[2] / "data" / "corpora"  # fetched once per checkout


@pytest.fixture(scope="module")
def pages() -> Path:
    """The package's files. Without a Debian mirror there is nothing to test."""
    try:
        return fetch("python-skimage-doc", KEPT)
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.timeout(600)
def test_pages_become_full_sequences(pages: Path, tmp_path: Path) -> None:
    """Nothing is lost without a reason, plain webdataset reads the result, and sequences of 2048 are full."""
    out = tmp_path / "native"
    manifest = prepare(HtmlReader(pages), out, PrepareOptions(max_repeats=30), workers=2, quiet=True)
    data = NativeDataset(str(out))
    documents = [data.document(i)[0] for i in range(len(data))]
    samples = list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))
    images = [
        content
        for sample in samples
        for name, content in sample.items()
        if name.split(".")[-1] in ("jpg", "png", "webp")
    ]
    hashes = {hashlib.sha256(content).hexdigest() for content in images}
    assert len(samples) == len(documents) == manifest["documents"] > 100
    assert len(images) == sum(len(document.images) for document in documents) == manifest["images"] > 500
    assert hashes == {image.sha256 for document in documents for image in document.images}
    for content in images[::10]:
        Image.open(io.BytesIO(content)).load()
    assert sum(manifest["dropped_images"].values()) > 0  # the logo on every page
    tokenizer = train_bpe((text for document in documents for text in document.texts), 2000)
    source = SourceConfig(path=str(out))
    inspector = Inspector(DataConfig(sequence_length=2048), source, tokenizer, tokens_per_image=196)
    statistics = inspector.statistics()
    inspector.close()
    data.close()
    assert statistics["fill"] >= 0.97
    assert statistics["images_used_per_document"]["max"] <= 6
