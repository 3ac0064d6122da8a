"""Rules per source: which documents count, which may be divided, and how packings share a stream."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import config, image_bytes, make_dataset, open_loader, small_tokenizer
from lcl_mcore.batch import StepBatch
from lcl_mcore.commands.pretrain import parse_options
from lcl_mcore.config.base import from_dict
from lcl_mcore.config.run_folder import read_config
from lcl_mcore.config.schema import DataConfig, Packing, SourceConfig
from lcl_mcore.data.format import Document, ImageEntry, Members, ShardWriter, write_manifest
from lcl_mcore.data.mixture import Mixture
from lcl_mcore.data.order import SampleIndex
from lcl_mcore.data.packing import SampleStream, Span
from lcl_mcore.data.prepare.normalise import entry_for
from lcl_mcore.data.tokenized import DocumentTokenizer, Segment, TokenizedDocument
from lcl_mcore.errors import ConfigError, DataError

TOKENIZER = small_tokenizer()
P, IMAGE, LENGTH = 9, 11, 128
Contents = list[int]  # tokens of each segment; 0: an image


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents of several packings in turn, as a mixture of sources gives them."""

    packings: Sequence[Packing]
    turns: Sequence[int]
    contents: Sequence[Contents]

    def packing(self, n: int) -> Packing:
        return self.packings[self.turns[n % len(self.turns)]]

    def document(self, n: int) -> TokenizedDocument | None:
        made, images, token = [], 0, 0
        for length in self.contents[n % len(self.contents)]:
            made.append(Segment(ids=tuple(range(token, token + length))) if length else Segment(image=images))
            images, token = images + (length == 0), token + length
        entries = tuple(ImageEntry(f"{i}.jpg", 9, 9, "jpg", "0" * 64, 9) for i in range(images))
        kind = "sequence" if self.packing(n) == "windows" else "matched"
        stored = Document(f"d{n}", kind, (), entries)  # type: ignore[arg-type]
        return TokenizedDocument(SampleIndex(0, 0, n), "s", stored, Members("x.tar", ()), tuple(made)) if made else None


def room_for(contents: Contents, packing: Packing) -> Contents:
    """What the tokenizer leaves of a document: whole ones fit a sequence."""
    if packing != "whole":
        return contents
    room, kept = LENGTH - 2, []
    for length in contents:
        room -= length or IMAGE
        if room < 0:
            break
        kept.append(length)
    return kept


