"""What readers of single files share: voxels that lie in one block of a file, packed or not.

Nothing is taken on trust. A claim that the file cannot hold is refused before memory is taken for
it, a short file is an error, and a packed block is read to its end, where its checksum is.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from bz2 import BZ2File
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.store.scan import ReadError

# The most bytes that one byte of a file becomes. Deflate: zlib's technical notes. bzip2: a block
# of 45.9 million equal bytes takes 32. Text: a digit and a space for a number of eight bytes.
PACKINGS = {"raw": 1, "deflate": 1032, "bzip2": 1_500_000, "text": 8}

_GZIP_MAGIC = b"\x1f\x8b"
_ZLIB_OR_GZIP, _GZIP = 47, 31  # `wbits` of zlib
_PACKED_BYTES, _UNPACKED_BYTES = 2**18, 2**20  # at a time; the fastest pair that was tried
_LONGEST_NUMBER = 64  # characters


class Block(NamedTuple):
    """Where the voxels of one or several 3-D volumes lie in a file, x fastest."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # (X, Y, Z), then any others
    start: int | None = 0  # bytes of the file before the block; None: it is the file's end
    packing: str = "raw"  # a key of PACKINGS
    skip: int = 0  # unpacked bytes before the data
    packed_bytes: int | None = None  # of the block, where the header says it
    volume: int | None = None  # which one is wanted, where there are several
    interleaved: bool = False  # the first axis of the file, not the last, counts the volumes
    sealed: bool = False  # packed data that goes on after the last voxel is an error

    @property
    def volumes(self) -> int:
        """How many 3-D volumes there are."""
        return math.prod(self.shape[3:])

    @property
    def wanted(self) -> int:
        """Number of the wanted volume, from 0."""
        return (self.volume or 0) if self.volumes > 1 else 0

    @property
    def volume_bytes(self) -> int:
        """Unpacked size of one volume."""
        return math.prod(self.shape[:3]) * self.dtype.itemsize


def read_block(block: Block) -> NDArray[Any]:
    """Read the wanted volume: (X, Y, Z), x fastest, in the byte order of this machine.

    Raises:
        ReadError: truncated or unreadable.
        OSError: The system cannot read the file.
    """
    with block.path.open("rb") as file, damage_named(block.path):
        file.seek(_checked_start(file, block))
        stream = _unpacked(file, block)
        _skip(stream, block.skip)
        voxels = np.empty(block.shape[:3], block.dtype, order="F")
        flat = voxels.reshape(-1, order="F")
        if block.interleaved:
            _fill_from_interleaved(stream, flat, block)
            left = 0
        else:
            _skip(stream, block.wanted * block.volume_bytes)
            _fill(stream, flat)
            left = (block.volumes - 1 - block.wanted) * block.volume_bytes
        if block.packing != "raw":
            _finish(stream, block, left)
    if not voxels.dtype.isnative:
        voxels = voxels.byteswap(inplace=True).view(voxels.dtype.newbyteorder("="))
    return voxels


def is_gzip(path: Path) -> bool:
    """Whether a file is gzipped, by its first bytes: names are often wrong."""
    with path.open("rb") as file:
        return file.read(2) == _GZIP_MAGIC


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what a damaged stream raises into a `ReadError` with the file's name."""
    try:
        yield
    except EOFError as error:
        raise truncated(path) from error
    except zlib.error as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:  # the system's, not the decoder's
            raise
        raise _damaged(path, error) from error


def truncated(path: Path) -> ReadError:
    """The error of a file that ends too early."""
    return ReadError("truncated", f"{path}: shorter than its header says; copy it again")


def _damaged(path: Path, what: object) -> ReadError:
    return ReadError("unreadable", f"{path}: damaged ({what}); copy it again")


def _checked_start(file: io.BufferedReader, block: Block) -> int:
    """Where the block starts; refuses what cannot be before memory is taken for it."""
    size = os.fstat(file.fileno()).st_size
    claim = block.skip + block.volumes * block.volume_bytes
    start = size - claim if block.start is None else block.start
    held = size - start
    if start < 0 or claim > held * PACKINGS[block.packing] or held < (block.packed_bytes or 0):
        raise truncated(block.path)
    return start


