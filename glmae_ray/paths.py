"""Places: local paths and `s3://` URLs through one interface, and files that appear whole.

A local place is a `pathlib.Path`; a URL is a `UPath` of universal-pathlib with the same methods,
over fsspec. Endpoint and credentials of S3 come from the usual variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, ...), else from the files and services that AWS's
own tools ask.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from glmae_ray.errors import UserError

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "Path | UPath"

# An object store answers in milliseconds. One that says nothing for that long has lost the
# request; five tries, with growing pauses between them, outlast a server that restarts.
CONNECT_S, SILENCE_S, TRIES = 5, 10, 5
UNFINISHED = ".unfinished"  # what a killed `publish` leaves; the next one writes over it

_NOT_THERE = (None, "NoSuchKey")  # any other 404 is about the bucket, or not from S3 at all
_KEYS_PER_REQUEST = 1000  # that S3 lists or deletes at once


def is_url(location: str | Place) -> bool:
    """Whether a location names an object store, not a path of this machine."""
    return "://" in str(location)


def to_place(location: str | Place) -> Place:
    """A location as a thing with the methods of `pathlib.Path`; local ones are made absolute.

    Raises:
        UserError: A URL of an unknown kind, or an endpoint in the environment that is none.
    """
    if not is_url(location):
        return Path(str(location)).absolute()
    from upath import UPath

    url = str(location).rstrip("/")
    options = _s3_options() if url.startswith("s3://") else {}
    try:
        # A listing that is remembered would hide what another process has written since.
        place = UPath(url, use_listings_cache=False, **options)
        if options:
            # s3fs repeats what botocore gave up after all its tries: five times, so that a server
            # that falls silent would hold a job for many minutes.
            place.fs.retries = 2
    except (ValueError, ImportError) as error:
        raise UserError(f"{location}: {error}; give a path or s3://BUCKET/FOLDER") from None
    return place


def s3_server() -> tuple[str | None, str | None]:
    """Endpoint and region that the environment names.

    Raises:
        UserError: The endpoint is no URL.
    """
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"AWS_ENDPOINT_URL: {endpoint} does not start with http:// or https://")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # Servers of one's own have no regions, but the name of one is part of every signature.
    return endpoint, region or ("us-east-1" if endpoint else None)


def publish(place: Place, data: bytes | str) -> None:
    """Write a file that is, whatever is killed, the old one or the new one; makes its folder.

    Raises:
        UserError: The object store refuses (see `plain_errors`).
        OSError: It fails.
    """
    raw = data.encode() if isinstance(data, str) else data
    if not isinstance(place, Path):
        with plain_errors(place):
            place.fs.pipe_file(place.path, raw)  # an object shows only when it is complete
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(place.name + UNFINISHED)
    with unfinished.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())  # the new name must not reach the disk before the content
    unfinished.replace(place)


def read_file(place: Place) -> bytes | None:
    """Content of a file, None where there is none; a failure never looks like that.

    Raises:
        UserError: The object store refuses (see `plain_errors`).
        OSError: It fails.
    """
    with plain_errors(place):
        try:
            is_s3 = not isinstance(place, Path) and place.protocol == "s3"
            return _read_object(place) if is_s3 else place.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            if _code(error) not in _NOT_THERE:
                raise
            return None


def names_in(place: Place) -> set[str]:
    """Names right below a folder, of an object store the first thousand; none if it is none."""
    if isinstance(place, Path):
        return set(os.listdir(place)) if place.is_dir() else set()
    with plain_errors(place):
        bucket, key, _ = place.fs.split_path(place.path)
        prefix = f"{key.rstrip('/')}/".lstrip("/")
        found = place.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/")
    keys = [entry["Prefix"] for entry in found.get("CommonPrefixes", [])]
    keys += [entry["Key"] for entry in found.get("Contents", [])]
    return {key.removeprefix(prefix).rstrip("/") for key in keys if key != prefix}


def folders_with(place: Place, name: str) -> list[str]:
    """Names, sorted, of the folders right below a place that hold a file of this name."""
    if isinstance(place, Path):
        entries = list(os.scandir(place)) if place.is_dir() else []
        return sorted(entry.name for entry in entries if Path(entry.path, name).is_file())
    # One listing of all there is: a request for a thousand objects, where asking for each folder
    # would be one a folder.
    below = (found.removeprefix(f"{place.path}/") for found in _objects_below(place))
    return sorted(path.split("/")[0] for path in below if path.split("/")[1:] == [name])


def remove_folder(place: Place, *, first: str) -> bool:
    """Remove a folder with all it holds, the file `first` before the rest; whether it was there.

    Raises:
        UserError: The object store refuses (see `plain_errors`).
        OSError: Something cannot be removed.
    """
    if isinstance(place, Path):
        (place / first).unlink(missing_ok=True)
        is_there = place.exists()
        if is_there:
            shutil.rmtree(place)
        return is_there
    objects = _objects_below(place)
    leading = [found for found in objects if found == f"{place.path}/{first}"]
    if leading:
        _delete_objects(place, leading)
    rest = [found for found in objects if found not in leading]
    for begin in range(0, len(rest), _KEYS_PER_REQUEST):
        _delete_objects(place, rest[begin : begin + _KEYS_PER_REQUEST])
    return bool(objects)


@contextmanager
def plain_errors(place: Place) -> Iterator[None]:
    """Say what an object store answers in one line: what is wrong, and what would be right.

    Raises:
        UserError: No credentials, no such bucket, no right to do this, no server.
        OSError: The server fails or falls silent, after all tries.
    """
    if isinstance(place, Path) or place.protocol != "s3":
        yield
        return
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
    except FileNotFoundError as error:
        if _code(error) in _NOT_THERE:
            raise
        if _code(error) == "NoSuchBucket":
            raise UserError(f"{place}: no such bucket; make it, or name another") from None
        raise UserError(f"{place}: {_detail(error)}; is AWS_ENDPOINT_URL one of S3?") from None
    except (OSError, boto.BotoCoreError, ClientError) as error:
        raise OSError(f"{place}: {_detail(error)}") from error


def _detail(error: Exception) -> str:
    """What botocore says of an answer, which names its code, where s3fs kept that."""
    cause = error.__cause__
    return " ".join(str(cause if hasattr(cause, "response") else error).split())


def _code(error: OSError) -> str | None:
    """S3's word for what is wrong, None where the error is not an answer of S3."""
    return getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")


