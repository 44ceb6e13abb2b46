"""Resize arrays along one axis after the other, anti-aliased; the same numbers on any machine.

All arithmetic is element by element in a fixed order, so the result does not depend on threads,
vector units or a matrix library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taps:
    """One axis of a resize: which source voxels make each output voxel, and their weights."""

    start: int  # first source voxel that is needed
    stop: int
    index: np.ndarray  # int64 (outputs, taps), counted from start
    weight: np.ndarray  # float32 (outputs, taps), each row sums to 1


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
