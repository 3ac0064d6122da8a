"""The loader in one process: the batch contract, independence of the layout, resume, refusals."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from corpora import SIDE, TOKENS_PER_IMAGE, config, make_dataset, open_loader, run_config, small_tokenizer
from lcl_mcore.batch import MicroBatch, StepBatch
from lcl_mcore.data import decode
from lcl_mcore.data.image_reader import ImageReader
from lcl_mcore.data.loader import DataContext, StepReader, build_loader
from lcl_mcore.errors import ConfigError, DataError

TOKENIZER = small_tokenizer()
P = TOKENS_PER_IMAGE
S = 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One data set of each kind."""
    base = tmp_path_factory.mktemp("sets")
    return [make_dataset(base / kind, kind, 60, seed=i) for i, kind in enumerate(["pair", "matched", "sequence"])]


def steps(data: Any, count: int, **more: Any) -> list[StepBatch]:
    loader = open_loader(data, **more)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def sequences_of(step: StepBatch) -> list[tuple[Any, ...]]:
    """Each sequence of a step with its images, independent of how they are grouped."""
    sequences = []
    for batch in step.micro_batches:
        for b in range(len(batch.sequence_keys)):
            mine = (batch.image_starts >= b * S) & (batch.image_starts < (b + 1) * S)
            context = (batch.context_positions >= b * S) & (batch.context_positions < (b + 1) * S)
            sequences.append(
                (
                    batch.tokens[b * S : (b + 1) * S].tolist(),
                    batch.positions[b * S : (b + 1) * S].tolist(),
                    int(batch.sequence_keys[b]),
                    batch.image_keys[mine].tolist(),
                    batch.images[mine].sum((1, 2, 3)).tolist(),
                    (batch.context_positions[context] - b * S).tolist(),
                    batch.group_ids[context].tolist(),
                )
            )
    return sequences


def check_contract(batch: MicroBatch) -> None:
    """Everything that `MicroBatch` promises, recomputed from tokens and segment lengths."""
    ids = TOKENIZER
    tokens = batch.tokens.tolist()
    assert sum(batch.lengths) == len(tokens) == len(batch.sequence_keys) * S
    targets, starts, contexts, place = [], [], [], 0
    for length in batch.lengths:
        segment = tokens[place : place + length]
        assert batch.positions[place : place + length].tolist() == list(range(length))
        assert place // S == (place + length - 1) // S
        seen_text = False
        for i, token in enumerate(segment):
            if token == ids.boi:
                starts.append(place + i + 1)
                assert segment[i + 1 : i + 1 + P] == [ids.image] * P
                assert segment[i + 1 + P] == ids.eoi
                if seen_text:
                    contexts.append(place + i)
            seen_text |= token < ids.text_size or token == ids.eoi
            if i and token not in (ids.image, ids.eoi, ids.pad, ids.bos):
                targets.append((place + i - 1, token))
        place += length
    assert batch.image_starts.tolist() == starts
    assert batch.context_positions.tolist() == contexts
    assert batch.image_starts[batch.context_images].tolist() == [place + 1 for place in contexts]
    assert list(zip(batch.target_positions.tolist(), batch.target_labels.tolist(), strict=True)) == targets
    assert batch.images.shape == (len(starts), 3, SIDE, SIDE)
    assert batch.images.dtype == torch.uint8
    assert len(set(batch.image_keys.tolist())) == len(starts)
    assert len(batch.group_ids) == len(contexts)


@pytest.mark.parametrize("packing", ["best_fit", "whole", "windows", "off", "by_kind"])
def test_batches_keep_the_contract(folders: list[Path], packing: str) -> None:
    for step in steps(config(*folders, packing=packing), 6):
        for batch in step.micro_batches:
            check_contract(batch)
        counts = step.counts
        assert counts.images == (sum(len(b.image_starts) for b in step.micro_batches),)
        assert counts.contexts == (sum(sum(c) for c in counts.micro_contexts),)
        assert counts.targets == (sum(len(b.target_positions) for b in step.micro_batches),)
        used = sum(int((b.tokens != TOKENIZER.pad).sum()) for b in step.micro_batches)
        assert counts.tokens == (used,)
        assert step.statistics["fill"] == pytest.approx(used / (8 * S))
        assert step.statistics["failed_images"] == 0


