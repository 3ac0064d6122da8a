"""Checkpoints in an object store, over a real S3 protocol server: whole or not at all, damage noticed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lcl_mcore.checkpoint.consolidate import list_checkpoints
from lcl_mcore.checkpoint.store import verify

pytestmark = pytest.mark.slow


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of moto's server with bucket `ckpt`; the environment names the server."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", url),
        ("FSSPEC_S3_ENDPOINT_URL", url),
    ):
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "the server does not start"
                time.sleep(0.1)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="ckpt")
        yield client
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(280)
def test_object_store(server: Any, tmp_path: Path, run_tool: Callable[..., Any]) -> None:
    url = "s3://ckpt/run"
    done = run_tool("tests/training/checkpoint_remote_worker.py", url, str(tmp_path), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["saved"] == ["", ""]
    assert len(report["killed"]) == 3
    for case in report["killed"]:  # what the dead save had uploaded is gone or does not count
        assert case["killed"], case
        assert (case["step"], case["exact"]) == (2, True), case
    assert report["retention"] == ""
    assert (report["final"]["step"], report["final"]["exact"]) == (4, True)
    assert report["final"]["names"] == ["step-00000002", "step-00000004"]
    assert [found["problem"] for found in list_checkpoints(url)] == ["", ""]
    newest = f"{url}/step-00000004"
    assert verify(newest) == []
    key = "run/step-00000004/__0_0.distcp"
    content = bytearray(server.get_object(Bucket="ckpt", Key=key)["Body"].read())
    content[len(content) // 2] ^= 8
    server.put_object(Bucket="ckpt", Key=key, Body=bytes(content))
    assert verify(newest) == ["__0_0.distcp: content changed since it was written"]
    done = run_tool("tests/training/checkpoint_remote_worker.py", url, str(tmp_path / "again"), "restore")
    assert done.returncode == 0, done.stdout + done.stderr
    restored = json.loads(done.stdout.splitlines()[-1])
    assert (restored["step"], restored["exact"], restored["names"]) == (2, True, ["step-00000002"])
    assert restored["skipped"] == [f"{newest}: damaged, skipped: __0_0.distcp: content changed since it was written"]
    kept = server.list_objects_v2(Bucket="ckpt", Prefix="run/damaged-step-00000004/")["Contents"]
    assert len(kept) == 7
    server.delete_object(Bucket="ckpt", Key="run/step-00000002/manifest.json")
    assert "not complete" in verify(f"{url}/step-00000002")[0]
