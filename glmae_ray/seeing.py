"""A scan on the grid on which a network sees it, and its scores back on the scan's own grid.

A network is shown voxels; nothing tells it how large they are or how they lie in the patient. So
a scan with voxels of another size than all it learned from is resampled to the nearest of those,
and one that lies more oblique than any is laid along the patient's axes.

Letters: K outputs, ZYX voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from glmae_ray.config_base import Size, Spacing
from glmae_ray.config_finetune import CropsConfig
from glmae_ray.resizing import axis_taps
from glmae_ray.scans import Scan, axes_of, tilt_deg
from glmae_ray.store.index import VolumeIndex
from glmae_ray.straight import Part, Plane, Straight

_SPACING_SLACK, _TILT_SLACK = 0.05, 2.0  # share of a side, degrees: what makes no difference


@dataclass(frozen=True)
class Learned:
    """How the scans lay that a network was trained on.

    Attributes:
        finest_mm: Smallest sides of their voxels along Z, Y, X.
        coarsest_mm: Largest.
        tilt_deg: Largest angle between an axis of theirs and the patient's. Random rotations of
            crops do not count: they make a network robust, but show it nothing of what lies
            around a scan that a tool has turned.
    """

    finest_mm: Spacing
    coarsest_mm: Spacing
    tilt_deg: float

    @classmethod
    def of(cls, index: VolumeIndex) -> Learned:
        """What a network learns from the cases of an index."""
        spacings = index.spacings()
        tilt = max(tilt_deg(axes_of(affine)) for affine in index.affines())
        finest, coarsest = spacings.min(0).tolist(), spacings.max(0).tolist()
        return cls(tuple(finest), tuple(coarsest), round(tilt, 3))

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


class Seen(NamedTuple):
    """What a network is shown of a scan, and the way back.

    Attributes:
        scan: What windows are cut from.
        own: The scan.
        straight: The grid of the former where they lie at an angle to each other.
    """

    scan: Scan
    own: Scan
    straight: Straight | None = None

    def brought_back(self, planes: Iterator[Plane]) -> Iterable[Part]:
        """Planes of scores, from first to last, on the scan's own grid; each voxel comes once."""
        if self.straight is not None:
            return self.straight.brought_back(planes, to=self.own)
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
        return Seen(shown, scan)
    straight = Straight.around(scan, shown.spacing)
    return Seen(straight.lay(shown), scan, straight)


def _resized_back(planes: Iterator[Plane], shape: Size, *, to: Size) -> Iterator[Plane]:
    """Planes of scores on a grid of `shape`, on the grid `to` of the same space."""
    taps = axis_taps(np.array([0, shape[0]]), 1, shape[0], to[0])
    held: dict[int, torch.Tensor] = {}
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