def test_order_does_not_depend_on_the_layout(folders: list[Path]) -> None:
    data = config(*folders, weights=(0.5, 0.3, 0.2))
    wanted = [sequences_of(step) for step in steps(data, 5)]
    assert [sequences_of(s) for s in steps(data, 5, micro_batch_size=8)] == wanted
    assert [sequences_of(s) for s in steps(config(*folders, weights=(0.5, 0.3, 0.2), decode_threads=1), 5)] == wanted
    other = config(*folders, weights=(0.5, 0.3, 0.2), prefetch_steps=5)
    assert [sequences_of(s) for s in steps(other, 5)] == wanted
    assert [sequences_of(s) for s in steps(data, 5, seed=6)] != wanted


@pytest.mark.parametrize("packing", ["best_fit", "whole", "windows", "off", "by_kind"])
def test_resume_continues_exactly(folders: list[Path], packing: str) -> None:
    data = config(*folders, packing=packing)
    whole = steps(data, 12)
    for k in (1, 4, 9):
        position = json.loads(json.dumps(whole[k - 1].position))
        rest = steps(data, 12 - k, position=position)
        assert [sequences_of(s) for s in rest] == [sequences_of(s) for s in whole[k:]]
        assert [s.order_hash for s in rest] == [s.order_hash for s in whole[k:]]
        assert rest[-1].position == whole[-1].position
    assert len(json.dumps(whole[-1].position)) < 4000


