"""What the index says about voxels: foreground box, robust intensities, label counts; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.volume import Shape

BoxZYX = tuple[Shape, Shape]  # start and stop (exclusive), level-0 voxels

_TISSUE_HU = -500  # between air with lung (below) and fat (-100); our decision
_TISSUE_SHARE = 0.1  # of the robust range, where units are arbitrary; our decision
_PERCENTS = (0.5, 50.0, 99.5)
_NAMES = ("minimum", "maximum", "p0_5", "p50", "p99_5", "mean", "std")
_SMALLEST_SIDE = 8  # voxels of a foreground box
_RUN = 2**17  # voxels counted at a time: a megabyte once they are widened to int64


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


def intensities(array: NDArray[Any], box: BoxZYX) -> dict[str, list[float]]:
    """Minimum, maximum, percentiles 0.5, 50 and 99.5, mean and std in a box, each per channel.

    Percentiles are values that occur (no interpolation), so integers stay integers.

    Args:
        array: Level 0 (C, Z, Y, X), int16 or float32.
        box: Where to look, level-0 voxels.
    """
    (z0, y0, x0), (z1, y1, x1) = box
    inside = array[:, z0:z1, y0:y1, x0:x1]
    describe = _of_integers if inside.dtype == np.int16 else _of_floats
    rows = [describe(channel) for channel in inside]
    return {name: [float(row[n]) for row in rows] for n, name in enumerate(_NAMES)}


def label_counts(label: NDArray[Any]) -> dict[int, int]:
    """Voxels of each value other than 0 in a label map (Z, Y, X) of uint8 or int16."""
    values, counts = _counted(run[run != 0] for run in _runs(label))
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def tissue_above(low: float, high: float, *, modality: str) -> float:
    """The intensity that air does not exceed.

    Args:
        low: Percentile 0.5 of the intensities.
        high: Percentile 99.5.
        modality: "CT" means HU.
    """
    return _TISSUE_HU if modality.upper() == "CT" else low + _TISSUE_SHARE * (high - low)


def _tissue(channel: NDArray[Any], modality: str) -> NDArray[np.bool_]:
    return channel > tissue_above(*np.percentile(channel, (0.5, 99.5)), modality=modality)


def _grown(low: int, high: int, side: int) -> tuple[int, int]:
    """Widen a range to the smallest side a box may have, without leaving the volume."""
    missing = max(0, min(_SMALLEST_SIDE, side) - (high - low))
    low = max(0, min(low - missing // 2, side - (high - low) - missing))
    return low, max(high, low + min(_SMALLEST_SIDE, side))


def _of_integers(channel: NDArray[np.int16]) -> tuple[float, ...]:
    """Exact, from counts: a sort of a large CT takes a second and a copy."""
    values, counts = _counted(_runs(channel))
    mean = np.average(values, weights=counts)
    variance = np.average((values - mean) ** 2, weights=counts)
    ranks = np.searchsorted(np.cumsum(counts), _ranks(channel.size), side="right")
    return values[0], values[-1], *values[ranks], mean, np.sqrt(variance)


def _of_floats(channel: NDArray[np.float32]) -> tuple[float, ...]:
    mean = channel.mean(dtype=np.float64)
    squares = sum(np.square(plane - mean).sum() for plane in channel)
    ranks = _ranks(channel.size)
    percentiles = np.partition(channel, ranks, axis=None)[ranks]
    return channel.min(), channel.max(), *percentiles, mean, np.sqrt(squares / channel.size)


def _ranks(size: int) -> list[int]:
    return [int(percent / 100 * (size - 1)) for percent in _PERCENTS]


def _runs(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """All voxels of a (Z, Y, X) array in flat parts, small enough for a processor's cache."""
    planes = max(1, _RUN // array[0].size)
    for first in range(0, len(array), planes):
        yield array[first : first + planes].reshape(-1)


def _counted(runs: Iterable[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The values that occur in flat parts of uint8 or int16, in order, and how often each does."""
    counts = np.zeros(2**16, np.int64)
    for run in runs:
        # Counting needs numbers from 0: seen as uint16, -1 is 65535.
        found = np.bincount(run.astype(np.int16, copy=False).view(np.uint16))
        counts[: len(found)] += found
    counts = np.roll(counts, 2**15)  # negative values first
    present = np.flatnonzero(counts)
    return present - 2**15, counts[present]