def _s3_options() -> dict[str, Any]:
    endpoint, region = s3_server()
    return {
        "endpoint_url": endpoint,
        "client_kwargs": {"region_name": region},
        "config_kwargs": {
            "connect_timeout": CONNECT_S,
            "read_timeout": SILENCE_S,
            "retries": {"mode": "standard", "total_max_attempts": TRIES},
        },
    }


def _read_object(place: UPath) -> bytes:
    """Content of an object in one request; `cat_file` asks for the size first."""
    from aiohttp import ClientError
    from botocore.exceptions import HTTPClientError
    from fsspec.asyn import sync

    bucket, key, _ = place.fs.split_path(place.path)
    for left in reversed(range(TRIES)):
        answer = place.fs.call_s3("get_object", Bucket=bucket, Key=key)
        try:
            return sync(place.fs.loop, _read_and_close, answer["Body"])
        except (ClientError, HTTPClientError):  # broke off in the middle
            if not left:
                raise
    raise AssertionError("TRIES is at least 1")


async def _read_and_close(body: Any) -> bytes:
    try:
        return await body.read()
    finally:
        body.close()


def _objects_below(place: UPath) -> list[str]:
    """Every object below a folder, as BUCKET/KEY."""
    with plain_errors(place):
        # As the prefix of its parent: listing the folder itself asks twice more if it is empty.
        return place.fs.find(place.parent.path, prefix=f"{place.name}/")


def _delete_objects(place: UPath, objects: list[str]) -> None:
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