CONTENTS = st.lists(st.one_of(st.just(0), st.integers(1, LENGTH - 2)), max_size=8)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Two or three packings, whose documents come in any fixed succession."""
    packings: list[Packing] = draw(st.permutations(["whole", "windows", "off", "best_fit"]))[: draw(st.integers(2, 3))]
    turns = draw(st.lists(st.sampled_from(range(len(packings))), max_size=6)) + list(range(len(packings)))
    contents = [room_for(draw(CONTENTS), packings[turns[n % len(turns)]]) for n in range(3 * len(turns))]
    for n, place in enumerate(turns):  # every packing has a document that is used
        contents[n] = contents[n] or room_for([7, 0], packings[place])
    return Stream(packings, turns, contents)


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(1, 40))
def test_every_packing_keeps_its_promise_and_resumes(documents: Stream, steps: int) -> None:
    """Each token and image once, in order; whole documents in one piece; equal progress; any state goes on."""
    options = DataConfig(sequence_length=LENGTH, packing_buffer=2)
    one = SampleStream(options, documents, P)
    spans: dict[int, list[Span]] = {}
    taken: dict[Packing, set[int]] = {packing: set() for packing in documents.packings}
    for _ in range(steps):
        again = SampleStream(options, documents, P, one.state)
        sequence = one.next_sequence()
        assert again.next_sequence() == sequence
        assert again.state == one.state
        assert sum(span.length for span in sequence) <= LENGTH
        packings = {documents.packing(span.n) for span in sequence}
        assert len(packings) == 1
        for span in sequence:
            spans.setdefault(span.n, []).append(span)
            taken[documents.packing(span.n)].add(span.n)
    for n, parts in spans.items():
        whole = documents.document(n)
        assert whole is not None
        ids = [i for part in parts for segment in part.segments for i in segment.ids]
        images = [segment.image for part in parts for segment in part.segments if segment.image >= 0]
        assert ids == list(range(len(ids)))
        assert images == list(range(len(images)))
        assert sum(part.begin for part in parts) == 1
        if parts[-1].end:
            assert (ids, images) == (
                [i for segment in whole.segments for i in segment.ids],
                [segment.image for segment in whole.segments if segment.image >= 0],
            )
        if documents.packing(n) == "whole":
            assert len(parts) == 1
            assert parts[0].begin
            assert parts[0].end


def test_documents_come_as_often_as_the_mixture_says() -> None:
    """A packing whose documents are long gives more sequences, not fewer documents."""
    documents = Stream(("whole", "windows"), (0, 1), ([20, 0], [LENGTH, 0, LENGTH, LENGTH, 0]))
    one = SampleStream(DataConfig(sequence_length=LENGTH), documents, P)
    ends: Counter[Packing] = Counter()
    sequences: Counter[Packing] = Counter()
    for _ in range(2000):
        sequence = one.next_sequence()
        sequences[documents.packing(sequence[0].n)] += 1
        ends.update(documents.packing(span.n) for span in sequence if span.end)
    assert sequences["windows"] > 9 * sequences["whole"]
    assert abs(ends["whole"] - ends["windows"]) < 40  # no more than a packing buffer of short documents apart
    assert len(one.state) < 120


def test_the_order_of_several_packings_stays() -> None:
    """Saved positions would otherwise go on with other sequences; computed when `whole` came."""
    rng = random.Random(4)
    contents = [[rng.choice([0, rng.randint(1, 40)]) for _ in range(rng.randint(1, 7))] for _ in range(97)]
    contents = [room_for(document, "whole") for document in contents]
    one = SampleStream(
        DataConfig(sequence_length=LENGTH), Stream(("whole", "windows", "best_fit"), (0, 1, 0, 2), contents), P
    )
    packed = [[(s.n, s.first_segment, s.offset, s.length) for s in one.next_sequence()] for _ in range(80)]
    digest = hashlib.sha256(repr((packed, one.state)).encode()).hexdigest()
    assert digest[:16] == "0d6acd19f259ba27"


TEXTS = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(st.tuples(st.integers(0, 11), st.floats(0.2, 0.3)), max_size=9), st.integers(0, 5), st.data())
def test_images_keep_their_sentence_and_are_counted_after_cutting(
    texts: list[int], images: list[tuple[int, float]], n: int, data: st.DataObject
) -> None:
    """Of a document that stays whole: an image stands beside its sentence, and `min_images` counts what is left."""
    least = data.draw(st.integers(0, 4))
    entries = tuple(
        ImageEntry(f"{i}.jpg", 80, 80, "jpg", "0" * 64, 9, min(text, len(texts) - 1), similarity)
        for i, (text, similarity) in enumerate(images)
    )
    words = " ".join(f"{i} cat" for i in range(400)).split()
    stored = Document("k", "matched", tuple(" ".join(words[:count]) for count in texts), entries)

    def tokenize(min_images: int) -> TokenizedDocument | None:
        source = SourceConfig(path="x", packing="whole", min_images=min_images)
        maker = DocumentTokenizer(source, TOKENIZER, tokens_per_image=P, sequence_length=LENGTH, seed=1)
        return maker.tokenize(SampleIndex(0, 0, n), stored, Members("s.tar", ()))

    document = tokenize(0)
    shown = [segment.image for segment in document.segments] if document else []
    left = sum(image >= 0 for image in shown)
    assert (tokenize(least) is not None) == (document is not None and left >= least)
    if document is None:
        return
    assert sum(segment.length(IMAGE) for segment in document.segments) <= LENGTH - 2
    # Texts of no tokens have no segment; a longer one than a sequence has several.
    pieces = [
        place for place, count in enumerate(texts) for _ in range(-(-len(token_ids(stored, place)) // (LENGTH - 2)))
    ]
    order = iter(pieces)
    places = [entries[image].text_index if image >= 0 else next(order) for image in shown]
    assert places == sorted(places)
    for image, place in zip(shown, places, strict=True):
        if image >= 0 and texts[place]:
            assert any(other < 0 and where == place for other, where in zip(shown, places, strict=True))


def token_ids(stored: Document, place: int) -> list[int]:
    text = stored.texts[place]
    return TOKENIZER.encode(f" {text}" if place and text else text)


def corpus(folder: Path, kind: str, images: Sequence[int]) -> Path:
    """A data set whose documents have so many images, of one short sentence each and a long one at the end."""
    folder.mkdir()
    writer = ShardWriter(folder / "shard-000.tar")
    for number, count in enumerate(images):
        contents = [image_bytes(number * 10 + k, 40, 40) for k in range(count)]
        entries = tuple(entry_for(k, (c, "jpg", 40, 40), k, 0.3) for k, c in enumerate(contents))
        texts = (*["red cat"] * max(count, 1), "large green house. " * 30)
        writer.add(Document(f"doc-{number:04d}", kind, texts, entries), contents)  # type: ignore[arg-type]
    write_manifest(folder, [writer.close()])
    return folder


def used_documents(data: DataConfig, count: int) -> set[int]:
    mixture = Mixture(data, TOKENIZER, P)
    try:
        return {n for n in range(count) if mixture.document(SampleIndex(0, 0, n)) is not None}
    finally:
        mixture.close()


@pytest.mark.parametrize("recipe", ["paper-l14", "paper-b16", "large-h14"])
@pytest.mark.parametrize(("kind", "packing"), [("matched", "whole"), ("sequence", "windows")])
def test_the_paper_trains_on_documents_with_images(tmp_path: Path, recipe: str, kind: str, packing: str) -> None:
    """51 of 140 documents have no image: exactly the other 89 are used, and packed as the kind asks for."""
    rng = random.Random(3)
    images = rng.sample([0] * 51 + [1 + i % 4 for i in range(89)], 140)
    folder = corpus(tmp_path / "set", kind, images)
    run = parse_options(["--recipe", recipe, "--data", str(folder)]).run
    data = dataclasses.replace(run.data, sequence_length=LENGTH, shuffle=False)
    wanted = {n for n, count in enumerate(images) if count}
    assert len(wanted) == 89
    assert used_documents(data, 140) == wanted
    mixture = Mixture(data, TOKENIZER, P)
    assert mixture.documents_of(0).packings == (packing,)
    mixture.close()


def test_images_lost_to_the_cut_do_not_count(tmp_path: Path) -> None:
    """As in the released loader: a document whose only image lies behind the cut has none."""
    folder = corpus(tmp_path / "set", "matched", [1, 1])
    long = corpus(tmp_path / "long", "matched", [1])
    writer = ShardWriter(long / "shard-000.tar")
    content = image_bytes(5, 40, 40)
    texts = ("large green house. " * 40, "red cat")
    writer.add(Document("late", "matched", texts, (entry_for(0, (content, "jpg", 40, 40), 1, 0.3),)), [content])
    write_manifest(long, [writer.close()])
    for packing in ("whole", "best_fit", "off"):
        for rule in ("segments", "tokens"):
            options = {"min_images": 1, "cut_rule": rule}
            data = config(folder, packing=packing, source_options=options)
            assert used_documents(data, 2) == {0, 1}
            assert used_documents(config(long, packing=packing, source_options=options), 1) == set()
            options["min_images"] = 0
            assert used_documents(config(long, packing=packing, source_options=options), 1) == {0}


def test_sources_of_a_file_have_the_options_of_its_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("recipe: paper-b16\ndata: {sources: [{path: a}, {path: b, min_images: 0, packing: off}]}")
    with pytest.raises(ConfigError, match="YAML reads on and off as true and false: put the word in quotes"):
        read_config(file)
    file.write_text("recipe: paper-b16\ndata: {sources: [{path: a}, {path: b, min_images: 0, packing: windows}]}")
    assert [(s.min_images, s.packing) for s in read_config(file).data.sources] == [(1, None), (0, "windows")]
    words = ["--recipe", "paper-b16", "--set", "data.sources=[{path: a, packing: whole}, {path: b, weight: 2}]"]
    sources = parse_options(words).run.data.sources
    assert [(s.min_images, s.packing, s.weight) for s in sources] == [(1, "whole", 1.0), (1, None, 2.0)]


def test_whole_documents_do_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(DataConfig, {"sources": [{"path": "x", "packing": "whole", "long_documents": "split"}]})
    assert str(caught.value) == (
        "data.sources: x has long_documents = split with data.packing = whole: a document is whole, or it goes on in "
        "another sequence. Use packing = best_fit, or long_documents = cut."
    )
    folder = corpus(tmp_path / "x", "matched", [1])
    with pytest.raises(ConfigError) as caught:
        used_documents(config(folder, packing="by_kind", source_options={"long_documents": "split"}), 1)
    assert str(caught.value) == (
        "data.sources: x has long_documents = split with data.packing = by_kind: its documents are matched or pairs, "
        "which by_kind keeps whole. Give the source packing = best_fit, or long_documents = cut."
    )


def test_positions_of_earlier_versions_fit_where_nothing_changed(tmp_path: Path) -> None:
    """They have neither packings of sources nor how images were counted; only a rule that is another now is refused."""

    def first_steps(data: DataConfig, position: dict[str, Any] | None = None) -> list[StepBatch]:
        loader = open_loader(data, position)
        try:
            return [next(loader) for _ in range(4)]
        finally:
            loader.close()

    data = config(make_dataset(tmp_path / "matched", "matched", 40))
    steps = first_steps(data)
    old = json.loads(json.dumps(steps[1].position))
    assert old.pop("ftfy") is None
    assert [old["sources"]["matched"].pop(name) for name in ("packing", "images_counted")] == [None, None]
    assert [step.order_hash for step in first_steps(data, old)[:2]] == [step.order_hash for step in steps[2:]]
    counted = dataclasses.replace(data, sources=(dataclasses.replace(data.sources[0], min_images=1),))
    old["sources"]["matched"]["min_images"] = 1
    with pytest.raises(DataError) as caught:
        first_steps(counted, old)
    assert str(caught.value) == (
        "saved data position: was made with other data or settings: sources.matched.images_counted was None, is after "
        "cutting. Resume with the former ones, or start a new run (weights can be kept, the order cannot)."
    )


def test_a_source_without_documents_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    write_manifest(folder, [])
    with pytest.raises(DataError, match="source none: holds no documents"):
        used_documents(config(folder, packing="by_kind"), 0)


def test_each_source_is_packed_as_it_says(tmp_path: Path) -> None:
    """A mixture of MMC4 that is never divided and OBELICS in windows: through the loader, with resume."""
    folders = [
        make_dataset(tmp_path / kind, kind, 40, seed=i) for i, kind in enumerate(["matched", "sequence", "pair"])
    ]
    data = config(*folders, packing="off")
    packings: list[Packing | None] = ["whole", "windows", None]
    sources = tuple(dataclasses.replace(s, packing=p) for s, p in zip(data.sources, packings, strict=True))
    data = dataclasses.replace(data, sources=sources)
    loader = open_loader(data)
    steps = [next(loader) for _ in range(10)]
    loader.close()
    resumed = open_loader(data, steps[3].position)
    assert [next(resumed).order_hash for _ in range(6)] == [step.order_hash for step in steps[4:]]
    resumed.close()
    for step in steps:
        for batch in step.micro_batches:
            tokens = batch.tokens.view(-1, LENGTH).tolist()
            for sequence in tokens:
                used = [token for token in sequence if token != TOKENIZER.pad]
                assert used[0] == TOKENIZER.bos or used.count(TOKENIZER.bos) <= used.count(TOKENIZER.eos) + 1
    assert steps[-1].position["sources"]["matched"]["packing"] == "whole"
    other = dataclasses.replace(sources[0], packing="best_fit")
    with pytest.raises(Exception, match=r"sources\.matched\.packing was whole, is best_fit"):
        open_loader(dataclasses.replace(data, sources=(other, *sources[1:])), steps[3].position)
