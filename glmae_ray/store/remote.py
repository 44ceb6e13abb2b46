"""Byte ranges of objects on S3 through tensorstore: its requests, patience and errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tensorstore as ts

from glmae_ray.errors import UserError
from glmae_ray.s3 import CONNECT_S, SILENCE_S, TRIES, server
from glmae_ray.store.ranges import File, Span, Tail

if TYPE_CHECKING:
    from upath import UPath

# Of tensorstore: what stays wrong however often it is tried is not among them.
_FAILURES = ("ABORTED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED")


class RemoteRanges:
    """`Ranges` of a bucket; every request is under way as soon as it is asked for."""

    gap = 2**18  # a request takes as long as a quarter of a megabyte

    def __init__(self, place: UPath) -> None:
        """Name the folder; nothing is read yet."""
        self._place = place
        with remote_errors(place):
            context = ts.Context(_resources())
            self._files = ts.KvStore.open(_location(place), context=context).result()

    def whole(self, key: str) -> Iterator[bytes | None]:
        """See `Ranges`."""
        return self._contents([self._files.read(key)])

    def tail(self, key: str, size: int) -> Iterator[Tail | None]:
        """See `Ranges`."""
        return self._tail(key, self._files.read(key, byte_range=slice(-size, None)))

    def spans(self, file: File, spans: Sequence[Span]) -> Iterator[bytes]:
        """See `Ranges`."""
        reads = [self._files.read(file.key, byte_range=slice(*span)) for span in spans]
        return self._pieces(file.key, reads)

    def _contents(self, reads: Sequence[ts.Future]) -> Iterator[bytes | None]:
        return (tail and tail.raw for tail in map(self._answer, reads))

    def _answer(self, read: ts.Future) -> Tail | None:
        """What came, and the generation (on S3 the ETag) of the object that it is of."""
        with remote_errors(self._place):
            found = read.result()
        return Tail(found.value, found.stamp.generation.hex()) if found.state == "value" else None

    def _pieces(self, key: str, reads: Sequence[ts.Future]) -> Iterator[bytes]:
        for piece in self._contents(reads):
            if piece is None:
                raise OSError(f"{self._place / key} is gone")
            yield piece

    def _tail(self, key: str, read: ts.Future) -> Iterator[Tail | None]:
        try:
            read.result()
        except ValueError as error:
            if str(error).startswith("OUT_OF_RANGE"):  # the file is shorter
                yield self._answer(self._files.read(key))
                return
        yield self._answer(read)


@contextmanager
def remote_errors(place: UPath) -> Iterator[None]:
    """Turn tensorstore's ValueErrors, the same for all that can go wrong, into Python's kinds.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: No right to do this.
        OSError: Disk or server fail, after all tries.
    """
    try:
        yield
    except ValueError as error:
        code, _, text = str(error).partition(": ")
        line = " ".join(text.partition(" [")[0].split())  # behind it: specs, source lines
        if code == "NOT_FOUND":
            raise FileNotFoundError(line) from None
        if code in _REFUSALS:
            what = "check the key and what it may do"
            raise UserError(f"store: {place}: access denied ({line}); {what}") from None
        if code in _FAILURES:
            raise OSError(f"{place}: {line}") from error
        raise


def _location(place: UPath) -> dict[str, Any]:
    """A folder, as tensorstore names it."""
    endpoint, region = server()
    bucket, _, folder = place.path.partition("/")
    spec = {"driver": "s3", "bucket": bucket, "path": f"{folder}/"}
    optional = {"endpoint": endpoint, "aws_region": region}
    return spec | {name: value for name, value in optional.items() if value is not None}


def _resources() -> dict[str, Any]:
    # tensorstore waits for ever by default, and takes these nowhere else.
    os.environ.setdefault("TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS", str(CONNECT_S))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(SILENCE_S))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    # Named, where they are in the environment: the search through files complains on stderr.
    in_environment = bool(os.environ.get("AWS_ACCESS_KEY_ID"))
    return {
        "aws_credentials": {"type": "environment" if in_environment else "default"},
        "s3_request_retries": {
            "max_retries": TRIES,
            "initial_delay": "200ms",
            "max_delay": "8s",
        },
    }
