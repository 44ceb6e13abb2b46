"""A scan on the grid on which a network sees it, and its scores back on the scan's own grid.

A network is shown voxels; nothing tells it how large they are or how they lie in the patient. So
a scan with voxels of another size than all it learned from is resampled to the nearest of those,
and one that lies more oblique than any is laid along the patient's axes.

Letters: K outputs, P voxels, ZYX voxels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from glmae_ray.blocks import Blocks
from glmae_ray.config_base import Size, Spacing
from glmae_ray.config_finetune import AugmentConfig, CropsConfig
from glmae_ray.intensity import Window, window_of
from glmae_ray.resizing import axis_taps, resize
from glmae_ray.store.index import VolumeIndex
from glmae_ray.volume import spacing_of

Plane = tuple[int, Tensor]  # its number along Z, and its scores_KYX
Part = tuple[tuple[Any, ...], Tensor]  # an index into (Z, Y, X), and the scores (K, ...) there

# The patient's directions (x, y, z) along axes Z, Y, X of a scan that lies straight, as columns.
STRAIGHT = np.array([[0.0, 0, 1], [0, 1, 0], [1, 0, 0]])
_SPACING_SLACK, _TILT_SLACK = 0.05, 2.0  # share of a side, degrees: what makes no difference


@dataclass(frozen=True)
class Learned:
    """How the scans lay that a network was trained on.

    Attributes:
        finest_mm: Smallest sides of their voxels along Z, Y, X.
        coarsest_mm: Largest.
        tilt_deg: Largest angle between an axis of theirs and the patient's, random rotations of
            the training included.
    """

    finest_mm: Spacing
    coarsest_mm: Spacing
    tilt_deg: float

    @classmethod
    def of(cls, index: VolumeIndex, augment: AugmentConfig) -> Learned:
        """What a network learns from the cases of an index."""
        spacings = index.spacings()
        tilt = max(tilt_deg(axes_of(affine)) for affine in index.affines())
        turned = augment.rotate_deg if augment.affine_chance else 0.0
        finest, coarsest = spacings.min(0).tolist(), spacings.max(0).tolist()
        return cls(tuple(finest), tuple(coarsest), round(tilt + turned, 3))

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Learned:
        """From `as_dict`."""
        finest, coarsest = tuple(facts["finest_mm"]), tuple(facts["coarsest_mm"])
        return cls(finest, coarsest, facts["tilt_deg"])

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "finest_mm": [*self.finest_mm],
            "coarsest_mm": [*self.coarsest_mm],
            "tilt_deg": self.tilt_deg,
        }

    def nearest(self, spacing: Spacing) -> Spacing:
        """The spacing among those that were learned from."""
        pairs = zip(spacing, self.finest_mm, self.coarsest_mm, strict=True)
        z, y, x = (
            side
            if low * (1 - _SPACING_SLACK) <= side <= high * (1 + _SPACING_SLACK)
            else min(max(side, low), high)
            for side, low, high in pairs
        )
        return z, y, x

    def has_tilt(self, degrees: float) -> bool:
        """Whether scans that lay so oblique were among those that were learned from."""
        return degrees <= self.tilt_deg + _TILT_SLACK


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

    def straightened(self) -> Scan:
        """Along the patient's axes, in voxels of the same sides, float32 in a network's units.

        It is as large as it has to be to hold this one; around that is air.
        """
        matrix, offset, shape = _onto_straight(self, self.spacing)
        back = np.linalg.inv(matrix)
        array = np.empty((len(self.array), *shape), np.float32)
        for channel, air, out in zip(self.window.apply(self.array), self.air, array, strict=True):
            ndimage.affine_transform(
                channel, back, -back @ offset, shape, out, order=1, cval=float(air)
            )
        units = np.tile((0.0, 1.0), (len(array), 1))
        return Scan(array, self.spacing, Window(units, clips=False), self.air)


class Seen(NamedTuple):
    """What a network is shown of a scan, and the way back.

    Attributes:
        scan: What windows are cut from.
        own: The scan.
        is_turned: Whether they lie at an angle to each other.
    """

    scan: Scan
    own: Scan
    is_turned: bool

    def brought_back(self, planes: Iterator[Plane]) -> Iterable[Part]:
        """Planes of scores, from first to last, on the scan's own grid; each voxel comes once."""
        if self.is_turned:
            return _turned_back(planes, self.scan, to=self.own)
        if self.scan.shape != self.own.shape:
            planes = _resized_back(planes, self.scan.shape, to=self.own.shape)
        return (((z,), scores_KYX) for z, scores_KYX in planes)


class Lay(NamedTuple):
    """How a scan is laid for a network.

    Attributes:
        spacing: (Z, Y, X) of the voxels that it sees, in mm; before they cover the scan exactly.
        tilt_deg: How oblique the scan lies and is not shown; None where it is left as it lies.
    """

    spacing: Spacing
    tilt_deg: float | None


