"""Places: local paths and `s3://` URLs through one interface, and files that appear whole.

A local place is a `pathlib.Path`; a URL is a `UPath` of universal-pathlib with the same methods,
over fsspec. Endpoint and credentials of S3 come from the usual variables (`AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, ...).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from upath import UPath

    Place: TypeAlias = Path | UPath


def is_url(location: str | Place) -> bool:
    """Whether a location names an object store, not a path of this machine."""
    return "://" in str(location)


def to_place(location: str | Place) -> Place:
    """A location as a thing with the methods of `pathlib.Path`; local ones are made absolute."""
    if not is_url(location):
        return Path(str(location)).absolute()
    from upath import UPath

    # A listing that is remembered would hide what another process has written since.
    return UPath(str(location), use_listings_cache=False)


def publish(place: Place, data: bytes | str) -> None:
    """Write a file that is, whatever is killed, the old one or the new one."""
    raw = data.encode() if isinstance(data, str) else data
    if not isinstance(place, Path):
        place.write_bytes(raw)  # an object store shows an object only when it is complete
        return
    unfinished = place.with_name(f"{place.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())  # the new name must not reach the disk before the content
    unfinished.replace(place)
