"""Byte ranges of files, asked for at once and handed over one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

from glmae_ray.errors import DamagedError

_MOST = 2**23  # bytes of a range, that several threads may share the work and S3 the requests
Span = tuple[int, int]  # first byte, and the one behind the last


class File(NamedTuple):
    """A file whose parts are read.

    Attributes:
        key: Its path, relative to the folder.
        size: In bytes.
        version: Another one has other content; empty where nobody tells.
    """

    key: str
    size: int
    version: str


class Tail(NamedTuple):
    """The end of a file, and the file's version."""

    raw: bytes
    version: str


class Ranges(Protocol):
    """The files below a folder. A `key` is a path relative to it.

    Attributes:
        gap: Ranges that are closer than this many bytes are cheaper as one.
    """

    gap: int

    def whole(self, key: str) -> Iterator[bytes | None]:
        """Begin to read a file; the only item is its content, None where there is none."""

    def tail(self, key: str, size: int) -> Iterator[Tail | None]:
        """Begin to read the last bytes of a file, all of it where it is shorter; as `whole`."""

    def spans(self, file: File, spans: Sequence[Span]) -> Iterator[bytes]:
        """Begin to read ranges of a file; their bytes come in order.

        Raises:
            UserError: The object store refuses.
            OSError: Disk or object store fail, or the file ends too early.
        """


class LocalRanges:
    """Files of this machine's file systems."""

    gap = 2**14

    def __init__(self, folder: Path) -> None:
        """Name the folder; nothing is touched."""
        self._folder = folder

    def whole(self, key: str) -> Iterator[bytes | None]:
        """See `Ranges`."""
        yield self._last(key, None)

    def tail(self, key: str, size: int) -> Iterator[Tail | None]:
        """See `Ranges`."""
        raw = self._last(key, size)
        yield None if raw is None else Tail(raw, "")

    def spans(self, file: File, spans: Sequence[Span]) -> Iterator[bytes]:
        """See `Ranges`. Not mapped into memory: a disk that fails would end the process."""
        place = self._folder / file.key
        with place.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):  # the system fetches all of them meanwhile
                for start, stop in spans:
                    advice = os.POSIX_FADV_WILLNEED
                    os.posix_fadvise(opened.fileno(), start, stop - start, advice)
            for start, stop in spans:
                raw = os.pread(opened.fileno(), stop - start, start)
                while len(raw) < stop - start:  # network file systems may hand over parts
                    more = os.pread(opened.fileno(), stop - start - len(raw), start + len(raw))
                    if not more:
                        raise DamagedError(f"{place} ends at byte {start + len(raw)}")
                    raw += more
                yield raw

    def _last(self, key: str, size: int | None) -> bytes | None:
        try:
            with (self._folder / key).open("rb") as file:
                if size is not None:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - size))
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return None


def merged(spans: Sequence[Span], gap: int) -> list[tuple[Span, slice]]:
    """Put neighbours together where at most `gap` bytes lie between them, some mebibytes at most.

    Args:
        spans: In rising order, none inside another.
        gap: In bytes.

    Returns:
        Each longer range, and which of the given ones lie in it.
    """
    edges = [0] if spans else []
    for number in range(1, len(spans)):
        is_far = spans[number][0] - spans[number - 1][1] > gap
        if is_far or spans[number][1] - spans[edges[-1]][0] > _MOST:
            edges.append(number)
    if spans:
        edges.append(len(spans))
    return [
        ((spans[first][0], spans[behind - 1][1]), slice(first, behind))
        for first, behind in pairwise(edges)
    ]
