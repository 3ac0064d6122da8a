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

from faulty_proxy import FAULTS, FaultyProxy
from lcl_mcore.checkpoint.consolidate import list_checkpoints, verify_checkpoints
from lcl_mcore.checkpoint.store import verify
from training_runs import records

pytestmark = pytest.mark.slow


def use_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have S3 clients that are started from now on use this one."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "a"),
        ("AWS_SECRET_ACCESS_KEY", "b"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", url),
    ):
        monkeypatch.setenv(name, value)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of moto's server with bucket `ckpt`; the environment names the server."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    use_server(url, monkeypatch)
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


@pytest.mark.timeout(280)
def test_a_run_with_an_object_store_that_fails(
    server: Any,
    monkeypatch: pytest.MonkeyPatch,
    arguments: Callable[..., list[str]],
    run_tool: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Every fourth request meets 500, 503, half an answer, a late one, one cut off or one too long: nothing is lost.

    What an upload left behind, in parts that were never joined or without a manifest, is no checkpoint.
    """
    proxy = FaultyProxy(int(server.meta.endpoint_url.rsplit(":", 1)[1]), every=4)
    use_server(proxy.url, monkeypatch)
    out, remote = tmp_path / "run", ("--checkpoint-folder", "s3://ckpt/run", "--keep", "9")
    done = run_tool(*arguments(out, *remote), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING checkpoint" not in done.stdout
    before = records(out)
    saved = dict(proxy.struck)
    assert {fault for _, fault in saved} == set(FAULTS)
    assert {method for method, _ in saved} >= {"GET", "PUT", "HEAD"}

    use_server(server.meta.endpoint_url, monkeypatch)
    names = [f"s3://ckpt/run/step-{step:08d}" for step in (3, 6, 8)]
    assert verify_checkpoints("s3://ckpt/run") == {name: [] for name in names}
    key = "run/step-00000008/manifest.json"
    server.delete_object(Bucket="ckpt", Key=key)
    part = server.create_multipart_upload(Bucket="ckpt", Key=key)
    server.upload_part(Bucket="ckpt", Key=key, UploadId=part["UploadId"], PartNumber=1, Body=b"{}" * 100)
    server.create_multipart_upload(Bucket="ckpt", Key="run/step-00000009/manifest.json")
    assert [bool(found["problem"]) for found in list_checkpoints("s3://ckpt/run")] == [False, False, True]

    use_server(proxy.url, monkeypatch)
    done = run_tool(*arguments(out, "--resume", *remote), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resume: s3://ckpt/run/step-00000006, 6 steps done" in done.stdout
    assert proxy.struck["GET", "short"] > saved.get(("GET", "short"), 0)
    after = records(out)
    assert [after[step]["loss"] for step in range(1, 9)] == [before[step]["loss"] for step in range(1, 9)]
    use_server(server.meta.endpoint_url, monkeypatch)
    assert verify_checkpoints("s3://ckpt/run") == {name: [] for name in names}


@pytest.mark.timeout(120)
def test_one_of_two_jobs_holds_a_lease_in_the_store(server: Any) -> None:
    """By the store's conditional put; the other's heartbeat is seen, and a holder that is silent is succeeded."""
    from lcl_mcore.errors import LeaseError
    from lcl_mcore.fault_tolerance.lease import Lease

    url = "s3://ckpt/leased"
    one, other = (Lease(url, 2.0, print) for _ in range(2))

    def take(lease: Lease) -> None:
        while not lease.ask():
            time.sleep(0.05)

    assert one.ask()
    assert not other.place.create("lease-000001.json", b"{}")
    one.require()
    with pytest.raises(LeaseError, match="is being written by process"):
        take(other)
    one.finished.set()
    one.thread.join()
    later = Lease(url, 2.0, print)
    take(later)
    later.require()
    with pytest.raises(LeaseError, match="taken over by process"):
        one.require()
    one.close()
    later.clear()
    later.close()
    other.close()
    assert "Contents" not in server.list_objects_v2(Bucket="ckpt", Prefix="leased/")
