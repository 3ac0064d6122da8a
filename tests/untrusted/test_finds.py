"""What `campaigns/fuzz.py` found, each once more."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lcl_mcore.config.run_folder import read_config
from lcl_mcore.data.format import ShardInfo, fingerprint, listed_shards
from lcl_mcore.data.prepare.tar import EndMark, TarMember, walk
from lcl_mcore.errors import ConfigError, DataError, explain
from lcl_mcore.json_lines import Records, read_records
from lcl_mcore.storage import LocalStorage
from lcl_mcore.untrusted import open_regular

SHARD = ShardInfo("a.tar", 1, 1, 2, 2048, "0")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("documents", {"a": 1}, "shards.0.documents: Input should be a valid integer"),
        ("members", -1, "shards.0.members: Input should be greater than or equal to 0"),
        ("bytes", 1 << 70, "shards.0.bytes: Input should be less than 281474976710656"),
        ("images", True, "shards.0.images: Input should be a valid integer"),
        ("file", None, "shards.0.file: Input should be a valid string"),
        ("more", 1, "shards.0.more: Unexpected keyword argument"),
    ],
)
def test_lists_of_shards_are_typed(field: str, value: object, rule: str) -> None:
    entry = {**SHARD.__dict__, field: value}
    manifest: dict[str, Any] = {"format": "lcl-native", "version": 1, "shards": [entry]}
    with pytest.raises(DataError) as caught:
        listed_shards("x", manifest)
    assert str(caught.value) == f"x: is damaged: {rule}. Prepare the data set again."
    manifest |= {"shards": [SHARD.__dict__], "fingerprint": fingerprint([SHARD])}
    assert listed_shards("x", json.loads(json.dumps(manifest))) == [SHARD]


def test_a_recipe_that_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: [demo]\n")
    with pytest.raises(ConfigError, match=r"recipe = \['demo'\]: must be text"):
        read_config(tmp_path / "config.yaml")


def test_messages_are_of_bounded_length() -> None:
    message = explain("v" * 9000, "r" * 9000, "Remedy.")
    assert len(message) < 1700
    assert message.endswith("Remedy.")
    assert " ... " in message


def test_what_a_sparse_file_does_not_hold_takes_no_time(tmp_path: Path) -> None:
    """A terabyte of zeros behind a tar; and another tar behind some of them, which is found."""
    member = b"a.txt".ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"00000000003\0" + b"0" * 11 + b"\0"
    header = member.ljust(512, b"\0")
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    header = header[:148] + f"{total:06o}\0 ".encode() + header[156:]
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(header + b"abc".ljust(512, b"\0"))
        file.seek(1 << 36)
        file.write(header + b"xyz".ljust(512, b"\0"))
        file.truncate(1 << 40)
    begun = time.process_time()
    with open_regular(path) as stream:
        found = list(walk(stream, lambda name, size: True))
    assert [item.content for item in found if isinstance(item, TarMember)] == [b"abc", b"xyz"]
    assert sum(isinstance(item, EndMark) for item in found) == 2
    assert time.process_time() - begun < 5


def test_a_side_file_of_a_terabyte_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    assert read_records(path, lambda record: True) == Records([{"step": 1}], 0)
    os.truncate(path, 1 << 40)
    assert read_records(path, lambda record: True) == Records([], 0)


def test_stored_files_are_regular(tmp_path: Path) -> None:
    """A pipe in the place of a manifest or shard stopped the program until somebody wrote to it."""
    os.mkfifo(tmp_path / "pipe")
    storage = LocalStorage(tmp_path)
    for read in (lambda: storage.read_whole("pipe"), lambda: storage.read("pipe", 0, 1)):
        with pytest.raises(DataError, match="cannot be read: not a regular file"):
            read()
