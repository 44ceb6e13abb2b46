"""A scan in memory: its voxels as a network takes them, and how it lies in the patient."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmae_ray.blocks import Blocks
from glmae_ray.config_base import Size, Spacing
from glmae_ray.config_finetune import CropsConfig
from glmae_ray.intensity import Window, window_of
from glmae_ray.resizing import axis_taps, resize
from glmae_ray.volume import spacing_of

# The patient's directions (x, y, z) along axes Z, Y, X of a scan that lies straight, as columns.
STRAIGHT = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])


def axes_of(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Directions (x, y, z) along the index axes of a (4, 4) affine, unit columns (3, 3)."""
    return affine[:3, :3] / np.asarray(spacing_of(affine))


def tilt_deg(axes: NDArray[np.float64]) -> float:
    """Largest angle between an axis Z, Y, X and the patient's, in degrees."""
    return float(np.rad2deg(np.arccos(np.clip((axes * STRAIGHT).sum(0).min(), -1, 1))))


@dataclass(frozen=True, eq=False)
class Scan:
    """Voxels, how their intensities become a network's, and how they lie in the patient.

    Attributes:
        array: (C, Z, Y, X), int16 or float32.
        spacing: (Z, Y, X) in mm.
        window: What its intensities become.
        air: float32 (C,), what lies around it, as a network sees it.
        axes: Columns: the patient's directions (x, y, z) along Z, Y and X.
    """

    array: NDArray[Any]
    spacing: Spacing
    window: Window
    air: NDArray[np.float32]
    axes: NDArray[np.float64] = field(default_factory=lambda: STRAIGHT)

    @classmethod
    def of(cls, array: NDArray[Any], row: Mapping[str, Any], crops: CropsConfig) -> Scan:
        """A case (C, Z, Y, X) with its row of the index, as crops of it are shown in training."""
        window = window_of(row, crops)
        z, y, x = row["spacing"]
        axes = axes_of(np.reshape(row["affine"], (4, 4)))
        return cls(array, (z, y, x), window, window.air(row["minimum"]), axes)

    @property
    def shape(self) -> Size:
        """Sides (Z, Y, X) in voxels."""
        z, y, x = self.array.shape[1:]
        return z, y, x

    def cut(self, corner: Sequence[int], size: Size) -> NDArray[np.float32]:
        """A window float32 (C, *size) as a network takes it; outside the scan is air.

        Args:
            corner: Its first voxel; may lie before the scan's.
            size: Sides in voxels.
        """
        sides = list(zip(corner, size, self.shape, strict=True))
        inside = [slice(max(0, at), min(at + part, side)) for at, part, side in sides]
        cut = self.window.apply(self.array[:, *inside])
        if cut.shape[1:] == size:
            return cut
        padded = np.empty((len(cut), *size), np.float32)
        padded[...] = self.air[:, None, None, None]
        there = [slice(s.start - at, s.stop - at) for s, at in zip(inside, corner, strict=True)]
        padded[:, *there] = cut
        return padded

    def resampled(self, spacing: Spacing) -> Scan:
        """The same space in voxels of about `spacing` mm, anti-aliased as crops are.

        A whole number of voxels covers the scan exactly, so their sides are off by up to half a
        voxel over a side of the scan.
        """
        pairs = zip(self.shape, self.spacing, spacing, strict=True)
        sides = [max(1, round(side * had / wanted)) for side, had, wanted in pairs]
        if tuple(sides) == self.shape:
            return self
        taps = [
            axis_taps(np.array([0, had]), 1, had, side)
            for had, side in zip(self.shape, sides, strict=True)
        ]
        array = np.empty((len(self.array), *sides), self.array.dtype)
        resize(Blocks.whole(self.array), taps, array)
        steps = zip(self.spacing, self.shape, sides, strict=True)
        z, y, x = (step * had / side for step, had, side in steps)
        return replace(self, array=array, spacing=(z, y, x))

    @functools.cached_property
    def padding(self) -> NDArray[Any] | None:
        """What a tool filled in around a scan that it laid on another grid, (C,); None: nothing.

        That is the value of all eight corners where these are alike.
        """
        first, *others = (
            self.array[:, z, y, x] for z, y, x in itertools.product((0, -1), repeat=3)
        )
        return None if any((first != corner).any() for corner in others) else first

    @functools.cached_property
    def hull(self) -> NDArray[np.int64]:
        """Corners of voxels (P, 3), between which all lies that is no padding."""
        whole = np.array([*itertools.product(*((0, side) for side in self.shape))])
        if self.padding is None:
            return whole
        padding = self.padding[:, None, None]
        ends = [whole[:0]]
        for z, plane in enumerate(np.moveaxis(self.array, 1, 0)):
            held = (plane != padding).any(0)
            y = np.flatnonzero(held.any(1))
            begin, end = held[y].argmax(1), self.shape[2] - held[y, ::-1].argmax(1)
            places = itertools.product((z, z + 1), (y, y + 1), (begin, end))
            ends += [np.stack([np.full_like(y, at), *line], axis=1) for at, *line in places]
        found = np.concatenate(ends)
        return found if len(found) else whole
