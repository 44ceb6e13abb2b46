"""Boxes and a store become views: fixed-shape int16 arrays, anti-aliased, the same on any machine.

A box is read from the coarsest pyramid level that still has the target size in it, and resized
along one axis after the other. All arithmetic is element by element in a fixed order, so the
result does not depend on threads, vector units or a matrix library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

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
    window: tuple[float, float]  # the intensities that become 0 and 1


@dataclass(frozen=True)
class Taps:
    """One axis of a resize: which source voxels make each output voxel, and their weights."""

    start: int  # first source voxel that is needed
    stop: int
    index: np.ndarray  # int64 (outputs, taps), counted from start
    weight: np.ndarray  # float32 (outputs, taps), each row sums to 1


def make_views(
    reader: Reader, source: Source, boxes: np.ndarray, *, size: Size
) -> tuple[np.ndarray, tuple[float, float]]:
    """Cut and resize the views of one kind; their boxes are read concurrently.

    Args:
        reader: The store.
        source: The case.
        boxes: int64 (V, 2, 3), level-0 voxels.
        size: Z, Y, X of each view.

    Returns:
        int16 (V, C, Z, Y, X) and the window in the units of that array. Integer cases keep
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
    return views, source.window if is_integer else _CODES


def choose_level(box: np.ndarray, factors: tuple[Size, ...], size: Size) -> int:
    """Coarsest level on which the box still has at least `size` voxels along every axis."""
    sides = box[1] - box[0]
    enough = [level for level, f in enumerate(factors) if np.all(sides >= np.multiply(f, size))]
    return max(enough, default=0)


def axis_taps(box: np.ndarray, factor: int, length: int, outputs: int) -> Taps:
    """Weights of a linear resize along one axis, widened to a triangle filter when shrinking.

    Output voxel centres divide the box evenly (torch's `align_corners=False`); voxels just
    outside the box take part, what lies outside the volume has no weight.

    Args:
        box: Start and stop in level-0 voxels.
        factor: Level-0 voxels per voxel of the level that is read.
        length: Voxels of level 0 along this axis.
        outputs: Voxels of the view along this axis.
    """
    step = (box[1] - box[0]) / (factor * outputs)
    centre = box[0] / factor + (np.arange(outputs) + 0.5) * step - 0.5
    reach = max(step, 1.0)
    first = np.floor(centre - reach).astype(np.int64) + 1
    index = first[:, None] + np.arange(int(np.ceil(2 * reach)))
    weight = np.maximum(0.0, 1 - np.abs(index - centre[:, None]) / reach)
    last = -(-length // factor) - 1
    weight[(index < 0) | (index > last)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    index = index.clip(0, last)
    start, stop = int(index.min()), int(index.max()) + 1
    return Taps(start, stop, index - start, weight.astype(np.float32))


def resize(crop: np.ndarray, taps: list[Taps]) -> np.ndarray:
    """Resize (C, Z, Y, X) to float32 (C, *outputs), the axis that shrinks most first."""
    sides = crop.shape[1:]
    order = sorted(range(3), key=lambda axis: len(taps[axis].index) / sides[axis])
    for axis in order:
        crop = _resize_axis(crop, taps[axis], axis + 1)
    return crop


def _resize_axis(crop: np.ndarray, taps: Taps, axis: int) -> np.ndarray:
    shape = [1] * crop.ndim
    shape[axis] = -1
    total: np.ndarray | None = None
    for index, weight in zip(taps.index.T, taps.weight.T, strict=True):
        term = crop.take(index, axis=axis) * weight.reshape(shape)
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None
    return total


def _encode(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map the window to the int16 codes; what lies outside is cut off."""
    (low, high), (first, last) = window, _CODES
    unit = ((values - low) / (high - low)).clip(0, 1)
    return first + unit * (last - first)
