"""Places: local paths and `s3://` URLs through one interface, and files that appear whole.

A local place is a `pathlib.Path`; a URL is a `UPath` of universal-pathlib with the same methods,
over fsspec. Endpoint and credentials of S3 come from the usual variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, ...), else from the files and services that AWS's
own tools ask.
"""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from glmae_ray import s3
from glmae_ray.credentials import ADVICE, has_password
from glmae_ray.errors import UserError

if TYPE_CHECKING:
    from upath import UPath

Place: TypeAlias = "Path | UPath"

UNFINISHED = ".unfinished"  # what a killed `publish` leaves; the next one writes over it


def is_url(location: str | Place) -> bool:
    """Whether a location names an object store, not a path of this machine."""
    return "://" in str(location)


def to_place(location: str | Place) -> Place:
    """A location as a thing with the methods of `pathlib.Path`; local ones are made absolute.

    Raises:
        UserError: A URL of an unknown kind or with a password, or an endpoint in the environment
            that is none.
    """
    if not is_url(location):
        path = Path(str(location))
        return (path.expanduser() if path.parts[:1] == ("~",) else path).absolute()
    from upath import UPath

    url = str(location).rstrip("/")
    if has_password(url):
        scheme, _, rest = url.partition("://")
        where = f"{scheme}://***@{rest.rpartition('@')[2]}"
        raise UserError(f"{where}: has a password in its URL; {ADVICE}")
    options = s3.options() if url.startswith("s3://") else {}
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
    if not isinstance(place, Path) and place.protocol == "s3":
        return s3.read_object(place)
    try:
        return place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def names_in(place: Place) -> set[str]:
    """Names right below a folder, of an object store the first thousand; none if it is none."""
    if isinstance(place, Path):
        return set(os.listdir(place)) if place.is_dir() else set()
    return s3.names_in(place)


def stamps(folder: Place, start: str) -> dict[str, str]:
    """Files whose path below a folder begins so -> a text that changes with their content.

    Raises:
        UserError: The object store refuses (see `plain_errors`).
        OSError: It fails.
    """
    if not isinstance(folder, Path):
        return s3.stamps_below(folder, start)
    found = {}
    for top in folder.glob(f"{start}*"):
        for path in [top, *top.rglob("*")]:
            with suppress(FileNotFoundError):  # gone since it was listed
                facts = path.stat()
                if path.is_file():
                    name = path.relative_to(folder).as_posix()
                    found[name] = f"{facts.st_ino} {facts.st_mtime_ns} {facts.st_size}"
    return found


def folders_with(place: Place, name: str) -> list[str]:
    """Names, sorted, of the folders right below a place that hold a file of this name."""
    if isinstance(place, Path):
        entries = list(os.scandir(place)) if place.is_dir() else []
        return sorted(entry.name for entry in entries if Path(entry.path, name).is_file())
    # One listing of all there is: a request for a thousand objects, where asking for each folder
    # would be one a folder.
    below = (found.removeprefix(f"{place.path}/") for found in s3.objects_below(place))
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
    objects = s3.objects_below(place)
    leading = f"{place.path}/{first}"
    if leading in objects:
        s3.delete_objects(place, [leading])
    s3.delete_objects(place, [found for found in objects if found != leading])
    return bool(objects)


def plain_errors(place: Place) -> AbstractContextManager[None]:
    """For a block that uses a place: errors of S3 in one line; others' are Python's already.

    Raises:
        UserError: No credentials, no such bucket, no right to do this, no server.
        OSError: The server fails or falls silent, after all tries.
    """
    if isinstance(place, Path) or place.protocol != "s3":
        return nullcontext()
    return s3.plain_errors(place)