def _unpacked(file: io.BufferedReader, block: Block) -> io.BufferedReader:
    if block.packing == "raw":
        return file
    if block.packing == "bzip2":
        parts = iter(partial(BZ2File(file).read, _UNPACKED_BYTES), b"")
    elif block.packing == "text":
        parts = _numbers(file, block)
    else:
        parts = _inflated(file, block.packed_bytes)
    return io.BufferedReader(_Parts(parts))


def _inflated(file: io.BufferedReader, packed_bytes: int | None) -> Iterator[bytes]:
    """What a zlib stream or the members of a gzip file hold; zeros may follow, nothing else.

    Takes 10 to 30 % less time than the gzip module: larger parts, and zlib itself checks the sums.
    """
    decoder, left = zlib.decompressobj(_ZLIB_OR_GZIP), packed_bytes
    while packed := file.read(_PACKED_BYTES if left is None else min(_PACKED_BYTES, left)):
        left = None if left is None else left - len(packed)
        while packed:
            if decoder.eof:
                packed = packed.lstrip(b"\0")
                if not packed:
                    break
                decoder = zlib.decompressobj(_GZIP)
            yield decoder.decompress(packed, _UNPACKED_BYTES)
            packed = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
    if not decoder.eof:
        raise EOFError


def _numbers(file: io.BufferedReader, block: Block) -> Iterator[bytes]:
    """Numbers written as text, in the bytes that the block's dtype has for them."""
    rest = b""
    while text := file.read(_PACKED_BYTES):
        words = (rest + text).split()
        rest = words.pop() if words and not text[-1:].isspace() else b""
        if max(map(len, [rest, *words])) > _LONGEST_NUMBER or b"_" in text:  # 1_0 is Python's
            raise _damaged(block.path, "no numbers")
        yield _parsed(words, block)
    yield _parsed([rest] if rest else [], block)


def _parsed(words: list[bytes], block: Block) -> bytes:
    number = float if block.dtype.kind == "f" else int
    try:
        with np.errstate(over="ignore"):  # infinity is found among the voxels
            return np.array([number(word) for word in words], block.dtype).tobytes()
    except (ValueError, OverflowError) as error:
        raise _damaged(block.path, f"{error}; {block.dtype.name} is expected") from error


def _skip(stream: io.BufferedReader, count: int) -> None:
    if count and stream.seekable():
        stream.seek(count, os.SEEK_CUR)
        return
    while count:
        part = stream.read(min(_UNPACKED_BYTES, count))
        if not part:
            raise EOFError
        count -= len(part)


def _fill(stream: io.BufferedReader, array: NDArray[Any]) -> None:
    space, done = array.view(np.uint8).data, 0
    while done < len(space):
        count = stream.readinto(space[done:])
        if not count:
            raise EOFError
        done += count


def _fill_from_interleaved(stream: io.BufferedReader, array: NDArray[Any], block: Block) -> None:
    step = max(1, _UNPACKED_BYTES // (block.volumes * block.dtype.itemsize))
    for first in range(0, len(array), step):
        wanted = array[first : first + step]
        part = np.empty((len(wanted), block.volumes), block.dtype)
        _fill(stream, part.reshape(-1))
        wanted[:] = part[:, block.wanted]


def _finish(stream: io.BufferedReader, block: Block, left: int) -> None:
    """Read on to the checksum; `left` bytes of other volumes must come."""
    while part := stream.read(_UNPACKED_BYTES):
        left -= len(part)
    if left > 0:
        raise EOFError
    if left < 0 and block.sealed:
        raise _damaged(block.path, f"{-left} bytes more than its header says")


class _Parts(io.RawIOBase):
    """Parts of bytes as one stream."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts, self._part = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, space: Any) -> int:
        while not self._part:
            part = next(self._parts, None)
            if part is None:
                return 0
            self._part = memoryview(part)
        count = min(len(space), len(self._part))
        space[:count] = self._part[:count]
        self._part = self._part[count:]
        return count
