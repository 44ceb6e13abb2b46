"""What the index says about a volume's intensities: foreground box, robust statistics; pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.volume import Shape

BoxZYX = tuple[Shape, Shape]  # start and stop (exclusive), level-0 voxels

_TISSUE_HU = -500  # between air with lung (below) and fat (-100); our decision
_TISSUE_SHARE = 0.1  # of the robust range, where units are arbitrary; our decision
_PERCENTS = (0.5, 50.0, 99.5)
_SMALLEST_SIDE = 8  # voxels of a foreground box


def foreground_box(coarse: NDArray[Any], *, factor: Shape, shape: Shape, modality: str) -> BoxZYX:
    """Bounding box of tissue, in level-0 voxels (Z, Y, X).

    Looked for on the coarsest pyramid level, where averaging has removed specks. Tissue is what
    lies above -500 HU in CT, and above a tenth of the robust range in anything else, in any
    channel. Where nothing does, the box is the whole volume.

    Args:
        coarse: Coarsest level (C, Z, Y, X).
        factor: Level-0 voxels per coarse voxel, (Z, Y, X).
        shape: Level 0, (Z, Y, X).
        modality: "CT" means HU.
    """
    mask = np.any([_tissue(channel, modality) for channel in coarse], axis=0)
    if not mask.any():
        return (0, 0, 0), shape
    sides = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))
        low, high = int(hit[0]) * factor[axis], (int(hit[-1]) + 1) * factor[axis]
        sides.append(_grown(low, min(high, shape[axis]), shape[axis]))
    (z0, z1), (y0, y1), (x0, x1) = sides
    return (z0, y0, x0), (z1, y1, x1)


def intensities(array: NDArray[Any], box: BoxZYX) -> dict[str, float]:
    """Minimum, maximum, percentiles 0.5, 50 and 99.5, mean and std of all channels in a box.

    Percentiles are values that occur (no interpolation), so integers stay integers.

    Args:
        array: Level 0 (C, Z, Y, X).
        box: Where to look, level-0 voxels.
    """
    (z0, y0, x0), (z1, y1, x1) = box
    inside = array[:, z0:z1, y0:y1, x0:x1]
    return _of_integers(inside) if inside.dtype == np.int16 else _of_floats(inside)


def _tissue(channel: NDArray[Any], modality: str) -> NDArray[np.bool_]:
    if modality.upper() == "CT":
        return channel > _TISSUE_HU
    low, high = np.percentile(channel, (0.5, 99.5))
    return channel > low + _TISSUE_SHARE * (high - low)


def _grown(low: int, high: int, side: int) -> tuple[int, int]:
    """Widen a range to the smallest side a box may have, without leaving the volume."""
    missing = max(0, min(_SMALLEST_SIDE, side) - (high - low))
    low = max(0, min(low - missing // 2, side - (high - low) - missing))
    return low, max(high, low + min(_SMALLEST_SIDE, side))


def _of_integers(inside: NDArray[np.int16]) -> dict[str, float]:
    """Exact, from counts: a sort of a large CT takes a second and a copy."""
    counts = np.zeros(2**16, np.int64)
    for channel in inside:
        for plane in channel:  # bincount widens to int64 what it is given
            counts += np.bincount(plane.reshape(-1).astype(np.int64) + 2**15, minlength=2**16)
    values = np.flatnonzero(counts) - 2**15
    counts = counts[counts > 0]
    mean = np.average(values, weights=counts)
    variance = np.average((values - mean) ** 2, weights=counts)
    ranks = np.searchsorted(np.cumsum(counts), _ranks(inside.size), side="right")
    return _named(values[0], values[-1], *values[ranks], mean, np.sqrt(variance))


def _of_floats(inside: NDArray[np.float32]) -> dict[str, float]:
    mean = inside.mean(dtype=np.float64)
    squares = [np.square(plane - mean).sum() for channel in inside for plane in channel]
    ordered = np.partition(inside, _ranks(inside.size), axis=None)
    percentiles = ordered[_ranks(inside.size)]
    deviation = np.sqrt(sum(squares) / inside.size)
    return _named(inside.min(), inside.max(), *percentiles, mean, deviation)


def _ranks(size: int) -> list[int]:
    return [int(percent / 100 * (size - 1)) for percent in _PERCENTS]


def _named(*numbers: Any) -> dict[str, float]:
    names = ("minimum", "maximum", "p0_5", "p50", "p99_5", "mean", "std")
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}
