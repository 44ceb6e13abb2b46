"""An S3 server for tests: moto on loopback, and a proxy before it that fails as it is told.

A `conftest.py` that imports the fixtures offers them to the tests of its folder.
"""

from __future__ import annotations

import gc
import http.client
import itertools
import logging
import random
import re
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

__all__ = ["bucket", "proxy", "s3_server"]

_STATUS = {
    status: f"<Error><Code>{code}</Code><Message>planned</Message></Error>".encode()
    for status, code in (("500", "InternalError"), ("503", "SlowDown"), ("403", "AccessDenied"))
} | {"404": b"<html>as from a server of web pages</html>"}
_numbers = itertools.count(1)


class Request(NamedTuple):
    """A request as a fault rule sees it."""

    method: str
    path: str  # with the query
    turn: int  # how often the same came before


# What happens to a request: a status of `_STATUS`; "drop" (no answer), "lost" (done, no answer),
# "cut" (half an answer), "stall" (silence); None lets it through.
Rule = Callable[[Request], str | None]


def fail_share(share: float, *, seed: int, at_most: int = 3) -> Rule:
    """Fail a share of all requests, each in some way, none more than `at_most` times in a row."""

    def rule(request: Request) -> str | None:
        words = re.sub(r"^/[^/?]+", "", request.path)  # the bucket's number must not matter
        dice = random.Random(f"{seed} {request.method} {words} {request.turn}")
        fails = dice.random() < share and (request.turn + 1) % (at_most + 1)
        return dice.choice(["500", "503", "drop", "lost", "cut"]) if fails else None

    return rule


class Proxy(ThreadingHTTPServer):
    """Passes requests on to the S3 server, or fails them.

    Attributes:
        rule: Decides; replace it at any time.
        requests: All that came since the last `clear`.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target.removeprefix("http://")
        self.rule: Rule = lambda _: None
        self.requests: list[Request] = []
        self.silence_ends = threading.Event()
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def book(self, method: str, path: str, part: str) -> Request:
        with self._lock:
            request = Request(method, path, self._seen[method, path, part])
            self._seen[method, path, part] += 1
            self.requests.append(request)
        return request

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up, which is what the tests are about, are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self.server.book(self.command, self.path, self.headers.get("Range", ""))
        fault = self.server.rule(request)
        if fault == "stall":
            self.server.silence_ends.wait(120)
        if fault in ("drop", "stall"):
            self.close_connection = True
        elif fault in _STATUS:
            self._answer(int(fault), [("Content-Type", "application/xml")], _STATUS[fault])
        else:
            self._pass_on(body, fault)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _pass_on(self, body: bytes, fault: str | None) -> None:
        upstream = http.client.HTTPConnection(self.server.target)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), data, is_cut=fault == "cut")

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, *, is_cut: bool = False
    ) -> None:
        self.send_response_only(status)
        kept = {name.lower(): value for name, value in headers}
        for name in ("connection", "transfer-encoding"):
            kept.pop(name, None)
        if self.command != "HEAD":
            kept["content-length"] = str(len(data))
        for name, value in kept.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if is_cut else data)
        self.close_connection |= is_cut

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `requests` has it."""


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an endpoint the S3 of this process and of those that it starts."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    # No file or service of the machine that runs the tests may answer in their place.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make_bucket(server: str) -> str:
    """A new bucket, as `s3://NAME`."""
    name = f"scans-{next(_numbers)}"
    with urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")):
        return f"s3://{name}"


def forget_connections() -> None:
    """Close what s3fs keeps open per endpoint, with the credentials that it found."""
    S3FileSystem.clear_instance_cache()
    gc.collect()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server, empty at first."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, `s3://NAME`, that the environment leads to."""
    point_at(s3_server, monkeypatch)
    yield make_bucket(s3_server)
    forget_connections()


@pytest.fixture
def proxy(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The same bucket through a proxy: count its requests, or set its `rule` to fail some."""
    proxy = Proxy(s3_server)
    # The default looks twice a second whether it is to stop.
    thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    point_at(proxy.url, monkeypatch)
    yield proxy
    proxy.silence_ends.set()
    forget_connections()
    proxy.shutdown()
    thread.join()
    proxy.server_close()
