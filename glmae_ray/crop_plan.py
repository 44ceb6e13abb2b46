"""The plan of finetuning: sample number -> case, boxes of its crops, seeds; pure as `sampling`.

Crops are foreground-balanced: a stated share of them has its centre on a voxel of a structure, the
structure drawn evenly among those of the case, so that small ones come as often as large ones; the
others have theirs anywhere in the foreground box.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glmae_ray.config_finetune import CropsConfig
from glmae_ray.passes import Passes, below, unit, words_of

# Of each structure of a case, int32 (n, 3): some of its voxels, along Z, Y, X.
Points = Sequence[NDArray[np.int32]]

_CROP_STREAM, _POINT_STREAM = 4, 5  # see passes.py
_WORDS_PER_CROP = 6  # structure, voxel, position along Z, Y, X, seed
_POINTS = 256  # kept of a structure: 3 KB; more than a case is shown in most runs


class CropDraw(NamedTuple):
    """The crops of one sample."""

    boxes: NDArray[np.float64]  # (V, 2, 3): start and stop along Z, Y, X in level-0 voxels
    seeds: NDArray[np.int64]  # (V,), of the augmentation; not negative


@dataclass(frozen=True, eq=False)
class CropPlan:
    """What each sample of a finetuning run is made of; the cases come as `Passes` shows them.

    Attributes:
        seed: The run's seed.
        foreground: int64 (N, 2, 3) foreground boxes of the cases, level-0 voxels.
        shapes: int64 (N, 3), level-0 voxels.
        sides: float64 (N, 3), see `crop_sides`.
        crops: How many of a sample, and the share that is about structures.
    """

    seed: int
    foreground: NDArray[np.int64]
    shapes: NDArray[np.int64]
    sides: NDArray[np.float64]
    crops: CropsConfig

    @functools.cached_property
    def passes(self) -> Passes:
        """Which case each sample shows."""
        return Passes(self.seed, len(self.foreground))

    def case(self, number: int) -> int:
        """See `Passes`."""
        return self.passes.case(number)

    def draw(self, number: int, points: Points, *, case: int | None = None) -> CropDraw:
        """Boxes and seeds of the crops of sample `number`.

        A crop is moved to lie within the scan; along an axis on which the scan is smaller than it,
        it lies about the scan's middle.

        Args:
            number: The sample.
            points: Of the case's structures, see `label_points`; without any, every crop is
                anywhere in the foreground box.
            case: Row of the case; None: that of the plan.
        """
        row = self.case(number) if case is None else case
        count = self.crops.count
        words = words_of(self.seed, _CROP_STREAM, number, count * _WORDS_PER_CROP)
        words = words.reshape(count, _WORDS_PER_CROP)
        start, stop = self.foreground[row]
        centres = start + (unit(words[:, 2:5]) * (stop - start)).astype(np.int64)
        for crop in np.flatnonzero(self._is_about_a_structure(number)) if points else ():
            structure, voxel = words[crop, :2].tolist()
            voxels = points[below(structure, len(points))]
            centres[crop] = voxels[below(voxel, len(voxels))]
        sides, last = self.sides[row], self.shapes[row] - self.sides[row]
        first = np.floor(centres + 0.5 - sides / 2)
        first = np.where(last < 0, np.floor(last / 2), first.clip(0, last.clip(0)))
        seeds = (words[:, 5] >> 1).astype(np.int64)
        return CropDraw(np.stack([first, first + sides], axis=1), seeds)

    def _is_about_a_structure(self, number: int) -> NDArray[np.bool_]:
        """For each crop (V,): over any run of crops, as many are as the share says."""
        before = np.floor(
            (number * self.crops.count + np.arange(self.crops.count + 1)) * self.crops.foreground
        )
        return np.diff(before) > 0


def crop_sides(spacings: NDArray[np.float64], crops: CropsConfig) -> NDArray[np.float64]:
    """Sides of a crop in level-0 voxels of each case, float64 (N, 3).

    Args:
        spacings: (N, 3) along Z, Y, X in mm.
        crops: Size and spacing of a crop.
    """
    size = np.array(crops.size, float)
    if crops.spacing is None:
        return np.tile(size, (len(spacings), 1))
    # A thousandth of a voxel is nothing, and lets a case of the same spacing stay as it is.
    return np.round(size * (crops.spacing / spacings), 3)


def label_points(label: NDArray[np.uint8], *, most: int = _POINTS) -> Points:
    """Up to `most` voxels of each structure in a label map, spread evenly over it.

    One voxel of each of `most` equal parts of the structure's voxels, in the order of the array.

    Args:
        label: (Z, Y, X), 0 for background.
        most: Of a structure.
    """
    flat = label.reshape(-1)
    voxels = np.flatnonzero(flat)
    values = flat[voxels]
    points = []
    for value in np.flatnonzero(np.bincount(values)).tolist():
        own = voxels[values == value]
        if len(own) > most:
            within = unit(words_of(0, _POINT_STREAM, value, most))
            own = own[((np.arange(most) + within) * len(own) / most).astype(np.int64)]
        points.append(np.stack(np.unravel_index(own, label.shape), axis=1).astype(np.int32))
    return points
