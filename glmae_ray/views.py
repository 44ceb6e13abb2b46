"""Boxes and a store become views: fixed-shape int16 arrays, anti-aliased, the same on any machine.

A box is read from the coarsest pyramid level that still has the target size in it, and resized
along one axis after the other. All arithmetic is element by element in a fixed order, so the
result does not depend on threads, vector units or a matrix library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from glmae_ray.resizing import axis_taps, resize

Size = tuple[int, int, int]
Box = Sequence[Sequence[int]]  # start and stop along Z, Y, X

# Views of floating-point cases span these codes between the ends of their window.
_CODES = (-32767.0, 32767.0)


class Reader(Protocol):
    """What a view needs of a store."""

    def read_many(self, requests: Sequence[tuple[str, int, Box]]) -> list[np.ndarray]:
        """Read boxes (case, level, box in that level's voxels) as (C, Z, Y, X) arrays."""


class Source(NamedTuple):
    """The facts about one case that view making needs."""

    case_id: str
    shape: Size  # level 0
    factors: tuple[Size, ...]  # level-0 voxels per voxel of each level
    window: np.ndarray  # float64 (C, 2), the intensities that become 0 and 1


def make_views(
    reader: Reader, source: Source, boxes: np.ndarray, *, size: Size
) -> tuple[np.ndarray, np.ndarray]:
    """Cut and resize the views of one kind; their boxes are read concurrently.

    Args:
        reader: The store.
        source: The case.
        boxes: int64 (V, 2, 3), level-0 voxels.
        size: Z, Y, X of each view.

    Returns:
        int16 (V, C, Z, Y, X) and the window (C, 2) in the units of that array. Integer cases keep
        their intensities; floating-point ones are spread over the int16 range.
    """
    levels = [choose_level(box, source.factors, size) for box in boxes]
    plans = [
        [
            axis_taps(box[:, axis], source.factors[level][axis], source.shape[axis], size[axis])
            for axis in range(3)
        ]
        for box, level in zip(boxes, levels, strict=True)
    ]
    requests = [
        (source.case_id, level, (tuple(t.start for t in taps), tuple(t.stop for t in taps)))
        for taps, level in zip(plans, levels, strict=True)
    ]
    crops = reader.read_many(requests)
    views = np.empty((len(boxes), crops[0].shape[0], *size), dtype=np.int16)
    is_integer = np.issubdtype(crops[0].dtype, np.integer)
    for view, crop, taps in zip(views, crops, plans, strict=True):
        resized = resize(crop, taps)
        view[:] = np.rint(resized if is_integer else _encode(resized, source.window))
    return views, source.window if is_integer else np.tile(_CODES, (len(source.window), 1))


def choose_level(box: np.ndarray, factors: tuple[Size, ...], size: Size) -> int:
    """Coarsest level on which the box still has at least `size` voxels along every axis."""
    sides = box[1] - box[0]
    enough = [level for level, f in enumerate(factors) if np.all(sides >= np.multiply(f, size))]
    return max(enough, default=0)


def _encode(values: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Map each channel's window to the int16 codes; what lies outside is cut off."""
    low, high = window.astype(np.float32).T[:, :, None, None, None]
    first, last = _CODES
    unit = ((values - low) / (high - low)).clip(0, 1)
    return first + unit * (last - first)
