"""A box of an array that lies in chunks, put together plane by plane where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.compiled import paste, pick


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
            paste(self.chunks, channel, self.fill_value, self.start, voxels)
        return box

    def pick(
        self, places: Sequence[NDArray[np.int64]], values: NDArray[Any], out: NDArray[Any]
    ) -> None:
        """Take single voxels of the first channel, without putting the box together.

        Args:
            places: Along Z, Y and X, which voxels of the array; inside the box.
            values: (65536,) of the result's dtype: what a voxel of uint8 or int16 becomes; negative
                ones count from the end.
            out: As many voxels along each axis as it has places.
        """
        sides = zip(places, self.chunks.shape[1:], strict=True)
        axes = [part for place, side in sides for part in divmod(place, side)]
        pick(self.chunks, self.table[0], self.fill_value, tuple(axes), values, out)