def test_little_python_stands_between_two_images(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds the interpreter's lock bounds a process, whatever its threads: calls of Python functions, counted.

    185 an image with its document when this was written, less than 0.2 ms of one core.
    """
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls[frame.f_code.co_qualname] += 1

    monkeypatch.setattr(decode, "resize", lambda *arguments: torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    reader = StepReader(run_config(config(folders[0], decode_threads=1)), DataContext(), TOKENIZER, None)
    try:
        threading.setprofile(count)
        reader.next_step()
        calls.clear()
        sys.setprofile(count)
        images = sum(sum(reader.next_step().counts.images) for _ in range(24))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        reader.close()
    assert images > 500
    assert calls["decode_one"] == images
    assert calls["NativeDataset.document"] < 1.05 * images  # each document is read once, not again when it is carried
    assert calls.total() < 200 * images, calls.most_common(20)


def test_the_next_step_is_planned_while_this_one_is_decoded(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an error on the way belongs to the step that was planned, not to the one that is whole."""
    events: list[str] = []
    plan, begin = StepReader._plan, ImageReader.begin

    def planned(self: StepReader) -> Any:
        events.append("plan")
        if events.count("plan") == 3:
            raise DataError("damaged")
        return plan(self)

    def begun(self: ImageReader, images: Any) -> Any:
        events.append("decode")
        finish = begin(self, images)
        return lambda: (events.append("wait"), finish())[1]

    monkeypatch.setattr(StepReader, "_plan", planned)
    monkeypatch.setattr(ImageReader, "begin", begun)
    reader = StepReader(run_config(config(*folders), micro_batch_size=4), DataContext(), TOKENIZER, None)
    try:
        assert [reader.next_step().number, reader.next_step().number] == [0, 1]
        assert events == ["plan", *["decode", "decode", "plan", "wait", "wait"] * 2]
        with pytest.raises(DataError, match=r"^damaged$"):
            reader.next_step()
    finally:
        reader.close()


def test_other_settings_are_refused_by_name(folders: list[Path], tmp_path: Path) -> None:
    position = steps(config(*folders), 2)[-1].position
    other_data = make_dataset(tmp_path / "pair", "pair", 61, seed=9)
    cases = [
        (config(*folders), {"seed": 6}, "seed was 5, is 6"),
        (config(*folders), {"global_batch_size": 4}, "global_batch_size was 8, is 4"),
        (config(*folders), {"patch_size": 18}, "tokens_per_image was 9, is 4"),
        (config(*folders, weights=(2, 1, 1)), {}, "sources.pair.weight was 1.0, is 2.0"),
        (config(*folders, sequence_length=256), {}, "sequence_length was 128, is 256"),
        (config(*folders, crop_scale=(0.5, 1.0)), {}, "crop_scale"),
        (config(*folders[:2]), {}, "sources.sequence was"),
        (config(other_data, *folders[1:]), {}, "sources.pair.fingerprint was"),
    ]
    for data, more, message in cases:
        with pytest.raises(DataError, match=message):
            steps(data, 1, position=position, **more)
    with pytest.raises(DataError, match="damaged"):
        steps(config(*folders), 1, position={**position, "states": [[1]] * 8})
    with pytest.raises(ConfigError) as uneven:
        build_loader(run_config(config(*folders)), DataContext(dp_size=3), TOKENIZER)
    assert str(uneven.value) == (
        "train.global_batch_size = 8 with 3 data-parallel ranks and train.micro_batch_size = 2: every rank runs the "
        "same number of whole micro-batches. Use a multiple of 6."
    )
    with pytest.raises(ValueError, match="must hold an image"):
        steps(config(*folders, sequence_length=10), 1)


def test_positions_keep_the_names_of_earlier_versions(folders: list[Path]) -> None:
    """Settings have other names today; what commit 02e64cf saved is still understood."""
    position = steps(config(*folders), 1)[-1].position
    settings = {"packing", "packing_rows", "min_fill", "balance_images", "sequence_length", "context_rule"}
    settings |= {"shuffle", "shuffle_block", "crop_scale", "crop_ratio", "seed", "global_batch_size"}
    settings |= {"tokens_per_image", "tokenizer", "ftfy", "sources", "source_order", "format"}
    assert set(position) == settings | {"decoder", "step", "order_hash", "states"}
    assert position["packing_rows"] == 8
    assert position["sources"]["pair"]["cut_rule"] == "pieces"


def test_released_variants_differ_as_documented(folders: list[Path]) -> None:
    released = config(folders[0], packing="off", context_rule="index0", source_options={"ends": "released"})
    for step in steps(released, 4):
        for batch in step.micro_batches:
            assert len(batch.documents) == len(batch.sequence_keys)
            for b in range(len(batch.sequence_keys)):
                tokens = batch.tokens[b * S : (b + 1) * S].tolist()
                text_first = tokens[0] == TOKENIZER.bos
                assert text_first or tokens[0] == TOKENIZER.boi
                assert (TOKENIZER.eos in tokens) == (not text_first)
                texts = sum(token < TOKENIZER.text_size for token in tokens)
                mine = (batch.target_positions >= b * S) & (batch.target_positions < (b + 1) * S)
                assert int(mine.sum()) == texts + 1  # <BoI> if the text is first, else the end token
                has_context = ((batch.context_positions >= b * S) & (batch.context_positions < (b + 1) * S)).any()
                assert bool(has_context) == text_first


def test_text_only_batches(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "sequence", "sequence", 40)
    for step in steps(config(folder, source_options={"max_images": 0}), 3):
        assert step.counts.images == (0,)
        assert step.micro_batches[0].images.shape == (0, 3, SIDE, SIDE)
        assert step.statistics["image_imbalance"] == 1.0
        check_contract(step.micro_batches[0])


def test_loader_stops_cleanly_and_repeats_its_error(folders: list[Path]) -> None:
    loader = open_loader(config(*folders))
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_attention_pairs_are_those_of_the_documents(tmp_path: Path) -> None:
    """The count that MFU uses: causal pairs within documents, without padding."""
    folder = make_dataset(tmp_path / "pairs")
    loader = open_loader(config(folder))
    try:
        for _ in range(3):
            step = next(loader)
            expected = 0
            for batch in step.micro_batches:
                start = 0
                for length in batch.lengths:
                    is_padding = bool((batch.tokens[start : start + length] == small_tokenizer().pad).all())
                    expected += 0 if is_padding else length * (length + 1) // 2
                    start += length
            assert step.counts.pairs == (expected,)
    finally:
        loader.close()
