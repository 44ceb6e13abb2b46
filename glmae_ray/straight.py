"""A scan along the patient's axes, and scores that come back from there to the scan's own voxels.

Letters: K outputs, P voxels, ZYX voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from glmae_ray.config_base import Size, Spacing
from glmae_ray.intensity import Window
from glmae_ray.scans import STRAIGHT, Scan

Plane = tuple[int, Tensor]  # its number along Z, and its scores_KYX
Part = tuple[tuple[Any, ...], Tensor]  # an index into (Z, Y, X), and the scores (K, ...) there


class Straight(NamedTuple):
    """A grid along the patient's axes that holds all of a scan but its padding.

    Attributes:
        corner_mm: (3,), the first voxel's, along the patient's Z, Y, X from that of the scan.
        spacing: (Z, Y, X) in mm.
        shape: (Z, Y, X) in voxels.
    """

    corner_mm: NDArray[np.float64]
    spacing: Spacing
    shape: Size

    @classmethod
    def around(cls, scan: Scan, spacing: Spacing) -> Straight:
        """The grid of a scan, in voxels of a spacing.

        Voxels next to padding are mixed with it, so the grid ends at their centres, give or take a
        quarter of its own voxels: no scan of the training had a rim of padding.
        """
        edges_mm, steps = _edges_mm(scan), np.array(spacing)
        points_mm = scan.hull @ edges_mm.T
        low, high = points_mm.min(0), points_mm.max(0)
        sides = np.ceil((high - low) / steps - 1e-6)
        if scan.padding is not None:
            rims_mm = np.abs(edges_mm).sum(1)
            sides = np.round((high - low - rims_mm) / steps).clip(1)
            low = (low + high - sides * steps) / 2
        z, y, x = sides.astype(int).tolist()
        return cls(low, spacing, (z, y, x))

    def index_of(self, scan: Scan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Matrix and offset from an index of the scan, whatever its spacing, to that of here."""
        edges_mm, steps = _edges_mm(scan), np.array(self.spacing)
        offset = (edges_mm.sum(1) / 2 - self.corner_mm) / steps - 0.5
        return edges_mm / steps[:, None], offset

    def lay(self, scan: Scan) -> Scan:
        """On a grid along the patient's axes, float32 in a network's units; air around it.

        By cubic splines, as linear weights would blur it; within the range that it had.
        """
        (matrix, offset), shape = self.index_of(scan), self.shape
        back, last = np.linalg.inv(matrix), np.array(scan.shape)[:, None, None] - 1
        plane_3YX = np.tensordot(back[:, 1:], np.indices(shape[1:]), 1)
        plane_3YX -= (back @ offset)[:, None, None]
        array = np.empty((len(scan.array), *shape), np.float32)
        for channel, air, out in zip(scan.window.apply(scan.array), scan.air, array, strict=True):
            lowest, highest = channel.min(), channel.max()
            spline = ndimage.spline_filter(channel, order=3, output=np.float32)
            for z, plane in enumerate(out):
                place = plane_3YX + (back[:, 0] * z)[:, None, None]
                ndimage.map_coordinates(spline, place, plane, mode="mirror", prefilter=False)
                plane.clip(lowest, highest, out=plane)
                plane[(np.abs(place - last / 2) > last / 2 + 0.5).any(0)] = air
        units = np.tile((0.0, 1.0), (len(array), 1))
        return Scan(array, self.spacing, Window(units, clips=False), scan.air)

    def brought_back(self, planes: Iterator[Plane], to: Scan) -> Iterator[Part]:
        """Planes of scores on this grid, interpolated where the voxels of a scan lie.

        Padding outside the grid gets 1 for background, which is output 0, and 0 for all else; a
        voxel up to a quarter outside has the scores at the edge.
        Between two planes lies a sheet of the scan's voxels, one or a few above each other at each
        (Y, X), because its own Z rises with the patient's. So two planes are all that is held.
        """
        matrix, offset = self.index_of(to)
        y_YX, x_YX = np.indices(to.shape[1:])
        plane_YX = matrix[0, 1] * y_YX + matrix[0, 2] * x_YX + offset[0]  # on which Z = 0 lies
        last, begin = self.shape[0] - 1, np.zeros(to.shape[1:], int)
        middle = (np.array(self.shape) - 1) / 2
        _, lower_KYX = next(planes)
        for number in range(max(1, last)):
            upper_KYX = next(planes)[1] if last else lower_KYX
            end = np.full_like(begin, to.shape[0])
            if number + 1 < last:
                above_YX = np.ceil((number + 1 - plane_YX) / matrix[0, 0])
                end = above_YX.clip(begin, end).astype(int)
            for step in range((end - begin).max()):
                y, x = np.nonzero(begin + step < end)
                index = np.stack([begin[y, x] + step, y, x])
                place = matrix @ index + offset[:, None]
                is_padding = (np.abs(place.T - middle) > middle + 0.75 + 1e-6).any(1)
                place[0] -= number
                scores_KP = _between(lower_KYX, upper_KYX, place)
                scores_KP[:, is_padding] = 0
                scores_KP[0, is_padding] = 1
                yield tuple(index), scores_KP
            lower_KYX, begin = upper_KYX, end


def _edges_mm(scan: Scan) -> NDArray[np.float64]:
    """Edges of a scan's voxels as columns, along the patient's Z, Y, X."""
    return STRAIGHT.T @ scan.axes * scan.spacing


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
