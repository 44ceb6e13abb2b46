"""Resize arrays along one axis after the other, anti-aliased; the same numbers on any machine.

Each output voxel is a sum of products in a fixed order, in float32 without fused operations, so
the result does not depend on threads, vector units or a matrix library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.blocks import Blocks
from glmae_ray.compiled import resize_planes


@dataclass(frozen=True)
class Taps:
    """One axis of a resize: which source voxels make each output voxel, and their weights."""

    start: int  # first source voxel that is needed
    stop: int
    index: np.ndarray  # uint32 (taps, outputs), counted from start, rising along outputs
    weight: np.ndarray  # float32 (taps, outputs), each column sums to 1


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
    index = first + np.arange(int(np.ceil(2 * reach)))[:, None]
    weight = np.maximum(0.0, 1 - np.abs(index - centre) / reach)
    last = -(-length // factor) - 1
    weight[(index < 0) | (index > last)] = 0.0
    weight /= weight.sum(axis=0)
    index = index.clip(0, last)
    start, stop = int(index.min()), int(index.max()) + 1
    return Taps(start, stop, (index - start).astype(np.uint32), weight.astype(np.float32))


class Code(NamedTuple):
    """What is stored for an intensity: cut off outside [low, high], times `scale`, plus `shift`."""

    low: float
    high: float
    scale: float
    shift: float


AS_THEY_ARE = Code(-math.inf, math.inf, 1.0, 0.0)


def resize(box: Blocks, taps: list[Taps], out: NDArray[Any], *, code: Sequence[Code] = ()) -> None:
    """Resize a box plane by plane, along Y, then X, then Z.

    Args:
        box: int16 or float32 (C, Z, Y, X), from `start` to `stop` of each axis.
        taps: Of Z, Y and X.
        out: (C, Z, Y, X), C-contiguous, as many voxels along each axis as its taps have outputs.
            Of integers: values are rounded to the nearest, halves to even. Of float32: not.
        code: What is stored for an intensity, one a channel; the intensity itself without.
    """
    axes = tuple(array for axis in taps for array in (axis.index, axis.weight))
    reduced = np.empty((len(taps[0].index), out[0, 0].size), np.float32)
    plane, is_rounded = np.empty(box.shape[1:], box.chunks.dtype), out.dtype.kind == "i"
    for channel, voxels in enumerate(out):
        source = (box.chunks, box.table[channel], box.fill_value, box.start)
        how = code[channel] if code else AS_THEY_ARE
        resize_planes(
            source, axes, plane, reduced, how, is_rounded, voxels.reshape(len(voxels), -1)
        )
