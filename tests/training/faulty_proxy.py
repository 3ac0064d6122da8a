"""A proxy in front of an S3 server: some answers are errors, late, cut off, or of another length than asked for."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle

FAULTS = ("500", "503", "short", "slow", "cut", "long")
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>not now</Message></Error>"
CODES = {"500": b"InternalError", "503": b"SlowDown"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to 127.0.0.1:`port`; every `every`-th gets the next fault in turn.

    struck   how often each fault was given, to requests of each method
    """

    daemon_threads = True

    def __init__(self, port: int, every: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream, self.every = port, every
        self.struck: Counter[tuple[str, str]] = Counter()
        self._requests, self._faults, self._lock = 0, cycle(FAULTS), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fault(self, method: str) -> str:
        with self._lock:
            self._requests += 1
            if self._requests % self.every:
                return ""
            fault = next(self._faults)
            self.struck[method, fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client went away
            self.close_connection = True

    def answer(self) -> None:
        fault = self.server.fault(self.command)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length) if "chunked" not in self.headers.get("Transfer-Encoding", "") else self._chunks()
        if fault in CODES:
            self._reply(int(fault), [("Content-Type", "application/xml")], ERROR % CODES[fault])
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        upstream.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        response = upstream.getresponse()
        content = response.read()
        kept = [(n, v) for n, v in response.getheaders() if n.lower() not in ("content-length", "transfer-encoding")]
        if fault == "slow":
            time.sleep(0.5)
        whole = len(content)
        if fault == "short":
            content = content[: whole // 2]
        elif fault == "long":
            content += b"x" * 100 if whole else b""
        if self.command == "HEAD":
            whole, content = int(response.getheader("Content-Length", "0")), b""
            self._reply(response.status, kept, content, whole)
        elif fault == "cut" and whole:
            self._reply(response.status, kept, content[: whole // 2], whole)
            self.close_connection = True
        else:
            self._reply(response.status, kept, content)
        upstream.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
