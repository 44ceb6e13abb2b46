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

from glmae_ray.blocks import Blocks, paste_plane
from glmae_ray.compiled import compiled


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
        _resize(source, axes, plane, reduced, how, is_rounded, voxels.reshape(len(voxels), -1))


@compiled
def _resize(source, axes, plane, reduced, code, is_rounded, out):  # type: ignore[no-untyped-def]
    """`reduced` holds the newest planes of the source at the size of the output's planes."""
    chunks, table, fill_value, start = source
    index_z, weight_z, index_y, weight_y, index_x, weight_x = axes
    kept, across = len(reduced), len(weight_x[0])
    row = np.empty(plane.shape[1], np.float32)
    total = np.empty(reduced.shape[1], np.float32)
    ready = np.uint32(0)  # unsigned: numba would look for negative ones
    for z in range(len(out)):
        for t in range(len(index_z)):
            while ready <= index_z[t, z]:
                paste_plane(chunks, table, fill_value, start, np.int64(ready), plane)
                place = reduced[ready % kept]
                for y in range(len(weight_y[0])):
                    _blend(plane, index_y[:, y], weight_y[:, y], row)
                    _pick(row, index_x, weight_x, place[y * across : (y + 1) * across])
                ready += np.uint32(1)
        _blend(reduced, index_z[:, z] % kept, weight_z[:, z], total)
        _store(total, code, is_rounded, out[z])


@compiled
def _blend(lines, index, weight, out):  # type: ignore[no-untyped-def]
    """Weighted sum of whole lines, two at a time: half the traffic of the sum so far."""
    pairs = len(index) // 2
    for pair in range(pairs):
        a, b = lines[index[2 * pair]], lines[index[2 * pair + 1]]
        weight_a, weight_b = weight[2 * pair], weight[2 * pair + 1]
        if pair == 0:
            for x in range(len(out)):
                out[x] = a[x] * weight_a + b[x] * weight_b
        else:
            for x in range(len(out)):
                out[x] = out[x] + a[x] * weight_a + b[x] * weight_b
    if 2 * pairs < len(index):
        a, weight_a = lines[index[2 * pairs]], weight[2 * pairs]
        for x in range(len(out)):
            out[x] += a[x] * weight_a


@compiled
def _pick(line, index, weight, out):  # type: ignore[no-untyped-def]
    """Weighted sum of single voxels of a line."""
    a, b, weight_a, weight_b = index[0], index[1], weight[0], weight[1]
    for x in range(len(out)):
        out[x] = line[a[x]] * weight_a[x] + line[b[x]] * weight_b[x]
    for t in range(2, len(index)):
        a, weight_a = index[t], weight[t]
        for x in range(len(out)):
            out[x] += line[a[x]] * weight_a[x]


@compiled
def _store(values, code, is_rounded, out):  # type: ignore[no-untyped-def]
    for n in range(len(out)):
        value = min(max(np.float64(values[n]), code.low), code.high) * code.scale + code.shift
        out[n] = np.rint(value) if is_rounded else value
