"""What a user may have done to every case on its way in: another spacing, a crop; pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.blocks import Blocks
from glmae_ray.resizing import axis_taps, resize
from glmae_ray.store.layout import pyramid_factors
from glmae_ray.store.pyramid import make_pyramid
from glmae_ray.store.statistics import BoxZYX, foreground_box
from glmae_ray.volume import Spacing, Volume

_LEVELS = 3  # of the pyramid on whose last level the foreground is looked for

Label = NDArray[Any] | None  # (Z, Y, X)


def resampled(volume: Volume, label: Label, *, spacing: Spacing) -> tuple[Volume, Label]:
    """A volume and its label map on a grid of another spacing that covers the same space.

    Intensities are linear, with a triangle filter as wide as a new voxel where voxels grow;
    labels are those of the nearest voxel. Axes keep their directions.

    Args:
        volume: Level 0.
        label: On the grid of `volume`.
        spacing: Wanted (Z, Y, X), mm.
    """
    ratio = np.asarray(spacing) / volume.spacing  # old voxels per new voxel
    sides = [max(1, round(side / times)) for side, times in zip(volume.shape, ratio, strict=True)]
    taps = [
        axis_taps(np.array([0.0, side * times]), 1, length, side)
        for side, times, length in zip(sides, ratio, volume.shape, strict=True)
    ]
    windows = tuple(slice(t.start, t.stop) for t in taps)
    array = np.empty((len(volume.array), *sides), volume.array.dtype)
    resize(Blocks.whole(volume.array[(slice(None), *windows)]), taps, array)
    affine = volume.affine.copy()
    affine[:3, :3] *= ratio
    affine[:3, 3] += volume.affine[:3, :3] @ ((ratio - 1) / 2)  # the centre of the first new voxel
    moved = Volume(array, affine, volume.modality, volume.case_id)
    if label is None:
        return moved, None
    nearest = [
        ((np.arange(side) + 0.5) * times).astype(np.int64).clip(0, length - 1)
        for side, times, length in zip(sides, ratio, volume.shape, strict=True)
    ]
    return moved, np.ascontiguousarray(label[np.ix_(*nearest)])


def cropped(volume: Volume, label: Label) -> tuple[Volume, Label]:
    """The foreground box of a volume, widened so that no label is cut off."""
    start, stop = _around(foreground_of(volume), label)
    window = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    affine = volume.affine.copy()
    affine[:3, 3] += volume.affine[:3, :3] @ start
    array = np.ascontiguousarray(volume.array[(slice(None), *window)])
    inside = None if label is None else np.ascontiguousarray(label[window])
    return Volume(array, affine, volume.modality, volume.case_id), inside


def foreground_of(volume: Volume) -> BoxZYX:
    """The foreground box of a volume that is in no store; see `foreground_box`."""
    factors = pyramid_factors(volume.shape, volume.spacing, _LEVELS)
    coarse = make_pyramid(volume, _LEVELS)[-1]
    return foreground_box(coarse, factor=factors[-1], shape=volume.shape, modality=volume.modality)


def _around(box: BoxZYX, label: Label) -> NDArray[np.int64]:
    """Start and stop (2, 3) of the box and all labels."""
    start, stop = np.array(box, np.int64)
    if label is not None and label.any():
        for axis in range(3):
            hit = np.flatnonzero(label.any(axis=tuple({0, 1, 2} - {axis})))
            start[axis] = min(start[axis], hit[0])
            stop[axis] = max(stop[axis], hit[-1] + 1)
    return np.stack([start, stop])
