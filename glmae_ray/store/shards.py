"""An array as the bytes of one Zarr v3 shard: inner chunks compressed one by one, then an index.

tensorstore can write shards too, but copies the array first and takes twice as long.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

NOWHERE = 2**64 - 1  # offset and length of a chunk without data
_SHUFFLES = {"noshuffle": blosc.NOSHUFFLE, "shuffle": blosc.SHUFFLE}


def encode_shard(array: NDArray[Any], metadata: Mapping[str, Any]) -> bytes | None:
    """Encode an array whose only shard it is; chunks of nothing but the fill value are left out.

    Args:
        array: Voxels (Z, Y, X) or (C, Z, Y, X).
        metadata: What `layout.array_metadata` gave for it.

    Returns:
        Content of the shard; None where nothing is left.
    """
    sharding = metadata["codecs"][0]["configuration"]
    nothing = np.full(sharding["chunk_shape"], metadata["fill_value"], array.dtype)
    nothing_raw = nothing.tobytes()
    index, parts, end = [], [], 0
    for chunk in _chunks(array, nothing):
        raw = chunk.tobytes()
        if raw == nothing_raw:
            index.append((NOWHERE, NOWHERE))
            continue
        parts.append(_compressed(raw, sharding["codecs"][1]["configuration"]))
        index.append((end, len(parts[-1])))
        end += len(parts[-1])
    return b"".join([*parts, _sealed(index)]) if parts else None


def _chunks(array: NDArray[Any], nothing: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """All chunks in C order; those at the end of an axis are filled up to full size."""
    steps = [range(0, side, part) for side, part in zip(array.shape, nothing.shape, strict=True)]
    for corner in itertools.product(*steps):
        place = (slice(n, n + part) for n, part in zip(corner, nothing.shape, strict=True))
        chunk = array[*place]
        if chunk.shape != nothing.shape:
            whole = nothing.copy()
            whole[*map(slice, chunk.shape)] = chunk
            chunk = whole
        yield chunk


def _compressed(raw: bytes, settings: Mapping[str, Any]) -> bytes:
    blosc.use_threads = False  # whoever writes many cases has a task per core already
    return blosc.compress(
        np.frombuffer(raw, f"u{settings['typesize']}"),
        settings["cname"].encode(),
        settings["clevel"],
        _SHUFFLES[settings["shuffle"]],
        settings["blocksize"],
    )


def _sealed(index: Sequence[tuple[int, int]]) -> bytes:
    """The index with its checksum, CRC-32C as 4 bytes, little end first."""
    raw = np.array(index, "<u8").tobytes()
    return raw + google_crc32c.value(raw).to_bytes(4, "little")
