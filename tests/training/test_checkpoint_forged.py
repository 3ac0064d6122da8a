"""Manifests, states and metadata of any content: one line that says what is wrong, within bounds of memory.

A manifest is no signature. Whoever forges one can vouch for any metadata, and that must not get further either.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from checkpoint_toys import SHAPES, Run, values
from lcl_mcore.checkpoint.consolidate import consolidated_weights, list_checkpoints
from lcl_mcore.checkpoint.dcp import METADATA, SafeReader, read_boxes
from lcl_mcore.checkpoint.hashing import hash_of
from lcl_mcore.checkpoint.shards import TensorBox
from lcl_mcore.checkpoint.store import MANIFEST, manifest_bytes, parse_manifest, read_state, verify
from lcl_mcore.config.schema import CheckpointConfig
from lcl_mcore.errors import CheckpointError

MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
NUMBERS = st.one_of(
    st.sampled_from([-5, -1, 0, 1, 60, 2**31, 2**63, 10**30, 10**400, True]),
    st.sampled_from([math.nan, math.inf, 60.0, 1e300]),
)
JUNK = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=20), st.sampled_from(["60", "../x", "a\x00b", "\ud800", "step-1"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def good(groups: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints at steps 2 and 6."""
    folder = tmp_path_factory.mktemp("forged") / "run"
    run = Run(folder, CheckpointConfig(keep=9))
    for step in (2, 6):
        run.save(step, final=True)
    return folder


@pytest.fixture
def newest(good: Path, tmp_path: Path) -> Path:
    """The newer checkpoint of a copy."""
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run" / "step-00000006"


@st.composite
def changed_json(draw: Callable[..., Any], original: Any) -> Any:
    """A JSON value with one part replaced, removed or added."""
    parts: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            parts.append((value, key))
            collect(value[key])

    whole = [copy.deepcopy(original)]
    collect(whole)
    holder, key = draw(st.sampled_from(parts))
    action = draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove" and len(whole) > 1:
        del holder[key]
    elif action == "add" and isinstance(holder, dict):
        holder[draw(st.text(max_size=12))] = draw(JUNK)
    else:
        holder[key] = draw(JUNK)
    return whole[0]


def vouch(content: Any) -> Any:
    """With the digest of what it says, as far as it says anything."""
    if not isinstance(content, dict):
        return content
    rest = {name: value for name, value in content.items() if name != "digest"}
    return {**rest, "digest": hash_of([json.dumps(rest, sort_keys=True).encode()])}


@pytest.fixture(scope="module")
def checker(groups: Any, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes, str], None]:
    """Put content in place of a file of the newer checkpoint: it is refused in a line, and the older one used."""
    folder = tmp_path_factory.mktemp("checked") / "run"
    shutil.copytree(good, folder)
    path, run = folder / "step-00000006", Run(folder, CheckpointConfig(keep=9))

    def check(content: bytes, name: str) -> None:
        (path / name).write_bytes(content)
        problems = verify(path)
        assert all(problem.isprintable() and len(problem) < 600 for problem in problems), problems
        list_checkpoints(str(folder))
        run.lines.clear()
        state = run.manager.resume()
        assert state is not None
        assert run.holds(state.step)
        if problems:
            assert state.step == 2
            assert run.lines == [
                f"{path}: damaged, skipped: {'; '.join(sorted(set(problems))[:3])}",
                f"resume: {folder}/step-00000002, 2 steps done",
            ]

    return check


def test_manifests_of_any_content(good: Path, checker: Callable[[bytes, str], None]) -> None:
    original = json.loads((good / "step-00000006" / MANIFEST).read_bytes())

    @MANY
    @given(changed_json(original), st.booleans())
    def check(content: Any, vouched: bool) -> None:
        checker(json.dumps(vouch(content) if vouched else content).encode("utf-8", "surrogatepass"), MANIFEST)

    check()


def test_manifests_of_any_bytes(good: Path, checker: Callable[[bytes, str], None]) -> None:
    original = (good / "step-00000006" / MANIFEST).read_bytes()
    cut = st.integers(0, len(original))
    anything = st.one_of(
        st.binary(max_size=60),
        st.builds(lambda a, b, new: original[:a] + new + original[b:], cut, cut, st.binary(max_size=4)),
        st.sampled_from(
            [b"[" * 200_000, b'{"version":' * 50_000, b'"', b"\xef\xbb\xbf" + original, b"1" * 9000, b"NaN"]
        ),
        st.sampled_from([original.replace(b"{", b'{"run": "0", ', 1), original.decode().encode("utf-16"), b"\0" * 100]),
    )

    @MANY
    @given(anything)
    def check(content: bytes) -> None:
        checker(content, MANIFEST)

    check()


def test_states_of_any_content(newest: Path) -> None:
    """Vouched for by the manifest: read, or refused in a line."""
    original = json.loads((newest / "state.json").read_bytes())

    @MANY
    @given(changed_json(original))
    def check(content: Any) -> None:
        vouch_for(newest, "state.json", json.dumps(content).encode("utf-8", "surrogatepass"))
        state, refused = attempt(lambda: read_state(newest))
        if state is None:
            assert refused.startswith(f"{newest}/state.json: cannot be used: ")
            assert verify(newest) != []
        else:
            assert (type(state.step), state.step) == (int, 6)
            assert verify(newest) == []

    check()


def attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """What it returns, or why it refuses, in one line."""
    try:
        return action(), ""
    except CheckpointError as error:
        refused = str(error)
    assert refused.isprintable()
    assert len(refused) < 700
    return None, refused


def vouch_for(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and its entry in the manifest."""
    (checkpoint / name).write_bytes(content)
    manifest = parse_manifest((checkpoint / MANIFEST).read_bytes())
    manifest.files[name] = {"bytes": len(content), "hash": hash_of([content])}
    (checkpoint / MANIFEST).write_bytes(manifest_bytes(manifest))


WRONG = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=8),
    st.sampled_from([torch.float16, torch.Size([10**15]), torch.Size([-1]), (), [], {}, "../x", "/etc/passwd", 1j]),
    st.lists(NUMBERS, max_size=3),
)


@st.composite
def changed_metadata(draw: Callable[..., Any], original: Any) -> Any:
    """Metadata with one field of one of its objects replaced, or an entry removed."""
    metadata = pickle.loads(original)
    objects: list[tuple[Any, str]] = [(metadata, "state_dict_metadata"), (metadata, "storage_data")]
    for entry in metadata.state_dict_metadata.values():
        objects += [(entry, field) for field in ("properties", "size", "chunks")]
        objects += [(entry.properties, "dtype")]
        objects += [(chunk, field) for chunk in entry.chunks for field in ("offsets", "sizes")]
    for place in metadata.storage_data.values():
        objects += [(place, field) for field in ("relative_path", "offset", "length", "transform_descriptors")]
    holder, field = draw(st.sampled_from(objects))
    value = getattr(holder, field)
    action = draw(st.sampled_from(["replace", "inside", "key"]))
    if isinstance(value, dict) and action != "replace":
        key = draw(st.sampled_from(list(value)))
        entry = value.pop(key)
        wrong = draw(WRONG)
        if action == "inside":
            value[key] = wrong
        elif draw(st.booleans()):
            index = MetadataIndex(wrong) if isinstance(key, MetadataIndex) else wrong
            value[index if not isinstance(wrong, list | dict) else "other"] = entry
        return metadata
    if isinstance(value, list) and action == "inside" and value:
        value.append(value[0])  # a chunk twice
    else:
        object.__setattr__(holder, field, draw(WRONG))
    return metadata


def test_metadata_of_any_content(newest: Path) -> None:
    """Vouched for by the manifest: the values are the right ones, or it is refused in a line."""
    original = (newest / METADATA).read_bytes()

    @MANY
    @given(changed_metadata(original))
    def check(metadata: Any) -> None:
        vouch_for(newest, METADATA, pickle.dumps(metadata))
        boxes = [TensorBox(key, shape, (0,) * len(shape), torch.empty(shape)) for key, shape in SHAPES.items()]
        _, refused = attempt(lambda: (read_boxes(newest, boxes), consolidated_weights(newest)))
        assert refused or all(torch.equal(box.tensor, values(6)[box.key]) for box in boxes)

    check()


def test_tensors_cannot_claim_what_the_files_do_not_hold(newest: Path) -> None:
    """A tensor of a petabyte; a thousand tensors in the bytes of one."""
    metadata = pickle.loads((newest / METADATA).read_bytes())
    entry = metadata.state_dict_metadata["weights/b"]
    huge = copy.deepcopy(metadata)
    chunk = huge.state_dict_metadata["weights/b"].chunks[0]
    huge.state_dict_metadata["weights/b"] = replace(
        entry, size=torch.Size([1 << 48]), chunks=[replace(chunk, sizes=torch.Size([1 << 48]))]
    )
    many = copy.deepcopy(metadata)
    place = many.storage_data[MetadataIndex("weights/a", torch.Size([0, 0]))]
    for number in range(1000):
        name = f"weights/{number}"
        many.state_dict_metadata[name] = metadata.state_dict_metadata["weights/a"]
        many.storage_data[MetadataIndex(name, torch.Size([0, 0]))] = place
    for forged, problem in (
        (huge, "`weights/b` has a chunk without its bytes"),
        (many, "it refers twice to bytes of `__0_0.distcp`"),
    ):
        vouch_for(newest, METADATA, pickle.dumps(forged))
        assert verify(newest) == []
        with pytest.raises(CheckpointError, match=problem):
            consolidated_weights(newest)


@pytest.mark.parametrize("name", [MANIFEST, "state.json", METADATA])
def test_huge_files_are_not_read(newest: Path, name: str) -> None:
    """Three gigabytes of nothing: refused by its size, in memory of a megabyte."""
    with open(newest / name, "r+b") as file:
        file.truncate(3 << 30)
    read = {MANIFEST: verify, "state.json": read_state, METADATA: lambda path: SafeReader(path).read_metadata()}[name]
    limit = 67108864 if name == METADATA else 16777216
    tracemalloc.start()
    found, refused = attempt(lambda: read(newest))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"larger than {limit} bytes" in (refused or found[0])
    assert peak < 1_000_000


def test_millions_of_errors_are_counted_not_listed(newest: Path) -> None:
    files = ",".join(f'"{number}":1' for number in range(400_000))
    (newest / MANIFEST).write_text('{"version": 3, "files": {' + files + "}}")
    assert verify(newest) == ["manifest.json: unreadable (400004 wrong values)"]
    (newest / MANIFEST).write_text('{"version": 3, "files": {' + f"{files},{files}" + "}}")
    assert verify(newest) == ["manifest.json: unreadable (more than 524288 values)"]
