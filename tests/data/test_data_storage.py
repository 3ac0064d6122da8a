"""Object stores over a real S3 protocol server that dies and comes back; a hundred million documents."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from corpora import config, make_dataset, open_loader
from lcl_mcore.data.format import NativeDataset, ShardInfo, index_name, write_manifest
from lcl_mcore.data.order import DocumentOrder
from lcl_mcore.errors import DataError
from lcl_mcore.storage import ByteCache, LocalStorage, RemoteStorage, open_storage


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class S3Server:
    """moto's server in a process of its own, with a folder uploaded as bucket `data`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        import boto3

        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    break
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.1)
        client = boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        client.create_bucket(Bucket="data")
        for path in self.folder.iterdir():
            client.upload_file(str(path), "data", f"{self.folder.name}/{path.name}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_loader_over_s3_survives_a_server_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in [
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ]:
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(RemoteStorage, "LONGEST_PAUSE", 0.5)
    folder = make_dataset(tmp_path / "set", "pair", 60)
    server = S3Server(folder)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.start()
    local = open_loader(config(folder, shuffle_block=5))
    remote_config = config(folder, shuffle_block=5, read_retries=100, prefetch_steps=1, read_cache_mb=1)
    source = remote_config.sources[0].__class__(path="s3://data/set", name="set")
    remote = open_loader(replace(remote_config, sources=(source,)))
    restart = threading.Timer(2.0, server.start)
    try:
        for step in range(8):
            wanted, got = next(local), next(remote)
            assert wanted.order_hash == got.order_hash
            for a, b in zip(wanted.micro_batches, got.micro_batches, strict=True):
                assert bool((a.images == b.images).all())
                assert bool((a.tokens == b.tokens).all())
            if step == 2:
                server.kill()
                restart.start()
    finally:
        restart.join()
        local.close()
        remote.close()
        server.kill()


def test_unreachable_store_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteStorage, "FIRST_PAUSE", 0.01)
    storage = RemoteStorage("memory://nowhere/set", retries=2, cache_bytes=1 << 20)
    with pytest.raises(DataError, match=r"nowhere/set/dataset\.json: cannot be read"):
        storage.read_whole("dataset.json")


def test_failing_requests_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteStorage, "FIRST_PAUSE", 0.01)
    storage = RemoteStorage("memory://bucket/set", retries=3, cache_bytes=1 << 20)
    storage._system.pipe_file("/bucket/set/x.tar", b"0123456789")
    calls = []

    def flaky(path: str, start: int | None = None, end: int | None = None) -> bytes:
        calls.append((start, end))
        if len(calls) < 3:
            raise ConnectionResetError("reset by peer")
        return b"0123456789"[start:end]

    monkeypatch.setattr(storage._system, "cat_file", flaky)
    assert storage.read("x.tar", 2, 5) == b"23456"
    assert calls == [(2, 7)] * 3
    storage.read_ahead("x.tar", 0, 10)
    assert storage.read("x.tar", 3, 2) == b"34"
    assert len(calls) == 4
    with pytest.raises(DataError, match="ends 7 bytes too early"):
        storage.read("x.tar", 8, 9)


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([b"012", b"0123456789abc", b"0123456789"], ""),
        ([b"012"] * 3, "x.tar: ends 7 bytes too early (wanted 10 bytes from 0): the file is damaged"),
        ([b"0123456789abc"] * 3, "x.tar: 13 bytes came for the 10 from 0. Use a server that answers range requests."),
    ],
)
def test_answers_of_another_length_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, answers: list[bytes], problem: str
) -> None:
    monkeypatch.setattr(RemoteStorage, "FIRST_PAUSE", 0.01)
    storage = RemoteStorage("memory://bucket/set", retries=2, cache_bytes=1 << 20)
    storage.write("x.tar", b"0123456789")
    for read in (lambda: storage.read("x.tar", 0, 10), lambda: storage.read_whole("x.tar")):
        left = iter(answers)
        monkeypatch.setattr(storage._system, "cat_file", lambda *_, left=left, **__: next(left))
        if problem:
            with pytest.raises(DataError) as refused:
                read()
            assert problem in str(refused.value)
        else:
            assert read() == b"0123456789"
        assert next(left, None) is None


