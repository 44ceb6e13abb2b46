"""Arrays on disk and on S3 through tensorstore: where they lie, its limits, its errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorstore as ts

from glmae_ray.errors import UserError
from glmae_ray.paths import Place
from glmae_ray.s3 import CONNECT_S, SILENCE_S, TRIES, server

# Of tensorstore: what stays wrong however often it is tried is not among them.
_FAILURES = ("ABORTED", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
_REFUSALS = ("PERMISSION_DENIED", "UNAUTHENTICATED")


def make_context(place: Place, *, threads: int | None) -> ts.Context:
    """The resources that all arrays of a store share.

    Args:
        place: The store.
        threads: Cap on threads that read and decode; None leaves it to tensorstore.
    """
    resources: dict[str, Any] = {}
    if threads is not None:
        limit = {"limit": threads}
        resources |= {"data_copy_concurrency": limit, "file_io_concurrency": limit}
    if not isinstance(place, Path):
        resources |= _s3_resources()
    return ts.Context(resources)


def kvstore(place: Place) -> dict[str, Any]:
    """The folder of an array, as tensorstore names it."""
    if isinstance(place, Path):
        return {"driver": "file", "path": f"{place}/"}
    endpoint, region = server()
    bucket, _, folder = place.path.partition("/")
    spec = {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{folder}/",
        # A write whose answer was lost is sent again; with a condition ("only if nothing is
        # there") the second one would fail on what the first one wrote. A case has one writer.
        "use_conditional_write": False,
    }
    optional = {"endpoint": endpoint, "aws_region": region}
    return spec | {name: value for name, value in optional.items() if value is not None}


@contextmanager
def array_errors(place: Place) -> Iterator[None]:
    """Turn tensorstore's ValueErrors, the same for all that can go wrong, into Python's kinds.

    Raises:
        FileNotFoundError: There is no such array.
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


def _s3_resources() -> dict[str, Any]:
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
