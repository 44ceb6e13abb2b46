"""Boxes out of sharded arrays: few ranges are fetched, and each chunk is decoded once.

The boxes of one sample overlap: to decode the chunks that they share once is half the work, and
tensorstore, which takes each box for itself, needs twice the time (docs/design/0003-views.md).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from glmae_ray.blocks import Blocks
from glmae_ray.errors import DamagedError
from glmae_ray.store.ranges import File, Ranges, Span, Tail, merged
from glmae_ray.store.shards import NOWHERE
from glmae_ray.volume import Shape

_TAIL = 2**15 + 4  # bytes: the index of a shard of 2048 chunks
_HEADER = 16  # bytes of blosc's: sizes of the decoded and of the encoded chunk at 4 and 12

Box: TypeAlias = tuple[Shape, Shape]  # start and stop (exclusive) along Z, Y, X


@dataclass(frozen=True, eq=False)
class Shard:
    """What has to be known of an array before its chunks can be read.

    Attributes:
        file: Its only shard.
        shape: (Z, Y, X).
        chunk: Sides of a chunk, (Z, Y, X); it holds one channel.
        dtype: Of its voxels.
        fill_value: What chunks that were left out hold.
        ends: int64 (C, Z, Y, X, 2) of chunks: first byte and behind the last; -1 if left out.
    """

    file: File
    shape: Shape
    chunk: Shape
    dtype: np.dtype[Any]
    fill_value: float
    ends: NDArray[np.int64]

    def box(self, given: Sequence[Sequence[int]] | None) -> Box:
        """A box of this array, all of it for None.

        Raises:
            ValueError: It is empty or reaches outside.
        """
        if given is None:
            return (0, 0, 0), self.shape
        start, stop = ((int(z), int(y), int(x)) for z, y, x in given)
        sides = zip(start, stop, self.shape, strict=True)
        if not all(0 <= low < high <= side for low, high, side in sides):
            raise ValueError(f"{self.file.key}: box {start} to {stop} is not inside {self.shape}")
        return start, stop


_Answers: TypeAlias = tuple[Iterator[bytes | None], Iterator[Tail | None]]


class Opening:
    """A shard whose documents are on their way."""

    def __init__(self, files: Ranges, name: str, shard_key: str) -> None:
        """Ask for the array's document and for the end of its shard, both at once."""
        self._files, self._name, self._key = files, name, f"{name}/{shard_key}"
        self._lock = threading.Lock()
        self._asked: _Answers | None = self._ask()
        self._shard: Shard | None = None

    def result(self) -> Shard:
        """Wait for the documents; after a failure, another call asks anew.

        Raises:
            KeyError: There is no such array.
            UserError: The object store refuses.
            OSError: Disk or object store fail, or the array is damaged.
        """
        with self._lock:
            if self._shard is None:
                document, tail = self._asked or self._ask()
                self._asked = None
                raw = next(document)
                if raw is None:
                    raise KeyError(self._name)
                self._shard = self._read(raw, next(tail))
            return self._shard

    def _ask(self) -> _Answers:
        return self._files.whole(f"{self._name}/zarr.json"), self._files.tail(self._key, _TAIL)

    def _read(self, document: bytes, tail: Tail | None) -> Shard:
        try:
            metadata = json.loads(document)
            *channels, z, y, x = metadata["shape"]
            *_, deep, high, wide = metadata["codecs"][0]["configuration"]["chunk_shape"]
            dtype, fill_value = np.dtype(metadata["data_type"]), metadata["fill_value"]
        except (ValueError, LookupError, TypeError) as error:
            raise DamagedError(f"{self._name}/zarr.json is damaged: {error!r}") from None
        grid = (*(channels or [1]), -(-z // deep), -(-y // high), -(-x // wide))
        size = 16 * int(np.prod(grid)) + 4
        if tail is not None and len(tail.raw) < size:
            tail = next(self._files.tail(self._key, size))
        ends = _ends(tail and tail.raw, size, self._key).reshape(*grid, 2)
        file = File(self._key, int(ends.max(initial=0)) + size, tail.version if tail else "")
        return Shard(file, (z, y, x), (deep, high, wide), dtype, fill_value, ends)


def read_boxes(
    files: Ranges, boxes: Sequence[tuple[Shard, Box]], *, threads: int = 1
) -> list[Blocks]:
    """Read boxes; all ranges are asked for before the first chunk is decoded.

    Args:
        files: Where the shards are.
        boxes: Each in one of the shards.
        threads: How many decode.

    Raises:
        UserError: The object store refuses.
        OSError: Disk or object store fail, or a chunk is damaged.
    """
    inside: dict[Shard, list[Box]] = {}
    for shard, box in boxes:
        inside.setdefault(shard, []).append(box)
    wanted = {shard: _want(shard, those) for shard, those in inside.items()}
    buffers = _fetch(files, wanted, threads)
    return [
        Blocks(
            buffers[shard],
            wanted[shard].table,
            shard.dtype.type(shard.fill_value),
            start=start,
            shape=(stop[0] - start[0], stop[1] - start[1], stop[2] - start[2]),
        )
        for shard, (start, stop) in boxes
    ]


class _Wanted(NamedTuple):
    """The chunks of one shard that boxes need."""

    table: NDArray[np.int32]  # (C, Z, Y, X) of chunks: place in the buffer, -1 if left out
    spans: list[Span]  # in the buffer's order, which is the file's


def _want(shard: Shard, boxes: Sequence[Box]) -> _Wanted:
    needed = np.zeros(shard.ends.shape[:4], bool)
    for start, stop in boxes:
        sides = zip(start, stop, shard.chunk, strict=True)
        grid = (slice(low // side, -(-high // side)) for low, high, side in sides)
        needed[:, *grid] = True
    needed &= shard.ends[..., 0] >= 0
    ends = shard.ends[needed]
    order = np.argsort(ends[:, 0])
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order))
    table = np.full(needed.shape, -1, np.int32)
    table[needed] = places
    return _Wanted(table, [(start, stop) for start, stop in ends[order].tolist()])


def _fetch(
    files: Ranges, wanted: Mapping[Shard, _Wanted], threads: int
) -> dict[Shard, NDArray[Any]]:
    """The wanted chunks of each shard, (chunks, Z, Y, X)."""
    blosc.use_threads = False  # else chunks are decoded one after the other, under a lock
    buffers, asked = {}, []
    for shard, (_, spans) in wanted.items():
        buffers[shard] = np.empty((len(spans), *shard.chunk), shard.dtype)
        if not spans:  # nothing but fill value, perhaps no file at all
            continue
        groups = merged(spans, files.gap)
        pieces = files.spans(shard.file, [span for span, _ in groups])
        asked.append((shard, spans, groups, pieces))
    jobs = (
        (shard.file.key, raw, first, spans[members], buffers[shard][members])
        for shard, spans, groups, pieces in asked
        for ((first, _), members), raw in zip(groups, pieces, strict=True)
    )
    if threads == 1:
        for job in jobs:
            _decode(*job)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(lambda job: _decode(*job), jobs):
                pass
    return buffers


def _decode(key: str, raw: bytes, first: int, spans: Sequence[Span], out: NDArray[Any]) -> None:
    """Decode the chunks at `spans`, of which `raw` holds all bytes from `first` on."""
    view = memoryview(raw)
    for (start, stop), chunk in zip(spans, out, strict=True):
        encoded = view[start - first : stop - first]
        sizes = np.frombuffer(encoded[:_HEADER], "<u4") if len(encoded) >= _HEADER else None
        if sizes is None or (sizes[1], sizes[3]) != (chunk.nbytes, len(encoded)):
            raise DamagedError(f"{key} is damaged: no chunk begins at byte {start}")
        try:
            blosc.decompress(encoded, chunk)
        except RuntimeError:
            raise DamagedError(f"{key} is damaged: the chunk at byte {start}") from None


def _ends(tail: bytes | None, size: int, key: str) -> NDArray[np.int64]:
    """First byte of each chunk and behind its last, -1 where there is none, int64 (chunks, 2)."""
    if tail is None:  # nothing but fill value
        return np.full(((size - 4) // 16, 2), -1)
    raw, checksum = tail[-size:-4], tail[-4:]
    if len(raw) != size - 4 or google_crc32c.value(raw) != int.from_bytes(checksum, "little"):
        raise DamagedError(f"{key} is damaged: its index does not fit its checksum")
    places = np.frombuffer(raw, "<u8").reshape(-1, 2)
    ends = np.stack([places[:, 0], places.sum(axis=1)], axis=1)
    return np.where(places[:, :1] == NOWHERE, NOWHERE, ends).astype(np.int64)