def lay_of(
    spacing: Spacing, axes: NDArray[np.float64], crops: CropsConfig, learned: Learned | None
) -> Lay:
    """How a network is to see a scan.

    Args:
        spacing: (Z, Y, X) of the scan in mm.
        axes: Of the scan, see `Scan`.
        crops: The spacing of all that the network sees, if it has one.
        learned: How the scans lay that it was trained on; None: as this one.
    """
    if crops.spacing is not None:
        spacing = crops.spacing
    elif learned is not None:
        spacing = learned.nearest(spacing)
    tilt = tilt_deg(axes)
    return Lay(spacing, None if learned is None or learned.has_tilt(tilt) else tilt)


def see(scan: Scan, crops: CropsConfig, learned: Learned | None) -> Seen:
    """Show a scan as a network knows them; the arguments are those of `lay_of`."""
    lay = lay_of(scan.spacing, scan.axes, crops, learned)
    shown = scan.resampled(lay.spacing)
    if lay.tilt_deg is None:
        return Seen(shown, scan, is_turned=False)
    return Seen(shown.straightened(), scan, is_turned=True)


def _onto_straight(
    scan: Scan, spacing: Spacing
) -> tuple[NDArray[np.float64], NDArray[np.float64], Size]:
    """Matrix and offset from an index of a scan to that on the straight grid; the latter's shape.

    Args:
        scan: The scan.
        spacing: (Z, Y, X) of the straight grid, in mm.
    """
    sides, steps = np.array(scan.shape), np.array(spacing)
    to_mm = STRAIGHT.T @ scan.axes * scan.spacing  # from corners of voxels, along Z, Y, X
    corners = np.array([*itertools.product(*((0, side) for side in sides))]) @ to_mm.T
    matrix = to_mm / steps[:, None]
    offset = (to_mm.sum(1) / 2 - corners.min(0)) / steps - 0.5
    z, y, x = np.ceil(np.ptp(corners, axis=0) / steps - 1e-6).astype(int).tolist()
    return matrix, offset, (z, y, x)


def _resized_back(planes: Iterator[Plane], shape: Size, *, to: Size) -> Iterator[Plane]:
    """Planes of scores on a grid of `shape`, on the grid `to` of the same space."""
    taps = axis_taps(np.array([0, shape[0]]), 1, shape[0], to[0])
    held: dict[int, Tensor] = {}
    for z in range(to[0]):
        weights = {
            taps.start + int(number): float(weight)
            for number, weight in zip(taps.index[:, z], taps.weight[:, z], strict=True)
            if weight
        }
        while max(weights) not in held:
            held |= [next(planes)]
        held = {number: plane for number, plane in held.items() if number >= min(weights)}
        scores_KYX = torch.stack([held[n] * weight for n, weight in weights.items()]).sum(0)
        plane = F.interpolate(scores_KYX[None], size=to[1:], mode="bilinear", antialias=True)
        yield z, plane[0]


def _turned_back(planes: Iterator[Plane], straight: Scan, *, to: Scan) -> Iterator[Part]:
    """Planes of scores on a straight grid, interpolated where the voxels of a scan lie.

    Between two planes lies a sheet of the scan's voxels, one or a few above each other at each
    (Y, X), because its own Z rises with the patient's. So two planes are all that is held.
    """
    matrix, offset, _ = _onto_straight(to, straight.spacing)
    y_YX, x_YX = np.indices(to.shape[1:])
    plane_YX = matrix[0, 1] * y_YX + matrix[0, 2] * x_YX + offset[0]  # on which Z = 0 lies
    last, begin = straight.shape[0] - 1, np.zeros(to.shape[1:], int)
    _, lower_KYX = next(planes)
    for number in range(max(1, last)):
        upper_KYX = next(planes)[1] if last else lower_KYX
        end = np.full_like(begin, to.shape[0])
        if number + 1 < last:
            end = np.clip(np.ceil((number + 1 - plane_YX) / matrix[0, 0]), begin, end).astype(int)
        for above in range((end - begin).max()):
            y, x = np.nonzero(begin + above < end)
            index = np.stack([begin[y, x] + above, y, x])
            place = matrix @ index + offset[:, None]
            place[0] -= number
            yield tuple(index), _between(lower_KYX, upper_KYX, place)
        lower_KYX, begin = upper_KYX, end


def _between(lower_KYX: Tensor, upper_KYX: Tensor, place: NDArray[np.float64]) -> Tensor:
    """Scores (K, P) at places (3, P) between two planes; Z counts from the lower one."""
    rows, columns = lower_KYX.shape[1:]
    z, y, x = torch.from_numpy(place).to(lower_KYX)
    # From the centre of the first voxel to that of the last grid_sample counts from -1 to 1.
    grid = torch.stack([2 * x / max(1, columns - 1) - 1, 2 * y / max(1, rows - 1) - 1], dim=-1)
    both = torch.cat([lower_KYX, upper_KYX])[None]
    found = F.grid_sample(both, grid[None, None], padding_mode="border", align_corners=True)
    below, above = found[0, :, 0].chunk(2)
    return torch.lerp(below, above, z.clamp(0, 1))
