"""A box of an array that lies in chunks, put together plane by plane where it is used."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.compiled import compiled


class Blocks(NamedTuple):
    """A box (C, Z, Y, X) of a chunked array; boxes may share their chunks.

    Attributes:
        chunks: (chunks, Z, Y, X), C-contiguous.
        table: int32 (C, Z, Y, X) of the array's grid of chunks: which one, -1 for none.
        fill_value: Of the chunks' dtype: what is where there is no chunk.
        start: Z, Y, X of the box in the array.
        shape: (Z, Y, X) of the box.
    """

    chunks: NDArray[Any]
    table: NDArray[np.int32]
    fill_value: Any
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    @classmethod
    def whole(cls, array: NDArray[Any]) -> Blocks:
        """An array (C, Z, Y, X) as blocks: a chunk a channel."""
        table = np.arange(len(array), dtype=np.int32).reshape(-1, 1, 1, 1)
        z, y, x = array.shape[1:]
        chunks = np.ascontiguousarray(array)
        return cls(chunks, table, array.dtype.type(0), (0, 0, 0), (z, y, x))

    @property
    def channels(self) -> int:
        """C."""
        return len(self.table)

    def array(self) -> NDArray[Any]:
        """All of it, (C, Z, Y, X)."""
        box = np.empty((self.channels, *self.shape), self.chunks.dtype)
        for channel, voxels in zip(self.table, box, strict=True):
            _paste(self.chunks, channel, self.fill_value, self.start, voxels)
        return box


@compiled
def _paste(chunks, table, fill_value, start, out):  # type: ignore[no-untyped-def]
    for z in range(len(out)):
        paste_plane(chunks, table, fill_value, start, z, out[z])


@compiled
def paste_plane(chunks, table, fill_value, start, z, out):  # type: ignore[no-untyped-def]
    """Fill `out` (Y, X) with plane `z` of a box that begins at `start`; table (Z, Y, X)."""
    deep, high, wide = chunks.shape[1:]
    flat = chunks.reshape(-1)
    rows, columns = out.shape
    z_grid, z_inside = divmod(start[0] + z, deep)
    first_x = start[2] // wide
    for y in range(rows):
        y_grid, y_inside = divmod(start[1] + y, high)
        line = out[y]
        x, x_grid, inside = 0, first_x, start[2] - first_x * wide
        while x < columns:
            count = min(wide - inside, columns - x)
            place = table[z_grid, y_grid, x_grid]
            here = np.uint64(x)  # unsigned: numba would look for negative ones
            if place < 0:
                for n in range(np.uint64(count)):
                    line[here + n] = fill_value
            else:
                there = np.uint64(((place * deep + z_inside) * high + y_inside) * wide + inside)
                for n in range(np.uint64(count)):
                    line[here + n] = flat[there + n]
            x, x_grid, inside = x + count, x_grid + 1, 0
