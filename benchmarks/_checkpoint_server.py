"""An S3 server that takes in objects at a stated rate and forgets the content of large ones.

It knows what a client needs to write and to tidy checkpoints: PUT, uploads in parts, GET, listings,
the deletion of many; it looks at no signature. A process of its own that computes nothing from
what it reads, so that it takes little from the training beside it.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from xml.etree import ElementTree
from xml.sax.saxutils import escape

BUCKET = "s3://bench"
_KEY = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
_PIECE = 1 << 20  # bytes that are read at a time
_KEPT = 1 << 20  # bytes of the largest object whose content can be read again
_NO_OBJECT = "<Error><Code>NoSuchKey</Code><Message>no such object</Message></Error>"
_WHEN = "2026-01-01T00:00:00.000Z"


@contextmanager
def slow_bucket(*, rate: float) -> Iterator[dict[str, str]]:
    """Serve an empty bucket on loopback; gives the variables that lead clients there.

    Args:
        rate: Bytes a second that it takes in, over all connections.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(rate, there), daemon=True)
    process.start()
    try:
        endpoint = f"http://127.0.0.1:{here.recv()}"
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            **_KEY,
        }
    finally:
        process.kill()
        process.join()


def _serve(rate: float, pipe: Connection) -> None:
    server = _Server(rate)
    pipe.send(server.server_port)
    server.serve_forever()


class _Server(ThreadingHTTPServer):
    """Sizes and small contents of what it was given."""

    daemon_threads = True
    request_queue_size = 64  # connections that wait to be taken

    def __init__(self, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes | None] = {}  # None: large, and forgotten
        self._rate, self._lock, self._free_at = rate, threading.Lock(), 0.0

    def let_in(self, size: int) -> None:
        """Wait until so many bytes more may have come, over all connections."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + size / self._rate
            wait_s = self._free_at - time.perf_counter()
        time.sleep(max(0.0, wait_s))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_PUT(self) -> None:
        key, query = self._asked()
        content = self._taken_in()
        if "partNumber" not in query:
            self.server.objects[key] = content
        self._answer(200, "")

    def do_POST(self) -> None:
        key, query = self._asked()
        content = self._taken_in() or b""
        if "delete" in query:
            for element in ElementTree.fromstring(content).iter():
                if element.tag.endswith("Key"):
                    self.server.objects.pop(f"{key}/{element.text}", None)
            self._answer(200, "<DeleteResult/>")
        elif "uploads" in query:
            tags = "<UploadId>1</UploadId>"
            self._answer(
                200, f"<InitiateMultipartUploadResult>{tags}</InitiateMultipartUploadResult>"
            )
        else:
            self.server.objects[key] = None
            tags = '<ETag>"1"</ETag>'
            self._answer(
                200, f"<CompleteMultipartUploadResult>{tags}</CompleteMultipartUploadResult>"
            )

    def do_GET(self) -> None:
        key, query = self._asked()
        if "list-type" in query:
            self._answer(200, self._listing(key, **query))
            return
        content = self.server.objects.get(key)
        self._answer(*((404, _NO_OBJECT) if content is None else (200, content)))

    def _listing(self, bucket: str, prefix: str = "", delimiter: str = "", **_: str) -> str:
        found, folders = [], set()
        for key in sorted(key.removeprefix(f"{bucket}/") for key in self.server.objects):
            name = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in name:
                folders.add(prefix + name.split(delimiter)[0] + delimiter)
            else:
                found.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>0</Size><LastModified>{_WHEN}</LastModified>"
            '<ETag>"1"</ETag></Contents>'
            for key in found
        )
        contents += "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"

    def _asked(self) -> tuple[str, dict[str, str]]:
        """BUCKET/KEY, and the query."""
        path, _, query = self.path.partition("?")
        values = urllib.parse.parse_qsl(query, keep_blank_values=True)
        return urllib.parse.unquote(path).strip("/"), dict(values)

    def _taken_in(self) -> bytes | None:
        """What the client sends, None if it is large."""
        left = size = int(self.headers.get("Content-Length", 0))
        kept = []
        while left:
            piece = self.rfile.read(min(left, _PIECE))
            if not piece:
                raise ConnectionError("the client broke off")
            self.server.let_in(len(piece))
            left -= len(piece)
            if size <= _KEPT:
                kept.append(piece)
        return b"".join(kept) if size <= _KEPT else None

    def _answer(self, status: int, content: str | bytes) -> None:
        data = content.encode() if isinstance(content, str) else content
        self.send_response(status)
        for name, value in (("ETag", '"1"'), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
