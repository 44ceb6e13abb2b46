"""Every file below a source, as a flat list in path order: folders, globs, buckets."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from fsspec.utils import glob_translate

from glmae_ray.errors import UserError
from glmae_ray.paths import is_url, plain_errors, to_place
from glmae_ray.store.items import Found

_AT_ONCE = 32  # requests
_WILD = re.compile(r"[*?\[]")


class Listing(NamedTuple):
    """What lies below a source."""

    root: str  # absolute path or URL that every location starts with
    files: list[Found]  # in path order
    unreadable: list[tuple[str, str]]  # what could not be listed, and why


def list_files(source: str, *, may_be_glob: bool = True) -> Listing:
    """List a file, a folder and everything below it, or all that a glob matches.

    A glob takes `*`, `?`, `[abc]` and `**`; a folder that it matches counts with all it holds.

    Args:
        source: Path, URL or glob.
        may_be_glob: Whether wildcards are wildcards, not parts of a name.

    Raises:
        UserError: Nothing is there, or it cannot be read.
    """
    place = str(to_place(source)).rstrip("/")
    is_glob = may_be_glob and bool(_WILD.search(source)) and not os.path.lexists(place)
    root = _before_wildcards(place) if is_glob else place
    listing = _remote(root, source) if is_url(source) else _local(root, source)
    files = sorted(listing.files, key=lambda found: found.location.split("/"))
    if is_glob:
        chosen = _compiled(place, source)
        files = [found for found in files if _matches(chosen, found.location, root)]
        if not files:
            raise UserError(f"source: nothing matches {source}")
    return Listing(root, files, listing.unreadable)


def stat_files(locations: Sequence[str]) -> dict[str, Found]:
    """Size and state of files, by location; those that are not there are left out."""
    # Each is a request where they are remote: many at once.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(_stat, locations)
        return {file.location: file for file in found if file is not None}


def _stat(location: str) -> Found | None:
    try:
        if not is_url(location):
            return _found(location, os.stat(location)) if os.path.isfile(location) else None
        place = to_place(location)
        with plain_errors(place):
            info = place.fs.info(place.path)  # type: ignore[union-attr]
        return None if info["type"] == "directory" else _found_far(location, info)
    except OSError:
        return None  # reading it will say why


def _compiled(pattern: str, source: str) -> re.Pattern[str]:
    try:
        return re.compile(glob_translate(pattern))
    except (ValueError, re.error) as error:
        raise UserError(f"source: {source} is no glob ({error})") from None


def _before_wildcards(pattern: str) -> str:
    return pattern[: _WILD.search(pattern).start()].rpartition("/")[0]  # type: ignore[union-attr]


def _matches(chosen: re.Pattern[str], location: str, root: str) -> bool:
    """Whether the pattern names the file, or a folder that it lies in."""
    while len(location) > len(root):
        if chosen.match(location):
            return True
        location = location.rpartition("/")[0]
    return False


def _local(root: str, source: str) -> Listing:
    if not os.path.exists(root):
        raise UserError(f"source: {source} does not exist")
    if not os.path.isdir(root):
        return Listing(root, [_found(root, os.stat(root))], [])
    unreadable: list[tuple[str, str]] = []
    files = list(_walk(root, unreadable))
    if any(folder == root for folder, _ in unreadable):
        raise UserError(f"source: {source} cannot be read ({unreadable[0][1]})")
    return Listing(root, files, unreadable)


def _walk(folder: str, unreadable: list[tuple[str, str]]) -> Iterator[Found]:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        unreadable.append((folder, error.strerror or str(error)))
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, unreadable)
            elif entry.is_dir():  # following it may lead back up
                unreadable.append((entry.path, "a link to a folder is not followed"))
            elif not stat.S_ISREG(entry.stat().st_mode):
                unreadable.append((entry.path, "a pipe, socket or device is no file"))
            else:
                yield _found(entry.path, entry.stat())
        except OSError as error:  # a link that leads nowhere, or to itself
            unreadable.append((entry.path, error.strerror or str(error)))


def _found(location: str, status: os.stat_result) -> Found:
    return Found(location, status.st_size, str(status.st_mtime_ns))


def _found_far(location: str, info: Mapping[str, Any]) -> Found:
    return Found(location, info["size"], str(info.get("ETag") or info.get("LastModified")))


def _remote(root: str, source: str) -> Listing:
    place = to_place(root)
    try:
        with plain_errors(place):
            found = place.fs.find(place.path, detail=True)  # type: ignore[union-attr]
    except OSError as error:
        raise UserError(f"source: {source} cannot be read ({error})") from None
    if not found:
        raise UserError(f"source: {source} does not exist")
    scheme = root.partition("://")[0]
    files = [
        _found_far(f"{scheme}://{name}", info)
        for name, info in found.items()
        if not name.endswith("/")  # what consoles write to show a folder
    ]
    return Listing(root, files, [])
