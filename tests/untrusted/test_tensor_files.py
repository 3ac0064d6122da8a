"""Weights that others wrote: refused with one sentence before a library spends memory or time on them."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcl_mcore.checkpoint.weights_file import is_consolidated, read_consolidated
from lcl_mcore.config.schema import VisionConfig
from lcl_mcore.errors import CheckpointError
from lcl_mcore.interop.init_from import read_encoder
from lcl_mcore.interop.released import read_released
from lcl_mcore.untrusted import require_shallow_pickle


def refusal(read: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    return str(caught.value).removeprefix(f"{path}: ")


def read_vit(path: Path) -> object:
    return read_encoder(path, VisionConfig())


def safetensors(header: bytes, content: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + content


def test_safetensors(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    whole = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    files = {
        "many": safetensors(json.dumps({str(i): empty for i in range(60_000)}).encode()),
        "long": (200 << 20).to_bytes(8, "little") + bytes(100),
        "cut": (50).to_bytes(8, "little") + bytes(10),
        "twice": safetensors(b'{"a":{},"a":{}}'),
        "deep": safetensors(b'{"a":' + b"[" * 100_000),
        "overlap": safetensors(json.dumps({"a": whole, "b": whole}).encode(), bytes(4)),
        "negative": safetensors(json.dumps({"a": {**whole, "data_offsets": [-4, 0]}}).encode(), bytes(4)),
        "longer": safetensors(json.dumps({"a": whole}).encode(), bytes(400)),
        "nowhere": safetensors(b'{"a":{"shape":[1]}}', bytes(4)),
        "huge": safetensors(json.dumps({"a": {**whole, "shape": [1 << 62, 1 << 62]}}).encode(), bytes(4)),
    }
    expected = {
        "many": "cannot be read (60000 tensors, at most 50000 are read). Check the path, or download it again.",
        "long": "cannot be read (a header of 209715200 bytes). Check the path, or download it again.",
        "cut": "cannot be read (a header of 50 bytes). Check the path, or download it again.",
        "twice": "cannot be read (a key stands twice in one object). Check the path, or download it again.",
        "longer": "cannot be read (469 bytes, its header describes 73). Check the path, or download it again.",
        "nowhere": "cannot be read (its header does not say where tensors lie). Check the path, or download it again.",
        "deep": "cannot be read (nested too deeply). Check the path, or download it again.",
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        assert not is_consolidated(path)
        for read in (read_consolidated, read_vit):
            message = refusal(read, path)
            assert message.startswith("cannot be read (")
            assert message == expected.get(name, message)
    os.mkfifo(tmp_path / "pipe")
    assert not is_consolidated(tmp_path / "pipe")
    for read in (read_consolidated, read_vit, read_released):
        assert refusal(read, tmp_path / "pipe") == (
            "cannot be read (not a regular file). Check the path, or download it again."
        )


def pt(pickled: bytes, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def test_files_of_torch_save(tmp_path: Path) -> None:
    deep = b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."
    stored = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, stored)
    sparse = io.BytesIO()
    torch.save({"a": torch.zeros(3).to_sparse()}, sparse)
    remedy = "Check the path, or download it again."
    files = {
        "deep": (pt(deep), f"cannot be read (a pickle nested more than 50 deep). {remedy}"),
        "bomb": (pt(bytes(1 << 20), compression=zipfile.ZIP_DEFLATED), f"cannot be read (it is compressed). {remedy}"),
        "legacy": (deep, f"cannot be read (it is no zip, as torch writes since version 1.6). {remedy}"),
        "damaged": (pt(b"\x80\x02a."), f"cannot be read (a damaged pickle (IndexError pop from empty list)). {remedy}"),
        "view": (
            stored.getvalue(),
            "a: has 4398046511104 bytes, of which 4 are stored. "
            "Give a checkpoint that the released training code wrote.",
        ),
        "sparse": (
            sparse.getvalue(),
            "a: is no plain tensor of numbers (torch.sparse_coo, torch.float32, cpu). "
            "Give a checkpoint that the released training code wrote.",
        ),
        "code": (pt(b"cos\nsystem\n(S'touch run'\ntR."), None),
    }
    for name, (content, expected) in files.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        message = refusal(read_released, path)
        if expected is None:
            assert "cannot be loaded as plain tensors" in message
        else:
            assert message == expected
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "good.pt")
    assert read_released(tmp_path / "good.pt")["a"].tolist() == [1, 1]


def test_pickles_of_plain_values_are_shallow() -> None:
    flat = {f"name {i}": (i, [i, (i, None)], {"x": i}) for i in range(5000)}
    for protocol in range(5):
        require_shallow_pickle(pickle.dumps(flat, protocol))
    nested: object = ()
    for _ in range(200):
        nested = (nested,)
    for protocol in range(5):
        with pytest.raises(ValueError, match="nested more than 50 deep"):
            require_shallow_pickle(pickle.dumps({"a": nested}, protocol))


def test_weights_without_positions_are_a_misfit(tmp_path: Path) -> None:
    """They were looked up before the names were compared."""
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "lcl_mcore full state 1"})
    assert is_consolidated(tmp_path)
    assert list(read_consolidated(tmp_path)) == ["x"]
