"""An S3 server of files that only reads, with a delay before each answer.

It knows what a client needs to read objects: GET with a range, HEAD, an empty listing; it looks
at no signature. One process, one thread: it answers some thousand requests a second, and a delay
holds up no other request. Buckets are the subfolders of its folder.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

_KEY = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
_NO_OBJECT = b"<Error><Code>NoSuchKey</Code><Message>no such object</Message></Error>"
_NOTHING = (
    b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
)


@contextmanager
def object_server(folder: Path, *, delay_s: float = 0.0) -> Iterator[dict[str, str]]:
    """Serve a folder on loopback; gives the variables that lead clients there."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(folder, delay_s, there), daemon=True)
    process.start()
    try:
        endpoint = f"http://127.0.0.1:{here.recv()}"
        yield {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", **_KEY}
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, delay_s: float, pipe: Connection) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: _Client(folder, delay_s), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class _Client(asyncio.Protocol):
    """A connection; its requests are answered in turn."""

    _files: dict[Path, int] = {}  # open ones, shared by all connections

    def __init__(self, folder: Path, delay_s: float) -> None:
        self._folder, self._delay_s = folder, delay_s
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *requests, self._received = (self._received + data).split(b"\r\n\r\n")
        for request in requests:
            answer = self._answer(request.decode("latin-1"))
            asyncio.get_running_loop().call_later(self._delay_s, self._send, answer)

    def _send(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)

    def _answer(self, request: str) -> bytes:
        first, *lines = request.split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (at.partition(": ") for at in lines)}
        path, _, query = target.partition("?")
        if "list-type" in query:
            return _message("200 OK", [], _NOTHING)
        try:
            file, size = self._opened(urllib.parse.unquote(path).strip("/"))
        except OSError:
            return _message("404 Not Found", [], _NO_OBJECT)
        start, stop = _range(headers.get("range"), size)
        status, about = "200 OK", ['ETag: "1"', "Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT"]
        if "range" in headers:
            status = "206 Partial Content"
            about.append(f"Content-Range: bytes {start}-{stop - 1}/{size}")
        if method == "HEAD":
            return _message(status, [*about, f"Content-Length: {size}"], None)
        return _message(status, about, os.pread(file, stop - start, start))

    def _opened(self, key: str) -> tuple[int, int]:
        path = self._folder / key
        if path not in self._files:
            if path.is_dir():
                raise IsADirectoryError(key)
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path], os.fstat(self._files[path]).st_size


def _range(header: str | None, size: int) -> tuple[int, int]:
    """Start and stop of `bytes=FIRST-LAST`, `bytes=FIRST-` or `bytes=-COUNT`."""
    if header is None:
        return 0, size
    first, _, last = header.removeprefix("bytes=").partition("-")
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1) if last else size


def _message(status: str, headers: list[str], body: bytes | None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")
