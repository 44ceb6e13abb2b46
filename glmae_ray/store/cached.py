"""A cache of an object store on a node's own disk, of bounded size and shared by its processes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import diskcache

from glmae_ray.config_data import CacheLimits
from glmae_ray.store.ranges import File, Ranges, Span, Tail

_BLOCK = 2**20  # bytes: a request's worth
_FAILURES = (OSError, sqlite3.Error)


class CachedRanges:
    """`Ranges` of an object store whose bytes stay on this machine, the oldest making room.

    The parts of files are kept as blocks of a mebibyte. Documents and ends of files, which say
    what version of a file there is, are asked for each time.
    """

    def __init__(self, files: Ranges, limits: CacheLimits, *, store: str) -> None:
        """Open the cache, or make it.

        Args:
            files: The object store.
            limits: Where the cache is, and how large.
            store: Name of the store; several may share a cache.
        """
        self.gap, self._files, self._store = files.gap, files, store
        folder = Path(limits.folder)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds scans
        self._blocks = diskcache.Cache(
            str(folder), size_limit=limits.size, eviction_policy="least-recently-stored"
        )

    def whole(self, key: str) -> Iterator[bytes | None]:
        """See `Ranges`."""
        return self._files.whole(key)

    def tail(self, key: str, size: int) -> Iterator[Tail | None]:
        """See `Ranges`."""
        return self._files.tail(key, size)

    def spans(self, file: File, spans: Sequence[Span]) -> Iterator[bytes]:
        """See `Ranges`."""
        needed = {n for start, stop in spans for n in range(start // _BLOCK, -(-stop // _BLOCK))}
        found = {n: self._kept(file, n) for n in sorted(needed)}
        runs = _runs([number for number, block in found.items() if block is None])
        asked = [(first * _BLOCK, min(behind * _BLOCK, file.size)) for first, behind in runs]
        return self._pieces(file, spans, found, asked, self._files.spans(file, asked))

    def _pieces(
        self,
        file: File,
        spans: Sequence[Span],
        blocks: dict[int, bytes | None],
        asked: Sequence[Span],
        answers: Iterator[bytes],
    ) -> Iterator[bytes]:
        for (start, _), raw in zip(asked, answers, strict=True):
            for begin in range(0, len(raw), _BLOCK):
                number, block = (start + begin) // _BLOCK, raw[begin : begin + _BLOCK]
                blocks[number] = block
                with suppress(*_FAILURES):  # a full disk: what is not kept is fetched again
                    self._blocks.set(self._name(file, number), block, retry=True)
        for start, stop in spans:
            first, behind = start // _BLOCK, -(-stop // _BLOCK)
            raw = b"".join(blocks[number] or b"" for number in range(first, behind))
            yield raw[start - first * _BLOCK : stop - first * _BLOCK]

    def _kept(self, file: File, number: int) -> bytes | None:
        try:
            return self._blocks.get(self._name(file, number), retry=True)
        except _FAILURES:  # of the cache, not of the case
            return None

    def _name(self, file: File, number: int) -> str:
        return f"{self._store}/{file.key} {file.version} {number}"


def _runs(numbers: Sequence[int]) -> list[Span]:
    """Rising numbers as ranges: first, and behind the last."""
    runs: list[Span] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
