"""Files of an item on this machine: themselves where they are local, else a copy for as long."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glmae_ray.errors import UserError
from glmae_ray.paths import is_url, plain_errors, to_place
from glmae_ray.store.scan import ReadError


@contextmanager
def local_files(locations: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Paths by location. Copies go at the end, and never hold more than one item's files.

    Raises:
        ReadError: unreadable, where a file cannot be fetched; and what the block raises, with
            the location in place of its copy's path.
    """
    remote = [place for place in locations if is_url(place)]
    if not remote:
        yield {place: Path(place) for place in locations}
        return
    with tempfile.TemporaryDirectory(prefix="glmae-") as folder:
        # A folder for a folder: headers find their data files, and equal names do not meet.
        parents = {parent: n for n, parent in enumerate({p.rpartition("/")[0] for p in remote})}
        copies = {p: Path(folder, str(parents[p.rpartition("/")[0]]), Path(p).name) for p in remote}
        for place, copy in copies.items():
            _fetch(place, copy)
        try:
            yield {place: copies.get(place) or Path(place) for place in locations}
        except ReadError as error:
            message = error.message
            for place, copy in copies.items():
                message = message.replace(str(copy), place)
            raise ReadError(error.reason, message) from error


def _fetch(location: str, copy: Path) -> None:
    place = to_place(location)
    copy.parent.mkdir(exist_ok=True)
    try:
        with plain_errors(place):
            place.fs.get_file(place.path, str(copy))  # type: ignore[union-attr]
    except (OSError, UserError) as error:
        reason = " ".join(str(error).split())
        raise ReadError("unreadable", f"{location}: {reason}; restore it") from error