def test_uploads_that_arrive_cut_are_sent_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(RemoteStorage, "FIRST_PAUSE", 0.01)
    storage = RemoteStorage("memory://bucket/sent", retries=2, cache_bytes=1 << 20)
    (tmp_path / "x").write_bytes(b"0123456789")
    whole, cuts = storage._system.pipe_file, iter([3, 5])

    def cut(path: str, data: bytes, **_: object) -> None:
        whole(path, data[: next(cuts, None)])

    monkeypatch.setattr(storage._system, "pipe_file", cut)
    monkeypatch.setattr(storage._system, "put_file", lambda local, path: cut(path, Path(local).read_bytes()))
    for send in (lambda: storage.write("x", b"0123456789"), lambda: storage.upload(tmp_path / "x", "x", 10)):
        cuts = iter([3, 5])
        send()
        assert storage.read_whole("x") == b"0123456789"
        cuts = iter([3, 5, 7])
        with pytest.raises(DataError, match="sent/x: arrived with 7 bytes of 10"):
            send()


def test_cache_is_bounded() -> None:
    cache = ByteCache(1000)
    for n in range(50):
        cache.add("a", n * 100, bytes([n]) * 100)
    assert cache.find("a", 0, 10) is None
    assert cache.find("a", 4950, 20) == bytes([49]) * 20
    assert sum(len(data) for data in cache._ranges.values()) <= 1000


@pytest.mark.parametrize("path", ["pipe:cat x", "pipe:x|sh", "ftp://host/x", "simplecache::s3://b/x", "exec://x"])
def test_only_known_places_are_read(path: str) -> None:
    with pytest.raises(DataError, match="only local folders and URLs of"):
        open_storage(path)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    for n in range(300):
        (tmp_path / f"{n}").write_bytes(b"abcdef%03d" % n)
    storage = LocalStorage(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert all(storage.read(f"{n}", 6, 3) == b"%03d" % n for n in range(300))
    assert len(os.listdir("/proc/self/fd")) - before <= LocalStorage.MAX_OPEN
    storage.close()
    assert len(os.listdir("/proc/self/fd")) == before


def make_hundred_million(folder: Path, shards: int, documents: int) -> Path:
    """A data set of `shards` x `documents` documents whose shards are links to one small sparse pair of files."""
    folder.mkdir()
    starts = np.arange(0, 2 * documents + 1, 2, dtype="<i8")
    offsets = 512 + 1024 * np.arange(2 * documents, dtype="<i8")
    places = np.stack([offsets, np.full(2 * documents, 512, dtype="<i8")], axis=1).reshape(-1)
    np.save(folder / "index", np.concatenate([starts, places]), allow_pickle=False)
    size = 2 * documents * 1024 + 1024
    with (folder / "tar").open("wb") as stream:
        stream.truncate(size)
    listed = []
    for n in range(shards):
        info = ShardInfo(f"shard-{n:06d}.tar", documents, documents, 2 * documents, size, f"{n:064x}")
        os.link(folder / "tar", folder / info.file)
        os.link(folder / "index.npy", folder / index_name(info.file))
        listed.append(info)
    write_manifest(folder, listed)
    return folder


@pytest.mark.slow
def test_start_up_does_not_grow_with_documents(tmp_path: Path) -> None:
    """100,000,000 documents in 1,000 shards, beside 100,000 in 1,000: same time, same memory."""
    figures = {}
    for name, documents in [("small", 100), ("large", 100_000)]:
        folder = make_hundred_million(tmp_path / name, 1_000, documents)
        tracemalloc.start()
        begin = time.perf_counter()
        data = NativeDataset(str(folder))
        order = DocumentOrder([len(data)], [1.0], ["x"], streams=1024, seed=1)
        places = [data.members(order.sample(stream, 0).index) for stream in range(64)]
        seconds = time.perf_counter() - begin
        figures[name] = (len(data), seconds, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert all(len(place.places) == 2 for place in places)
        assert len({place.shard for place in places}) > 40
        data.close()
    print(json.dumps({**figures, "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
    assert figures["large"][0] == 100_000_000
    assert figures["large"][2] < 1.2 * figures["small"][2] < 12_000_000
    assert figures["large"][1] < 3 * figures["small"][1] + 1.0
