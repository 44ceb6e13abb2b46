"""S3 as `paths` needs it: which server, how patiently, its requests, its errors in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from glmae_ray.errors import UserError

if TYPE_CHECKING:
    from upath import UPath

# An object store answers in milliseconds. One that says nothing for that long has lost the
# request; five tries, with growing pauses between them, outlast a server that restarts.
CONNECT_S, SILENCE_S, TRIES = 5, 10, 5

_NOT_THERE = (None, "NoSuchKey")  # any other 404 is about the bucket, or not one of S3
_KEYS_PER_REQUEST = 1000  # that S3 deletes at once


def server() -> tuple[str | None, str | None]:
    """Endpoint and region that the environment names.

    Raises:
        UserError: The endpoint is no URL, or one with credentials, which errors would show.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if endpoint is not None and "@" in endpoint:
        raise UserError("AWS_ENDPOINT_URL: has a name or password in it; give AWS_ACCESS_KEY_ID")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"AWS_ENDPOINT_URL: {endpoint} does not start with http:// or https://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # Servers of one's own have no regions, but the name of one is part of every signature.
    return endpoint, region or ("us-east-1" if endpoint else None)


def options() -> dict[str, Any]:
    """What s3fs is opened with."""
    endpoint, region = server()
    return {
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": region},
        "config_kwargs": {
            "connect_timeout": CONNECT_S,
            "read_timeout": SILENCE_S,
            "retries": {"mode": "standard", "total_max_attempts": TRIES},
            # Shards and checkpoints bring checksums of their own, and many servers know no other
            # than MD5; a second one takes a core a quarter of a second a gigabyte.
            "request_checksum_calculation": "when_required",
        },
    }


def read_object(place: UPath) -> bytes | None:
    """Content of an object, None where there is none."""
    with plain_errors(place):
        try:
            return _read_object(place)
        except FileNotFoundError as error:
            if _code(error) in _NOT_THERE:
                return None
            raise


def names_in(place: UPath) -> set[str]:
    """Names right below a folder, the first thousand."""
    with plain_errors(place):
        bucket, key, _ = place.fs.split_path(place.path)
        prefix = f"{key.rstrip('/')}/".lstrip("/")
        found = place.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/")
    keys = [entry["Prefix"] for entry in found.get("CommonPrefixes", [])]
    keys += [entry["Key"] for entry in found.get("Contents", [])]
    return {key.removeprefix(prefix).rstrip("/") for key in keys if key != prefix}


def objects_below(place: UPath) -> list[str]:
    """Every object below a folder, as BUCKET/KEY."""
    with plain_errors(place):
        # As the prefix of its parent: listing the folder itself asks twice more if it is empty.
        return place.fs.find(place.parent.path, prefix=f"{place.name}/")


def stamps_below(place: UPath, start: str) -> dict[str, str]:
    """Objects whose path below a folder begins so -> ETag, which follows from the content."""
    with plain_errors(place):
        found = place.fs.find(place.path, prefix=start, detail=True)
    return {path.removeprefix(f"{place.path}/"): facts["ETag"] for path, facts in found.items()}


def delete_objects(place: UPath, objects: list[str]) -> None:
    """Delete objects, given as BUCKET/KEY, of the bucket of a place.

    Raises:
        UserError: S3 refuses (see `plain_errors`).
        OSError: One of them cannot be deleted.
    """
    for begin in range(0, len(objects), _KEYS_PER_REQUEST):
        _delete(place, objects[begin : begin + _KEYS_PER_REQUEST])


@contextmanager
def plain_errors(place: UPath) -> Iterator[None]:
    """Say what an object store answers in one line: what is wrong, and what would be right.

    Raises:
        UserError: No credentials, no such bucket, no right to do this, no server.
        OSError: The server fails or falls silent, after all tries.
    """
    from aiohttp import ClientError
    from botocore import exceptions as boto

    try:
        yield
    except PermissionError as error:
        raise UserError(f"{place}: {_detail(error)}; check the key and what it may do") from None
    except (boto.EndpointConnectionError, boto.ConnectTimeoutError) as error:
        raise UserError(f"{place}: {error}; is AWS_ENDPOINT_URL right, the server up?") from None
    except (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.CredentialRetrievalError,
        boto.ProfileNotFound,
    ) as error:
        what = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise UserError(f"{place}: {error}; {what}") from None
    except boto.ParamValidationError as error:
        raise UserError(f"{place}: {str(error).splitlines()[-1]}") from None
    except (OSError, boto.BotoCoreError, ClientError) as error:
        code = _code(error)
        if isinstance(error, FileNotFoundError) and code in _NOT_THERE:
            raise
        if code == "NoSuchBucket":
            raise UserError(f"{place}: no such bucket; make it, or name another") from None
        if code == "404":
            raise UserError(f"{place}: {_detail(error)}; is AWS_ENDPOINT_URL one of S3?") from None
        raise OSError(f"{place}: {_detail(error)}") from error


def _delete(place: UPath, objects: list[str]) -> None:
    with plain_errors(place):
        bucket = place.fs.split_path(place.path)[0]
        keys = [{"Key": place.fs.split_path(found)[1]} for found in objects]
        # Not `fs.rm`, which does not tell what stayed.
        answer = place.fs.call_s3(
            "delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}
        )
        for failed in answer.get("Errors", []):
            kind = PermissionError if failed["Code"] == "AccessDenied" else OSError
            raise kind(f"{failed['Key']} stays: {failed['Code']}")


def _read_object(place: UPath) -> bytes:
    """Content of an object in one request; `cat_file` asks for the size first."""
    from aiohttp import ClientError
    from botocore.exceptions import HTTPClientError
    from fsspec.asyn import sync

    bucket, key, _ = place.fs.split_path(place.path)
    left = TRIES
    while True:
        answer = place.fs.call_s3("get_object", Bucket=bucket, Key=key)
        try:
            return sync(place.fs.loop, _read_and_close, answer["Body"])
        except (ClientError, HTTPClientError):  # broke off in the middle
            left -= 1
            if left == 0:
                raise


async def _read_and_close(body: Any) -> bytes:
    try:
        return await body.read()
    finally:
        body.close()


def _code(error: Exception) -> str | None:
    """S3's word for what is wrong, else the HTTP status, None where there was no answer."""
    answer = getattr(error.__cause__, "response", None)
    if answer is None:
        return None
    return answer["Error"].get("Code") or str(answer["ResponseMetadata"]["HTTPStatusCode"])


def _detail(error: Exception) -> str:
    """What botocore says of an answer, which names the code, where s3fs has left that out."""
    cause = error.__cause__ if hasattr(error.__cause__, "response") else error
    return " ".join(str(cause).replace("()", f"({_code(error)})").split())
